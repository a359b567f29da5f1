"""What training needs and the paper never mentions. Nothing here is needed to understand it.

answers    the final answer of a text, and when two answers mean the same
checker    whether two expressions have the same value, asked of a child process
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
latex      which LaTeX is one expression that the checker may see
logprobs   token log-probabilities with each prompt read once
models     the base model and its LoRA
normal     LaTeX without what carries no meaning
progress   what is measured, written and said after each step
ranks      many GPUs
reading    what an answer says, as a small tree
settings   all settings of a run, put together
units      words after a number: units and magnitudes
"""
