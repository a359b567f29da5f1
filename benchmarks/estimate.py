"""How long the paper's setting would take on 1, 8 and 64 GPUs: arithmetic on assumptions, nothing
measured.

    python benchmarks/estimate.py [--gpus 1 8 64] [--prompts 32] [--new-tokens 1536]

Every completion is taken to be as long as allowed, so this is an upper bound in that respect;
time goes with the length."""

import argparse
import math

# Qwen3-4B: 36 layers, 32 query and 8 key-value heads of 128; bf16.
PARAMETERS, KV_BYTES, ATTENTION_WIDTH, LAYERS = 4.0e9, 2 * 36 * 8 * 128 * 2, 32 * 128, 36
LORA = 66e6  # numbers, rank 32
# One H100 (SXM, data sheet), and the shares of its peaks that well-kept engines reach.
BYTES_A_SECOND, FLOPS = 0.6 * 3.35e12, 0.4 * 989e12
KV_ROOM = 25e9  # bytes for keys and values beside the trainer (docs/engines.md, "Does it fit?")
EXCHANGE = 1e9  # bytes a second between ranks: gloo, through the CPU
G, PROMPT, MICRO_BATCH = 8, 200, 4096


def forward_flops(tokens: float, context: float) -> float:
    """Of a forward pass over `tokens`, each of which sees `context` tokens on average."""
    return tokens * (2 * PARAMETERS + 4 * LAYERS * ATTENTION_WIDTH * context)


def decode_seconds(sequences: int, prompt: int, new: int) -> float:
    """Each new token reads the weights once for all sequences, and every sequence's keys and
    values; as many sequences at a time as their keys and values have room for.
    """
    if not sequences:
        return 0.0
    waves = math.ceil(sequences / (KV_ROOM // (KV_BYTES * (prompt + new))))
    bytes_a_token = 2 * PARAMETERS + sequences / waves * KV_BYTES * (prompt + new / 2)
    return waves * new * bytes_a_token / BYTES_A_SECOND


def step(gpus: int, prompts: int, new: int) -> dict[str, float]:
    """Seconds of a step's parts, of the rank that has most to do."""
    mine = math.ceil(prompts / gpus)  # prompts are shared out whole
    sequence = PROMPT + new
    a_batch = MICRO_BATCH // sequence  # rollouts in a micro-batch
    batches = math.ceil(mine * G / a_batch)  # questions are shared out whole, with their rollouts
    # Per token: the reference's pass, the policy's, the same again for checkpointing, and the
    # backward pass, which for a frozen base costs as much as a forward one. Four forward passes.
    update = batches * 4 * forward_flops(a_batch * sequence, sequence / 2)
    explored = forward_flops(mine * PROMPT, PROMPT / 2) / FLOPS
    read = forward_flops(mine * G * new, G * new / 2) / FLOPS
    return {
        "rollouts": explored + decode_seconds(mine * G, PROMPT, new),
        "references": read + decode_seconds(mine, G * new, new),
        "update": update / FLOPS,
        "exchange": 2 * (gpus - 1) / gpus * 4 * LORA / EXCHANGE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[1, 8, 64], help="numbers of GPUs, a rank each"
    )
    parser.add_argument(
        "--prompts", type=int, default=32, help="questions a step, of 8 rollouts each"
    )
    parser.add_argument("--new-tokens", type=int, default=1536, help="length of every completion")
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    s = parser.parse_args()
    print(
        f"seconds a step, {s.prompts} x {G} rollouts of {s.new_tokens} tokens; then {s.steps} steps"
    )
    print("GPUs  rollouts  references  update  exchange    step    hours  GPU hours  times faster")
    first = None
    for gpus in s.gpus:
        parts = step(gpus, s.prompts, s.new_tokens)
        total = sum(parts.values())
        first, hours = first or total, total * s.steps / 3600
        widths = {"rollouts": 8, "references": 10, "update": 6, "exchange": 8}
        cells = "  ".join(f"{parts[name]:{width}.1f}" for name, width in widths.items())
        total_hours = f"{hours:7.1f}  {hours * gpus:9.0f}"
        print(f"{gpus:4d}  {cells}  {total:6.1f}  {total_hours}  {first / total:12.1f}")


if __name__ == "__main__":
    main()
