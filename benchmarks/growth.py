"""How seconds and peak memory of `update` and `sample` grow with rollouts G and with their length
T, and a straight line.

    python benchmarks/growth.py --model DIR_OR_ID [--gs 2 4 8 16 32] [--lengths 64 128 256 512
    1024] [--plot growth.png]

One prompt; G varies at T = --new-tokens, then T at G = --g. Seconds should grow as the tokens
that are read, P + G T, and the update's memory should stop growing once a micro-batch is full.
The KV cache makes sampling's memory grow by design: all rollouts of a prompt run together.

Peak memory is a high-water mark and an allocator keeps what it once had, so every point is two
processes of its own, one that samples and one that updates, from made-up rollouts. On a CPU it is
that of the whole process, PyTorch and the weights included; on a GPU, what PyTorch allocated.
`loaded` is what it was just before, so the difference is the work's."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from work import endless_engine, load_trainer, process_peak_gib, trainer_flags


def peak_gib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return process_peak_gib()


def measure(s: argparse.Namespace) -> dict[str, float]:
    """One point, one of its two parts, in this process."""
    import torch

    from grpo import GRPOConfig, update
    from plumbing.logprobs import token_logprobs
    from rollout import Rollout, Sampling

    model, tokenizer, optimizer = load_trainer(s.model, s.dtype, s.gradient_checkpointing)
    g, t = s.point
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_base_model().get_input_embeddings().num_embeddings

    def random_ids(count: int) -> list[int]:
        return torch.randint(10, vocabulary, (count,), generator=generator).tolist()

    if s.part == "update":
        cfg = GRPOConfig(token_budget=s.micro_batch_tokens, importance_cap=None)

        def work(n: int, length: int, prompt: list[int]) -> None:
            nothing = [-1.0] * length
            group = [Rollout("", random_ids(length), nothing, "length", prompt) for _ in range(n)]
            rewards = torch.rand(1, n, generator=generator)
            update(model, optimizer, [group], rewards, cfg, logprobs=token_logprobs)
    else:
        engine = endless_engine(model, tokenizer)

        def work(n: int, length: int, prompt: list[int]) -> None:
            (group,) = engine.sample([prompt], n, Sampling(max_new_tokens=length))
            assert [len(o.ids) for o in group] == [length] * n

    work(2, 8, random_ids(8))  # first calls are slow; and from here on there is optimizer state
    prompt, seconds = random_ids(s.prompt_tokens), []
    # Loading takes more than the model does, for a moment, which would hide what less takes later.
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark
    loaded = peak_gib()
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(s.repeats if s.part == "update" else 1):
        wait()
        started = time.perf_counter()
        work(g, t, prompt)
        wait()
        seconds.append(time.perf_counter() - started)
    # The least: whatever else the machine does can only add to it.
    return {
        "seconds": min(seconds),
        "gib": peak_gib(),
        "loaded": loaded,
        "cuda": torch.cuda.is_available(),
    }


def draw(
    path: Path, points: list[dict], series: dict[str, list], a: float, b: float, title: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")  # a file, on a machine that may have no screen
    import matplotlib.pyplot as plt

    plt.rcParams["font.size"] = 13
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    by_size, far = {(p["g"], p["t"]): p for p in points}, max(p["tokens"] for p in points)
    for (name, sizes), marker, colour in zip(
        series.items(), "os", ("tab:blue", "tab:orange"), strict=True
    ):
        chosen = [by_size[size] for size in sizes]
        x = [p["tokens"] for p in chosen]
        # The point that both series have in common is drawn by both: the larger marker stays
        # visible under the other.
        style = {
            "linestyle": "none",
            "marker": marker,
            "color": colour,
            "markersize": 11 if marker == "o" else 7,
        }
        left.plot(x, [p["update"]["seconds"] for p in chosen], label=name, **style)
        right.plot(x, [p["update"]["gib"] for p in chosen], label=f"update, {name}", **style)
        right.plot(
            x,
            [p["sampling"]["gib"] for p in chosen],
            label=f"sampling, {name}",
            fillstyle="none",
            **style,
        )
    left.plot(
        [0, far],
        [a, a + b * far],
        color="grey",
        label=f"{a:.2g} s + {1e6 * b:.0f} µs per token",
        zorder=0,
    )
    right.axhline(
        max(p["update"]["loaded"] for p in points),
        color="grey",
        linestyle=":",
        label="model loaded",
    )
    left.set(xlabel="tokens read, prompt + G × T", ylabel="seconds of one update")
    right.set(xlabel="tokens read, prompt + G × T", ylabel="peak memory, GiB")
    for axis in (left, right):
        axis.set_xlim(left=0)
        axis.set_ylim(
            0, 1.5 * axis.get_ylim()[1]
        )  # from 0, so that heights are in proportion; room for the legend
        axis.grid(alpha=0.3)
        axis.legend(fontsize=11, loc="upper left")
    figure.suptitle(title, fontsize=13)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=210, help="length of the one prompt, P"
    )
    parser.add_argument(
        "--gs",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16, 32],
        help="rollouts G, one series of points",
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="length T in that series")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[64, 128, 256, 512, 1024],
        help="lengths T, the other series",
    )
    parser.add_argument("--g", type=int, default=4, help="rollouts G in that series")
    parser.add_argument(
        "--repeats", type=int, default=2, help="updates a point that are timed; the fastest counts"
    )
    parser.add_argument("--plot", type=Path, default=Path("growth.png"), help="where the plot goes")
    parser.add_argument(
        "--point",
        type=lambda text: tuple(map(int, text.split(","))),
        metavar="G,T",
        help="measure this alone",
    )
    parser.add_argument(
        "--part",
        default="update",
        choices=("update", "sampling"),
        help="of --point: what is measured",
    )
    trainer_flags(parser, micro_batch_tokens=2048)
    s = parser.parse_args()
    if s.point:
        print(json.dumps(measure(s)))
        return

    import numpy as np

    series = {f"T = {s.new_tokens}, G varies": [(g, s.new_tokens) for g in s.gs]}
    series[f"G = {s.g}, T varies"] = [(s.g, t) for t in s.lengths]
    points = []
    for g, t in dict.fromkeys(
        size for sizes in series.values() for size in sizes
    ):  # a size of both series, once
        points.append({"g": g, "t": t, "tokens": s.prompt_tokens + g * t})
        for part in ("update", "sampling"):
            command = [
                sys.executable,
                __file__,
                *sys.argv[1:],
                "--point",
                f"{g},{t}",
                "--part",
                part,
            ]
            lines = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.splitlines()
            points[-1][part] = json.loads(lines[-1])
        print(
            f"G {g}, T {t}: update {points[-1]['update']['seconds']:.2f} s",
            file=sys.stderr,
            flush=True,
        )

    x, y = (
        np.array(values, dtype=float)
        for values in zip(*((p["tokens"], p["update"]["seconds"]) for p in points), strict=True)
    )
    b, a = np.polyfit(x, y, 1)
    line = a + b * x
    device = "GPU" if points[0]["update"]["cuda"] else "CPU"
    name = s.model.rstrip("/").split("/")[-1]
    title = f"{name}, {s.dtype}, {device}, prompt of {s.prompt_tokens} tokens, "
    title += f"micro-batches of {s.micro_batch_tokens}"
    print(f"{title}, checkpointing {s.gradient_checkpointing}\n")
    print("               ------------------ update -----------------   ------ sampling -----")
    print("   G     T  tokens  seconds  us/token  off line  GiB (loaded)   seconds  GiB (loaded)")
    for p, fitted in zip(points, line, strict=True):
        u, v = p["update"], p["sampling"]
        cost, off = 1e6 * u["seconds"] / p["tokens"], 100 * (u["seconds"] / fitted - 1)
        updated = (
            f"{u['seconds']:8.2f} {cost:9.0f} {off:+8.1f}% {u['gib']:5.2f} ({u['loaded']:.2f})"
        )
        sampled = f"{v['seconds']:11.2f} {v['gib']:5.2f} ({v['loaded']:.2f})"
        print(f"{p['g']:4d} {p['t']:5d} {p['tokens']:7d} {updated} {sampled}")
    squared = 1 - ((y - line) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    line = f"seconds = {a:.3f} + {1e6 * b:.1f}e-6 * tokens, R^2 = {squared:.4f}"
    print(f"\nupdate: {line}, over {len(points)} points")
    print("A prompt is counted once; the update reads it once in each micro-batch.")
    print("Sampling's memory holds all its KV cache.")
    draw(s.plot, points, series, a, b, title)
    print(f"wrote {s.plot}")


if __name__ == "__main__":
    main()
