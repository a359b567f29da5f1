"""What the tests of the vLLM engine share. It is imported where vLLM is not installed, too."""

import json

MEMORY = {"kv_cache_memory_bytes": 1 << 28}
SMALL = ["--engine", "vllm", "--engine-args", json.dumps(MEMORY)]
SMALL += "--prompts-per-step 4 --group-size 4 --eval-questions 6 --max-new-tokens 48".split()
TOLERANCE = 0.05  # nats a token is the bound for bf16; float32 is held to a hundredth of it


def worst_difference(ours, theirs):
    return max(
        abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )
