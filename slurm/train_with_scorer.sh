#!/bin/bash
# One job with its own scorer: five GPUs of one node, the last for the scorer, the others for training. Four GPUs then never
# wait for a scorer that is still in the queue.
#
#   sbatch slurm/train_with_scorer.sh es --policy_model_path models/alpaca-7b --experiment_dir runs/es1
#   BETA=0.1 sbatch slurm/train_with_scorer.sh grpo --model_name models/alpaca-7b
#
# What follows the first word, and the environment, are as for slurm/train_accl_alignment_api.sh and
# alignment/GRPO/run_grpo_alignment.sh; the scorer's are those of slurm/run_scorer_service.sh, and its log is
# logs/scorer_service_<job>.log. Submit it from the repository root. If the scorer cannot be kept alive, training saves and
# the job ends; before the time limit, training saves and the job is queued again.
#SBATCH --job-name=train_with_scorer
#SBATCH --output=logs/train_with_scorer_%j.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=5
#SBATCH --cpus-per-task=8
#SBATCH --mem=320G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
begin_job
case "${1:-}" in
es) script=slurm/train_accl_alignment_api.sh ;;
grpo) script=alignment/GRPO/run_grpo_alignment.sh ;;
*) fail "say what trains: train_with_scorer.sh es|grpo [arguments of the training script]" ;;
esac
shift

# This training and this scorer find each other by these two, whatever else runs.
export EXPERIMENT_ID="train_with_scorer_${SLURM_JOB_ID:-$$}" SCORER_BIND=127.0.0.1
if in_job; then export SCORER_JOB_ID="$SLURM_JOB_ID"; fi
unset SCORER_URL SCORER_HOST

all_gpus="${CUDA_VISIBLE_DEVICES:-}"
scorer_gpu="${all_gpus##*,}"
if [ -n "$all_gpus" ]; then
    [ "$scorer_gpu" != "$all_gpus" ] || fail "there is one GPU only ($all_gpus), and training and scorer need one each"
    export CUDA_VISIBLE_DEVICES="${all_gpus%,*}"
    export TRAIN_GPUS="$CUDA_VISIBLE_DEVICES"
fi

log="logs/scorer_service_${SLURM_JOB_ID:-$$}.log"
if [ -n "$all_gpus" ]; then
    CUDA_VISIBLE_DEVICES="$scorer_gpu" bash slurm/run_scorer_service.sh >>"$log" 2>&1 &
else
    bash slurm/run_scorer_service.sh >>"$log" 2>&1 &
fi
scorer_process=$!
echo "GPUs for training: ${TRAIN_GPUS:-none}, for the scorer: ${scorer_gpu:-none}; its log: $log"
# Without a scorer, training would wait for ten minutes and then end with an error.
(
    while kill -0 "$scorer_process" 2>/dev/null; do sleep 2; done
    echo "error: the scorer has ended, see $log" >&2
    kill -s TERM $$
) &
watcher=$!

code=0
run bash "$script" "$@" || code=$?
kill "$watcher" 2>/dev/null || true
kill -s TERM "$scorer_process" 2>/dev/null || true
wait "$scorer_process" || true
exit "$code" # the training script has queued the job again where that is due
