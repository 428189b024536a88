#!/usr/bin/env bash
# The whole recipe of a pretrained model on one GPU, in under ten minutes: `gac` and a constant .5, or the arms named.
# Usage: real.sh OUT MODEL [ARM...]
#
# MODEL is what `gac train --model` takes. The model file travels in parts of at most 60 MiB, which are joined here:
#   split -b 60M -d SmolLM2-135M-Instruct.Q4_1.gguf model.gguf.part      (model.gguf.part00, model.gguf.part01)
#   benchmarks/real.sh OUT model.gguf.part00
# Runs from a checkout; needs transformers, TRL, reasoning-gym, peft and gguf. OUT gets gpu.json, gpu.md, gpu.png and
# the runs; a second call makes the rows that are missing.
#
# Predicted before any GPU ran it (one H100 or H200; 135 M parameters, fp32 under bf16 autocast; the host is what a step
# waits for, at 25 to 50 us a launch as docs/benchmarks.md found): 24 tokens of generation at 600 launches each 0.5 s,
# four passes a branch at 1,800 launches each 0.5 s, the rest 0.2 s: 1.2 s a step, 180 s for 150 steps; 11 evaluations,
# warm start and imports 60 s; GAC at most 0.9% of it. Two runs in 480 s.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: $0 OUT MODEL [ARM...]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
model=$2
shift 2
[ $# -gt 0 ] || set -- gac "constant .5"
case $model in package:*) ;; *) model=$(realpath -- "$model") || exit 2 ;; esac
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
timeout --kill-after=10 590 "${PYTHON:-python3}" -m benchmarks.real rows --recipe gpu --model "$model" --seeds 0 \
  --arms "$@" --out "$out/runs" --results "$out" --train --model-cache "$out/model"
