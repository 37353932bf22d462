#!/usr/bin/env bash
# A command of the engine on several machines: start the same line on each of them, in any order.
#
#   NODES=4 HOST=first.machine scripts/multi_node.sh train --pool PREPARED --model MODEL --out RUN --resume ...
#
# The folders must be shared by all machines. Everything after the script's name is the engine's command line; with
# --runtime.replicate NODES the model is sharded within each machine and replicated across them.
#
#   NODES      machines (1)
#   HOST       name or address of one of them that all others reach: the rendezvous listens there (127.0.0.1 for one machine)
#   PORT       its port (29400)
#   GPUS       processes on this machine (its GPUs; 1 where there are none)
#   RUN_ID     a name that the machines of one run share and no other run at the same HOST and PORT has (lead-engine)
#   NODE_RANK  0 on HOST and anything else elsewhere; only needed where HOST does not recognise itself by its name
#   ADDRESS    name or address under which the others reach this machine, where its host name will not do
#   RESTARTS   how often torchrun starts all workers again after one has failed (0); more than 0 needs --resume
#   PYTHON     interpreter (.venv/bin/python of the repository, else python3)
#
# SIGTERM and SIGUSR1 go to the workers: they finish the round, write a checkpoint and end; the status is then 128 + the signal's number.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}
whole() { # name, value, least
    [[ "$2" =~ ^[0-9]+$ ]] && [ "$2" -ge "$3" ] || fail "$1=$2: must be a whole number of at least $3"
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
    "") fail "no command given: scripts/multi_node.sh train --pool ... --model ... --out ..." ;;
    -h | --help) sed -n '2,20s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) fail "$1: the engine's command comes first: scripts/multi_node.sh train $*" ;;
esac
NODES="${NODES:-1}" PORT="${PORT:-29400}" RESTARTS="${RESTARTS:-0}" RUN_ID="${RUN_ID:-lead-engine}"
whole NODES "$NODES" 1
whole PORT "$PORT" 1
whole RESTARTS "$RESTARTS" 0
[ -n "${HOST:-}" ] || [ "$NODES" -eq 1 ] || fail "HOST: must name one of the $NODES machines, the same on all of them"
HOST="${HOST:-127.0.0.1}"
if [ "$RESTARTS" -gt 0 ] && [[ " $* " != *" --resume "* ]]; then
    fail "RESTARTS=$RESTARTS: workers that are started again go on only with --resume; add it (a first start needs no checkpoint)"
fi
if [ -z "${PYTHON:-}" ]; then
    PYTHON="$root/.venv/bin/python"
    [ -x "$PYTHON" ] || PYTHON=python3
fi
command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON: not found"
command -v pgrep >/dev/null || fail "pgrep: not found; install procps"
if [ -z "${GPUS:-}" ]; then
    GPUS="$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')" || fail "PYTHON=$PYTHON: cannot import torch"
fi
whole GPUS "$GPUS" 1

rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$HOST:$PORT" --rdzv-id "$RUN_ID")
if [ -n "${NODE_RANK:-}" ]; then
    whole NODE_RANK "$NODE_RANK" 0
    rendezvous+=(--rdzv-conf "is_host=$([ "$NODE_RANK" -eq 0 ] && echo 1 || echo 0)")
fi
[ -z "${ADDRESS:-}" ] || rendezvous+=(--local-addr "$ADDRESS")
# torch 2.13's agents would hand restarted workers the store of the first attempt, in which the dead workers' addresses still stand.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

line=("$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$GPUS" "${rendezvous[@]}" --max-restarts "$RESTARTS"
    -m lead_engine "$@")
echo "$(hostname): $GPUS of $((NODES * GPUS)) processes; ${line[*]}"

# torchrun gives its workers 30 seconds after a signal and then kills them, and it would restart those that have ended for one. So it never
# sees the signal: the workers do, and torchrun is ended once they are gone.
stopped="" agent=""
stop() { # signal
    stopped="$1"
    [ -n "$agent" ] || return 0
    local workers
    workers="$(pgrep -P "$agent" || true)"
    if [ -z "$workers" ]; then # still at the rendezvous
        kill -TERM "$agent" 2>/dev/null || true
        return
    fi
    # shellcheck disable=SC2086 # several numbers
    kill -s "$1" $workers 2>/dev/null || true
    (
        # shellcheck disable=SC2086
        while kill -0 $workers 2>/dev/null; do sleep 0.2; done
        kill -TERM "$agent" 2>/dev/null || true
    ) &
}

trap 'stop TERM' TERM
trap 'stop USR1' USR1
"${line[@]}" &
agent=$!
[ -z "$stopped" ] || stop "$stopped"
status=0
wait "$agent" || status=$?
while kill -0 "$agent" 2>/dev/null; do # a trap ends a wait
    status=0
    wait "$agent" || status=$?
done
if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
    echo "$(hostname): ended for SIG$stopped; the same line with --resume goes on" >&2
    exit $((128 + $(kill -l "$stopped")))
fi
exit "$status"
