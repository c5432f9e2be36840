#!/bin/bash
# Ends a scorer job that nobody needs any more. submit_pipeline.sh queues it behind all jobs that ask the scorer.
#
#   sbatch --dependency=afterany:13:14 slurm/stop_scorer.sh 12          or at once: bash slurm/stop_scorer.sh 12
#SBATCH --job-name=stop_scorer
#SBATCH --output=logs/stop_scorer_%j.log
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=500M
#SBATCH --time=10
#SBATCH --open-mode=append
set -euo pipefail
if ! [[ $# == 1 && $1 =~ ^[0-9]+$ ]]; then
    echo "error: usage: stop_scorer.sh JOB, the number of the scorer's job" >&2
    exit 2
fi
# A running scorer is asked to end, which completes its job; one that waits in the queue is cancelled.
scancel --signal=TERM --batch "$1" 2>/dev/null || true
for _ in $(seq 60); do
    state="$(squeue -h -j "$1" -o %T 2>/dev/null || true)"
    case "$state" in
    "") break ;;
    PENDING | REQUEUED | REQUEUE_HOLD) scancel "$1" ;;
    esac
    sleep 1
done
if [ -n "$state" ]; then scancel "$1"; fi
echo "scorer job $1 is stopped"
