#!/bin/bash
#SBATCH --job-name=agnews
#SBATCH --account=nlp
#SBATCH --partition=gpu
#SBATCH --chdir=/scratch/nlp/bridges
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --output=agnews-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Environments are not followed by the linter; a task expands its ranks itself.
# shellcheck disable=SC1091,SC2016

set -e
source .venv/bin/activate
set +e

echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}"

# A signal is handed on, as USR1: the run saves after the step it is in and ends with 0. bash runs a trap only between
# commands or inside `wait`: so the run is in the background, and a `wait` that a trap cut short is repeated.
asked=''
trap 'asked+=" USR1"; kill -USR1 "$!" 2>/dev/null' USR1
trap 'asked+=" TERM"; kill -USR1 "$!" 2>/dev/null' TERM
latentwire train --config run.toml --out runs/agnews --resume &
run=$!
until before=$asked; wait "$run"; status=$?; [ "$asked" = "$before" ]; do :; done

# A job that SLURM is ending (cancelled, or requeued by SLURM itself) is no longer RUNNING: a requeue would revive it.
if [ -n "$asked" ] && [ "$status" -eq 0 ] &&
    scontrol --oneliner show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
    echo "saved after$asked; asking for a requeue of job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" || status=$?
fi
exit "$status"
