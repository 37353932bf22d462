#!/usr/bin/env bash
# From a machine with Python alone to the engine's main job: make a small pool and a small base model, prepare the pool, and
# compare LEAD with random selection at equal budget over several seeds. Needs no data, no GPU and, once installed, no network.
#
#   scripts/quickstart.sh           go on with what is there; what is complete is reused
#   scripts/quickstart.sh --fresh   delete runs/quickstart and start anew
set -euo pipefail

fresh=""
for argument in "$@"; do
    case "$argument" in
        --fresh) fresh=1 ;;
        -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "error: $argument: unknown; only --fresh is known" >&2; exit 2 ;;
    esac
done

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$LEAD_ENGINE_ROOT"
place=runs/quickstart
if [ -n "$fresh" ]; then
    rm -rf "$place"
fi
# The models are so small that more threads only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step() {
    echo
    echo "== $1"
    shift
    echo "lead-engine $*"
    lead-engine "$@" || {
        echo "error: the quickstart stopped here; run it again to go on, or with --fresh to start anew" >&2
        exit 1
    }
}

SECONDS=0
if [ ! -e "$place/data/pool.jsonl" ] || [ ! -e "$place/data/text.txt" ]; then
    step "1/4 a pool of instructions about a made-up world, and text to pre-train on" \
        make-pool --out "$place/data" --seed 0
fi
step "2/4 a base model of 1M parameters" \
    pretrain --text "$place/data/text.txt" --model scratch:tiny --out "$place/base" --resume \
    --vocab-size 1024 --block 256 --epochs 3 --batch.capacity 1024 --optimizer.lr 3e-3
step "3/4 tokens, difficulty, clusters and initial utility of the pool" \
    prepare --pool "$place/data/pool.jsonl" --model "$place/base/model" --out "$place/prepared" \
    --max-length 256 --batch.capacity 1024
step "4/4 lead and random, equal budget, three seeds" \
    compare --config scripts/quickstart.yaml --out "$place/study"

page="$place/study/report/index.html"
[ -s "$page" ] || { echo "error: $page was not written" >&2; exit 1; }
echo
echo "done in $SECONDS s. The report: $LEAD_ENGINE_ROOT/$page"
