"""How long ranks take to add up a LoRA's gradients, as grpo.update does it: what many GPUs cost
in every step.

torchrun --nproc-per-node=2 benchmarks/exchange.py [--numbers 66000000] [--repeats 5]
"""

import argparse
import time

import torch

parser = argparse.ArgumentParser(
    description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
)
parser.add_argument(
    "--numbers",
    type=int,
    default=66_000_000,
    help="of the LoRA; the default is rank 32 on Qwen3-4B",
)
parser.add_argument("--repeats", type=int, default=5, help="times")
s = parser.parse_args()
torch.distributed.init_process_group("gloo")
gradients = torch.ones(s.numbers)
for _ in range(s.repeats):
    torch.distributed.barrier()
    started = time.perf_counter()
    torch.distributed.all_reduce(gradients)
    seconds = time.perf_counter() - started
    if torch.distributed.get_rank() == 0:
        size, ranks = f"{4 * s.numbers / 1e6:.0f} MB", torch.distributed.get_world_size()
        print(f"{size} over {ranks} ranks: {seconds:.2f} s", flush=True)
