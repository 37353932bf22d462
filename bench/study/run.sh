#!/usr/bin/env bash
# The study of docs/STUDY.md, from the data to the tables: about 2 hours on 2 cores. What is complete is kept; run it again to go on.
#
#   bench/study/run.sh [FOLDER]     FOLDER holds pool.jsonl, heldout.jsonl and text/*.txt (default: ../shared/data)
#
# Results: runs/study/{clean,noisy,near}-study/results.md and report/, runs/study/utility_fidelity.json
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/env.sh"
cd "$LEAD_ENGINE_ROOT"
data="${1:-../shared/data}" place=runs/study
for file in pool.jsonl heldout.jsonl text; do
    [ -e "$data/$file" ] || { echo "error: $data/$file: not there; name the folder that holds pool.jsonl, heldout.jsonl and text/" >&2; exit 2; }
done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$place"

[ -e "$place/data/heldout.jsonl" ] || python bench/study/make_pools.py --pool "$data/pool.jsonl" --heldout "$data/heldout.jsonl" --out "$place/data"
lead-engine pretrain --text "$data"/text/*.txt --model scratch:mini --vocab-size 4096 --out "$place/base" --resume --batch.capacity 2048 --batch.micro-batches 2
for pool in clean noisy near; do
    lead-engine prepare --pool "$place/data/$pool.jsonl" --model "$place/base" --out "$place/$pool" \
        --max-length 512 --batch.capacity 2048 --batch.micro-batches 2 --optimizer.lr 5e-4
done
lead-engine prepare --scoring ngram --pool "$place/data/clean.jsonl" --model "$place/base" --out "$place/ngram" \
    --max-length 512 --batch.capacity 2048 --batch.micro-batches 2
for pool in clean noisy near; do
    lead-engine compare --config "bench/study/$pool.yaml" --out "$place/$pool-study"
done
python bench/study/utility_fidelity.py --pool "$place/clean" --ngram-pool "$place/ngram" --model "$place/base" --out "$place/utility_fidelity.json"
