#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: tests with the real kernels (also that nothing waits for the device), the head against its
# peers, planning, and then the engine's benchmarks on a model of 100M parameters. Results go to bench/results/gpu-*.json, with machine and versions.
#
#   bench/run_gpu.sh [--quick | --study | --training] [POOL.jsonl [TEXT...]]     default: the procedural pool and its text
#
# Each step has a time limit of its own, and a failure does not stop the rest; the last lines say what failed. At most 38 minutes on an H200;
# --quick takes at most 9: the tests of the operators and that no round waits for the device, the head on two shapes, planning. --study is the
# heart of docs/STUDY.md with a base of 100M parameters, for which heldout.jsonl has to lie beside POOL.jsonl; at most 30 minutes of its own.
# --training, at most 10 minutes: only whether a round waits for the device, and full fine-tuning of a model of 1.2B parameters against Trainer
# and SFTTrainer.
#
# The head's and the trainer's peers are measured where they are installed. Nothing is installed here:
#   pip install liger-kernel==0.8.5 cut-cross-entropy==25.1.1 quack-kernels==0.6.5 trl==1.16.0
#
#   PYTHON                  the interpreter (default: python3); it needs a GPU build of torch, with its triton, and matplotlib; the last part
#                           also what lead_engine needs
#   LEAD_ENGINE_GPU_WORK    folder for pools and models (default: runs/gpu)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mode=all
case "${1:-}" in
    --quick | --study | --training) mode="${1#--}"; shift ;;
esac
python="${PYTHON:-python3}"
work="${LEAD_ENGINE_GPU_WORK:-runs/gpu}"
results=bench/results
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_INTERPRET=  # kernels are compiled, also where a container hides nvidia-smi, by which the tests look for a GPU
failed=()

# step NAME SECONDS COMMAND...
step() {
    local name="$1" limit="$2" started="$SECONDS" status=0
    shift 2
    echo "== $name (at most $limit s)"
    timeout --kill-after=20 "$limit" "$@" || status=$?
    if [ "$status" = 0 ]; then
        echo "== $name: done in $((SECONDS - started)) s"
    elif [ "$status" = 124 ] || [ "$status" = 137 ]; then
        failed+=("$name: stopped after $limit s")
    else
        failed+=("$name: exit status $status after $((SECONDS - started)) s")
    fi
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name(), torch.__version__)' || exit 2
for peer in liger_kernel cut_cross_entropy quack; do
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$peer') is None)" || echo "$peer: not installed, not measured"
done
mkdir -p "$work" "$results"

# The model and the pool of the engine's benchmarks; sets $pool and $text.
prepare_100m() {
    if [ $# -ge 1 ]; then
        pool="$1"
        shift
        text=("$@")
    else
        pool="$work/data/pool.jsonl" text=("$work/data/text.txt")
        [ -e "$pool" ] || step "make-pool" 60 "$python" -m lead_engine make-pool --out "$work/data" --seed 0
    fi
    local batch=(--batch.capacity 16384)
    step "pretrain" 240 "$python" -m lead_engine pretrain --text "${text[@]}" --model scratch:100m --vocab-size 8192 --out "$work/base" --resume \
        "${batch[@]}" --optimizer.lr 6e-4
    step "prepare" 90 "$python" -m lead_engine prepare --pool "$pool" --model "$work/base" --out "$work/prepared" "${batch[@]}" --optimizer.lr 1e-4
}

# Tokens/s, MFU and memory against Trainer and SFTTrainer, and a profile of two rounds, in which nothing may wait for the device.
training() {
    step "training, $1" "$2" "$python" bench/training.py --gpu "$1" --trace "$work/training-trace-$1.json" --out "$results/gpu-training-$1.json"
}

if [ "$mode" = training ]; then
    step "no synchronisation" 100 "$python" -m pytest -q -x --timeout 90 tests/training/test_no_synchronisation.py
    training 1b 480
elif [ "$mode" = study ]; then
    prepare_100m "$@"
    sed "s#runs/gpu/heldout.jsonl#$(dirname "$pool")/heldout.jsonl#; s#runs/gpu#$work#" bench/study/gpu.yaml >"$work/study.yaml"
    step "study" 1500 "$python" -m lead_engine compare --config "$work/study.yaml" --out "$work/study"
    cp "$work/study/results.json" "$results/gpu-study.json" || failed+=("study: no results")
else
    step "operators on the GPU" 120 "$python" -m pytest -q -x --timeout 100 tests/lead_kernels/test_on_cuda.py
    step "no synchronisation" 100 "$python" -m pytest -q -x --timeout 90 tests/training/test_no_synchronisation.py
    head=("$python" bench/head.py --device cuda --out "$results/gpu-head.json")
    plan=("$python" bench/plan.py --device cuda --out "$results/gpu-plan.json")
    if [ "$mode" = quick ]; then
        step "head" 240 "${head[@]}" --shapes 4096x2048x128256 16384x4096x128256 --turns 7 --seconds 15 --build-seconds 30
        step "plan" 60 "${plan[@]}" --samples 10000 1000000 10000000
    else
        step "head" 600 "${head[@]}" --seconds 20 --build-seconds 60
        step "plan" 150 "${plan[@]}"
        training 1b 480
        step "other tests" 210 "$python" -m pytest -q tests/lead_kernels tests/model tests/training tests/selection

        prepare_100m "$@"
        for bench in step_overhead loss_change_fidelity; do
            step "$bench" 90 "$python" "bench/$bench.py" --pool "$work/prepared" --model "$work/base" --capacity 16384 --lr 1e-4 \
                --out "$results/gpu-$bench.json"
        done
    fi
fi

if [ "${#failed[@]}" = 0 ]; then
    echo "all done: $results/gpu-*.json"
else
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
