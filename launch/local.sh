#!/usr/bin/env bash
# Trains on this machine, on every GPU or core, or on NPROC processes; then makes averages. Once stopped, by Ctrl-C,
# SIGTERM or SIGUSR1, the same command goes on. Words are passed to the training script.
#
#   RUN=runs/llm CHECKPOINTS=runs/llm-training launch/local.sh --steps 2000
set -euo pipefail

: "${RUN:?must say where the averages live: a folder, or s3://bucket/run with AWS_* in the environment}"
: "${CHECKPOINTS:?must name a folder for the training checkpoints}"
: "${SCRIPT:=examples/train_llm.py}"
: "${NPROC:=auto}"
: "${MAX_RESTARTS:=0}" # of crashed processes, from the newest training checkpoint
export RUN CHECKPOINTS
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}" # seconds to save in
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a restart finds the addresses of dead processes

bound=(env) # Linux kills with its parent what this starts, so that kill -9 leaves nothing running
if command -v setpriv >/dev/null; then bound=(setpriv --pdeathsig KILL); fi

"${bound[@]}" torchrun --standalone --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" \
    --signals-to-handle SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 --no-python \
    -- "${bound[@]}" python "$SCRIPT" --averages "$RUN" --checkpoints "$CHECKPOINTS" "$@" &
job=$!

# torchrun passes the signal to all processes, which save and end; it then fails itself. A second one would end it at
# once, so they get one only; and Ctrl-C, which reaches what runs in the background too, is ignored there.
signalled=
stop() {
    [[ $signalled ]] || kill -USR1 "$job" 2>/dev/null || true
    signalled=yes
}
trap stop USR1 TERM INT
status=0
wait "$job" || status=$?
while [[ $signalled ]] && kill -0 "$job" 2>/dev/null; do # the trap has ended that wait
    wait "$job" || true
done
if [[ $signalled ]]; then
    echo "local.sh: stopped by a signal; the same command goes on from the newest training checkpoint." >&2
    exit 130
fi
((status == 0)) || exit "$status"
exec "$(dirname "$(readlink -f "$0")")/consolidate.sh"
