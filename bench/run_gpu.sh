#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command a part. No part takes longer than nine minutes or needs the internet.
#
#   bench/run_gpu.sh --part A --results DIR     correctness: attention, operators, no synchronisation, the head on two shapes
#   bench/run_gpu.sh --part B --results DIR     training 1.2B parameters beside Trainer and SFTTrainer, with and without Liger
#   bench/run_gpu.sh --part C --results DIR     planning to 100M samples, step overhead, launches, fidelity
#   bench/run_gpu.sh --part D | E | F           the head on all shapes; the other tests; the study (call F until it is complete)
#   bench/run_gpu.sh --part A B C D E F --dry   every step at a tiny size on a CPU; no figure counts
#
# DIR receives the result files, a summary and an archive of the logs, also when a step fails: at most 8 files of at most 16 MiB a
# part. Move the result files to bench/results/ with the card's name; bench/results/ is also the default.
#
#   LEAD_ENGINE_WHEELS      folder of wheels to install first, into the work folder; what is missing is named and left out
#   LEAD_ENGINE_GPU_WORK    folder for pools and models (default: runs/gpu)
#   PYTHON                  the interpreter (default: python3), with a GPU build of torch and its triton
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/run_gpu.py" "$@"
