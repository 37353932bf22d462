#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: tests there (also that a round never waits for the device), then the benchmarks on a model
# of 100M parameters. Results go to bench/results/gpu-*.json, with machine and versions. Nothing here has been run on a GPU yet.
#
#   bench/run_gpu.sh [POOL.jsonl [TEXT...]]     default: the procedural pool and its text
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="${LEAD_ENGINE_GPU_WORK:-runs/gpu}"
mkdir -p "$work"
python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name(), torch.__version__)'
python -m pytest -q tests/model tests/training tests/selection tests/lead_kernels

if [ $# -ge 1 ]; then
    pool="$1"
    shift
    text=("$@")
else
    [ -e "$work/data/pool.jsonl" ] || python -m lead_engine make-pool --out "$work/data" --seed 0
    pool="$work/data/pool.jsonl" text=("$work/data/text.txt")
fi
batch=(--batch.capacity 16384)
python -m lead_engine pretrain --text "${text[@]}" --model scratch:100m --vocab-size 8192 --out "$work/base" --resume "${batch[@]}" --optimizer.lr 6e-4
python -m lead_engine prepare --pool "$pool" --model "$work/base" --out "$work/prepared" "${batch[@]}" --optimizer.lr 1e-4
for bench in step_overhead loss_change_fidelity sft_against_trainer; do
    python "bench/$bench.py" --pool "$work/prepared" --model "$work/base" --capacity 16384 --lr 1e-4 --out "bench/results/gpu-$bench.json"
done
