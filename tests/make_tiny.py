"""Makes models/tiny, the stand-in behind `--model tiny`: a small Llama, a careless pupil at sums.

    python tests/make_tiny.py            build it (45 minutes on 2 cores), measure, write it
    python tests/make_tiny.py --measure  measure the one that is there

The world: sums of two four-digit numbers, worked out column by column. The model learns from two
kinds of text, half of the training each, through the very prompts that a run uses:

    answers     "What is 4728 + 3590?" -> a worked sum in which every column has a slip with
                probability 0.2 or so (STAGES): a digit is misread, or the carry is lost or
                invented. What follows is consistent with it.
    syntheses   synthesize.SYNTHESIS_PROMPT with 1 to 8 such attempts, in the later stages more
                careless ones -> the worked sum without slips.

So its mistakes are independent between samples, as a real model's partly are: attempts at one sum
go wrong in different columns, and often each has one, so that no attempt is right and none can be
selected, while most attempts are right about any one column. The sums of `--task sums` (train and
test) are in neither kind of text.

The same machine builds the same bytes: fixed seeds, and PyTorch's CPU kernels with a fixed number
of threads. The model that is here was built a stage at a time, each from the saved one before,
which is what the script does in one go.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis.statistics import interval
from evaluate import correct
from plumbing.answers import boxed_answer, equal
from plumbing.decoding import TransformersEngine
from plumbing.models import TINY_MODEL, add_lora, load_base
from rollout import Sampling
from synthesize import Anchor, majority, synthesis, synthesis_messages, texts
from tasks import load_sums, sums_messages, sums_part

PLACES = ("ones", "tens", "hundreds", "thousands")
LAYERS, HIDDEN, HEADS, CONTEXT = 3, 128, 4, 2048
ANSWERS = 48  # a step's rows of answers
ATTEMPTS = 144  # shown in a step's syntheses: 144 / 8 = 18 rows of eight
STAGES = (
    # steps, peak learning rate, slips per column in answers, and in attempts shown to a synthesis
    (1600, 4e-3, 0.19, 0.19),  # the task, and copying: few attempts first, up to eight at the end
    (800, 2e-3, 0.19, 0.30),  # weighing eight attempts: who trusts a single one is wrong often
    (1000, 2e-3, 0.21, 0.30),  # once more; 0.79 ** 4 = 0.39 of these answers are right
)
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def worked_sum(a: int, b: int, slip: float, rng: random.Random) -> str:
    """a + b column by column from the right, each column with a slip of probability `slip`.

    >>> print(worked_sum(4728, 3590, 0.0, random.Random(0)))
    ones: 8+0=8
    tens: 2+9=11
    hundreds: 7+5+1=13
    thousands: 4+3+1=8
    \\boxed{8318}
    """
    carry, lines, total = 0, [], 0
    for column, place in enumerate(PLACES):
        digits, used = [a // 10**column % 10, b // 10**column % 10], carry
        if rng.random() < slip:
            kind = rng.randrange(3 if column else 2)  # the first column has no carry to get wrong
            if kind == 2:
                used = 1 - carry
            else:
                digits[kind] = (digits[kind] + rng.randint(1, 9)) % 10
        s = sum(digits) + used
        lines.append(f"{place}: {digits[0]}+{digits[1]}{'+1' if used else ''}={s}")
        total, carry = total + s % 10 * 10**column, s // 10
    return "\n".join(lines) + f"\n\\boxed{{{total + carry * 10**4}}}"


def draw(rng: random.Random) -> tuple[int, int]:
    """A sum that the model may be taught."""
    while True:
        a, b = rng.randint(1000, 9999), rng.randint(1000, 9999)
        if sums_part(a, b) == "taught":
            return a, b


def make_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text can be encoded): a digit is a token, and so is a word we use."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\d|[a-z]+: |\\boxed\{|[+=}?]|\n+| ?[^\s\d+=}\\?]+|\s+")
    split = pre_tokenizers.Split(words, "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    attempts = [worked_sum(*draw(rng), 0.0, rng) for _ in range(8)]
    chats = synthesis_messages(attempts), sums_messages(*draw(rng))
    corpus = [messages[0]["content"] for messages in chats] * 10
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<|user|>", "<|assistant|>", "<|system|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # Padding is the end token, as in many real models: whoever masks by id instead of by length
    # breaks here first.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def batch(tokenizer, count: int, slip: float, rng: random.Random) -> tuple:
    """(ids, targets), each (rows, width): answers where `count` is 0, else syntheses of `count`
    attempts each. Targets are -100 outside the assistant's turn.
    """
    rows = []
    for _ in range(ATTEMPTS // count if count else ANSWERS):
        a, b = draw(rng)
        if not count:
            messages, text = sums_messages(a, b), worked_sum(a, b, slip, rng)
        else:
            messages = synthesis_messages([worked_sum(a, b, slip, rng) for _ in range(count)])
            text = worked_sum(a, b, 0.0, rng)
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        rows.append((prompt, tokenizer.encode(text + END)))
    width = max(len(p) + len(t) for p, t in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -100)
    for i, (p, t) in enumerate(rows):
        ids[i, : len(p) + len(t)] = torch.tensor(p + t)
        targets[i, len(p) : len(p) + len(t)] = torch.tensor(t)
    return ids, targets


def teach(model, tokenizer, stage: int, steps: int, rng: random.Random) -> None:
    """One stage: a step learns from a batch of answers and one of syntheses, half the loss each."""
    _, peak, answer_slip, attempt_slip = STAGES[stage]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:  # warm-up, constant, and down to 0 over the last third
            group["lr"] = peak * min(1, (step + 1) / 200, 3 * (1 - step / steps))
        if stage == 0:
            # Few attempts first: copying one is the first thing to learn, and short texts teach
            # it fastest.
            most = 1 + min(7, 10 * step // steps)
            count = rng.randint(1, most) if step % 2 else most
        else:
            count = 8 if step % 4 else rng.randint(1, 8)
        losses = {}
        kinds = {"answers": (0, answer_slip), f"syntheses of {count}": (count, attempt_slip)}
        for kind, shown in kinds.items():
            ids, targets = batch(tokenizer, *shown, rng)
            chosen = targets[:, 1:] != -100
            # Padding is on the right, and attention is causal.
            hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][chosen]  # (tokens, H)
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets[:, 1:][chosen])
            loss.backward()
            losses[kind] = loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            shown = "  ".join(f"{kind} {loss:.4f}" for kind, loss in losses.items())
            seconds = f"{time.time() - started:5.0f} s"
            print(f"stage {stage}  step {step:5d}  {seconds}  loss: {shown}", flush=True)


def build(out: Path, steps: Sequence[int]) -> None:
    """Teach a new model, `steps` steps in each stage, and write it to `out`."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # Sums are split among threads: another number of them gives other last bits.
    torch.set_num_threads(2)
    rng = random.Random(0)
    tokenizer = make_tokenizer(rng)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).float()
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, vocabulary {len(tokenizer)}", flush=True)
    for stage in range(len(STAGES)):
        teach(model, tokenizer, stage, steps[stage], rng if stage == 0 else random.Random(stage))
        # To the precision it is saved in, so that a stage can start from a saved one.
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.bfloat16())
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    weights = {name: p.detach().bfloat16().contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def measure(path: Path, count: int = 500, group_size: int = 8) -> None:
    """Before any training: what an answer, a majority and a synthesis are worth on unknown sums."""
    base, tokenizer = load_base(str(path))
    engine = TransformersEngine(add_lora(base, 8, 0), tokenizer)
    questions, sampling = load_sums(None)[1][:count], Sampling(max_new_tokens=64)
    prompts = [q.messages for q in questions]
    groups = engine.sample(prompts, group_size, sampling, policy=False, seed=1)

    def write(shown):
        return synthesis(questions, shown, Anchor(engine, sampling, seed=(2,)))

    references, votes = write(groups), majority(questions, groups)
    greedy = engine.sample(prompts, 1, Sampling(0, 64), policy=False)
    single = correct(questions, [texts(group) for group in groups])  # (Q, G)
    voted, written = (  # (Q, 1) each
        correct(questions, [[s.text] for s in made]) for made in (votes, references)
    )
    for name, values in {
        "one answer": single,
        "one answer, temperature 0": correct(questions, [texts(group) for group in greedy]),
        f"majority of {group_size}": voted,
        "synthesis from 1": correct(questions, [[s.text] for s in write([g[:1] for g in groups])]),
        f"synthesis from {group_size}": written,
    }.items():
        i = interval(values.mean(dim=1))
        print(f"{name:28s} {i['mean']:.3f} ± {i['error']:.3f}")
    gain = interval((written - voted)[:, 0])
    shown = f"{gain['mean']:+.3f} ± {gain['error']:.3f}, question by question"
    print(f"synthesis minus majority     {shown}")
    differs = torch.tensor(
        [
            not equal(boxed_answer(s.text), boxed_answer(v.text))
            for s, v in zip(references, votes, strict=True)
        ]
    )
    right = written[:, 0].bool()
    print(
        f"synthesis differs from the majority on {int(differs.sum())} of {len(questions)}, "
        f"right on {int(right[differs].sum())} of those"
    )
    hopeless = single.sum(dim=1) == 0
    print(
        f"no rollout right on {int(hopeless.sum())} questions, "
        f"synthesis right on {int(right[hopeless].sum())} of those"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    where = "folder to write; default: models/tiny"
    parser.add_argument("--out", type=Path, default=TINY_MODEL, help=where)
    default = [stage[0] for stage in STAGES]
    parser.add_argument("--steps", type=int, nargs=3, default=default, help="steps of the stages")
    what = "build nothing, measure what is there"
    parser.add_argument("--measure", action="store_true", help=what)
    arguments = parser.parse_args()
    if not arguments.measure:
        build(arguments.out, arguments.steps)
    measure(arguments.out)
