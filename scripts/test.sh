#!/usr/bin/env bash
# The whole test suite in the repository's environment. Arguments go to pytest: scripts/test.sh tests/cli -k help
# With the oldest versions that pyproject.toml claims (minutes to install, once):
#   LEAD_ENGINE_CONSTRAINTS=constraints-oldest.txt LEAD_ENGINE_VENV=.venv-oldest PYTHON=python3.12 scripts/test.sh
#
#   LEAD_ENGINE_TEST_WORKERS   tests at a time (default: one a core); 0 runs them in one process
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$LEAD_ENGINE_ROOT"

# One thread a process: the tests' matrices are small, and the distributed ones bring processes of their own.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
arguments=()
for argument in "$@"; do
    case "$argument" in
        --fast) arguments+=(-m "not slow") ;;
        *) arguments+=("$argument") ;;
    esac
done
# A worker a core, each with whole files, whose fixtures (models, pools, forked ranks) are then made once. In the order of
# tests/conftest.py, slow files first: xdist by itself would begin with the files of most tests, and end with long ones.
exec python -m pytest -q --durations=10 -n "${LEAD_ENGINE_TEST_WORKERS:-logical}" --dist loadfile \
    --no-loadscope-reorder "${arguments[@]}"
