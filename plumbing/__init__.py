"""What training needs and the paper never mentions. Nothing here is needed to understand it.

answers    the final answer of a text, and when two answers mean the same
checks     what is refused before the first step
context    rollouts cut to fit what the anchor can read
data       questions from files and from the hub
decoding   the engine that samples with the trainer's own model
draws      seeds, and which questions a step takes
engines    which engine and which judge a run gets
errors     errors that a person can act on, and exit statuses
flags      the command line
folder     a run's folder: settings, logs, checkpoint
judges     an LLM judge behind a server, or the frozen anchor
logprobs   token log-probabilities with each prompt read once
models     the base model and its LoRA
progress   what is measured, written and said after each step
ranks      many GPUs
settings   all settings of a run, put together
"""
