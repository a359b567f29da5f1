#!/usr/bin/env bash
# A real model on one GPU of 80 GB, in parts for half an hour of it:
#
#   bash benchmarks/gpu_result.sh MODEL TEST_JSONL OUT table            before training: 100 problems, every aggregator
#   bash benchmarks/gpu_result.sh MODEL TEST_JSONL OUT sweep            three learning rates, the same seed, few steps
#   bash benchmarks/gpu_result.sh MODEL TEST_JSONL OUT train LR STEPS   CaT on those 100 problems without labels; their table
#   bash benchmarks/gpu_result.sh MODEL TEST_JSONL OUT held-out         the trained policy on 200 others
#   bash benchmarks/gpu_result.sh MODEL TEST_JSONL OUT limit            a step beside the least that would do its work
#
# MODEL is a folder or a Hugging Face id of about 1.5B parameters, TEST_JSONL the file of MATH-500; results go to OUT. The
# parts are apart so that a person can look in between: at the sweep, to choose LR, and at the clock, to choose STEPS.
# These variables change the sizes, for a rehearsal on a CPU, say (the defaults are for the GPU):
#   PROBLEMS=100 OTHERS=200 PROMPTS=25 NEW_TOKENS=1024 SWEEP_STEPS=5 ENGINE_ARGS='{...}' LIMIT='--dtype bfloat16 ...'
set -euo pipefail
(($# >= 4)) || { sed -n 's/^#   bash/usage: bash/p' "$0" >&2; exit 2; }
model=$1 data=$2 out=$3 part=$4
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
# Of MATH-500's 500 lines: no problem is in both files.
head -n "${PROBLEMS:-100}" "$data" >"$out/problems.jsonl"
tail -n "${OTHERS:-200}" "$data" >"$out/others.jsonl"

# The same in all parts, so that vLLM compiles once, and small enough for the sweep's three at a time: a cache for the
# keys and values of a whole step (28 kB a token for Qwen2.5-1.5B). Given in bytes, it is not measured while others load.
engine_args=${ENGINE_ARGS:-'{"gpu_memory_utilization": 0.25, "kv_cache_memory_bytes": 8589934592}'}
what=(--task math500 --model "$model" --max-new-tokens "${NEW_TOKENS:-1024}" --engine vllm --engine-args "$engine_args")
# Rollouts at the paper's temperature for Qwen.
training=(--data "$out/problems.jsonl" --prompts-per-step "${PROMPTS:-25}" --temperature 0.7 --micro-batch-tokens 8192)

case $part in
  table)
    python "$here/evaluate.py" "${what[@]}" --data "$out/problems.jsonl" --sizes 8 --out "$out/table" \
      --aggregators synthesis synthesis-question majority self-bon min-ppl
    ;;
  sweep) # at once, because most of so short a run is loading: their seconds are no measurement
    for lr in 1e-5 3e-5 1e-4; do
      python "$here/train.py" "${what[@]}" "${training[@]}" --lr $lr --steps "${SWEEP_STEPS:-5}" --eval-questions 1 \
        --out "$out/lr-$lr" >"$out/lr-$lr.log" 2>&1 &
    done
    wait
    for lr in 1e-5 3e-5 1e-4; do
      [[ -e $out/lr-$lr/results.json ]] || { tail -n 30 "$out/lr-$lr.log" >&2; echo "learning rate $lr failed" >&2; exit 1; }
      echo "learning rate $lr, step by step: reward, KL, accuracy and length of the rollouts, seconds"
      python -c '
import json, sys
for line in open(sys.argv[1]):
    row = json.loads(line)
    names = ("reward", "kl", "accuracy/rollouts", "completions/mean_length", "step_time")
    print(*("{:10.4g}".format(row[name]) for name in names))' "$out/lr-$lr/metrics.jsonl"
    done
    ;;
  train)
    python "$here/train.py" "${what[@]}" "${training[@]}" --lr "${5:?LR is missing}" --steps "${6:?STEPS is missing}" \
      --out "$out/cat"
    python "$here/benchmarks/cost.py" "$out/cat"
    ;;
  held-out)
    python "$here/evaluate.py" --adapter "$out/cat" --engine-args "$engine_args" --data "$out/others.jsonl" --sizes 8 \
      --aggregators synthesis majority --out "$out/held-out"
    ;;
  limit) # checkpointed as training is
    python "$here/benchmarks/limit.py" --model "$model" --vllm --engine-args "$engine_args" --turns 3 --gradient-checkpointing \
      ${LIMIT:---dtype bfloat16 --prompts 25 --new-tokens 512 --micro-batch-tokens 8192}
    ;;
  *)
    echo "gpu_result.sh: there is no part $part" >&2
    exit 2
    ;;
esac
