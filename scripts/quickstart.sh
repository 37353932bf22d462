#!/usr/bin/env bash
# From a machine with Python alone to the engine's main job: make a small pool and a small model to tune, prepare the pool, and
# compare LEAD with random selection at equal budget over three seeds. Needs no data, no GPU and, once installed, no network.
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
# The models are so small that several threads mostly wait for each other; on a busy machine they crawl.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

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

make_pool() { # title, folder, further flags
    [ -e "$place/$2/pool.jsonl" ] && [ -e "$place/$2/text.txt" ] || step "$1" make-pool --out "$place/$2" "${@:3}"
}

SECONDS=0
make_pool "1/6 the pool: instructions about a made-up world, and text to pre-train on" data --seed 0
make_pool "2/6 a smaller pool about another world, to teach the model what an instruction is" data-first --seed 1 --samples 2000

step "3/6 a base model of 1M parameters, from the text" \
    pretrain --text "$place/data/text.txt" --model scratch:tiny --out "$place/base" --resume \
    --vocab-size 1024 --block 256 --epochs 3 --batch.capacity 1024 --optimizer.lr 3e-3

# A base that has never seen an instruction mostly learns the format, and its uncertainty says little about the samples.
step "4/6 a first instruction tuning: the first pool, prepared ..." \
    prepare --pool "$place/data-first/pool.jsonl" --model "$place/base/model" --out "$place/prepared-first" \
    --max-length 256 --clusters 1 --warmup-share 0 --batch.capacity 1024
step "... and trained once" \
    train --pool "$place/prepared-first" --model "$place/base/model" --out "$place/tuned" --method full --resume \
    --batch.capacity 512 --optimizer.lr 1e-3

step "5/6 the pool: tokens, difficulty, clusters and initial utility" \
    prepare --pool "$place/data/pool.jsonl" --model "$place/tuned/model" --out "$place/prepared" \
    --max-length 256 --warmup-share 0.02 --batch.capacity 1024
step "6/6 lead and random at equal budget, three seeds" \
    compare --config scripts/quickstart.yaml --out "$place/study"

page="$place/study/report/index.html"
[ -s "$page" ] || { echo "error: $page was not written" >&2; exit 1; }
echo
echo "done in $SECONDS s. The report: $LEAD_ENGINE_ROOT/$page"
