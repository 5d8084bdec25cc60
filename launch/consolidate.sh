#!/usr/bin/env bash
# Makes averages of a run as checkpoint files: offline, on the CPUs of one machine, with a process for each core. As a
# Slurm job, too: sbatch launch/consolidate.sh. Words are passed to phema synthesize.
#
#   RUN=s3://bucket/run OUT=averages SIGMA_RELS="0.05 0.10" launch/consolidate.sh --dtype bf16
#SBATCH --job-name=consolidate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail

: "${RUN:?must say where the averages live: a folder, or s3://bucket/run with AWS_* in the environment}"
: "${OUT:=${CHECKPOINTS:+$CHECKPOINTS/averages}}"
: "${OUT:?must name a folder for the averages, on this machine}"
: "${SIGMA_RELS:=0.10}" # several make a folder each, in one pass over the run
cores=$(nproc)
: "${NPROC:=$((cores < 16 ? cores : 16))}" # each takes about 600 MB
if [[ $NPROC == auto ]]; then NPROC=$((cores < 16 ? cores : 16)); fi

wanted=()
for sigma_rel in $SIGMA_RELS; do wanted+=(--sigma-rel "$sigma_rel"); done

export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
echo "consolidate.sh: makes averages of $RUN in $OUT, on $NPROC processes." >&2
exec torchrun --standalone --nproc-per-node "$NPROC" -m -- \
    phema_dist synthesize "$RUN" "${wanted[@]}" --out "$OUT" "$@"
