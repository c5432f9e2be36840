#!/bin/bash
# Trains with Evolution Strategies on four GPUs, a process on each, through the scorer service.
#
#   sbatch slurm/train_accl_alignment_api.sh --policy_model_path models/alpaca-7b --experiment_dir runs/es1
#   sbatch --nodes=2 slurm/train_accl_alignment_api.sh ...                        # eight processes on two nodes
#   SCORER_HOST=node12 sbatch slurm/train_accl_alignment_api.sh ...               # instead of finding the scorer
#   bash slurm/train_accl_alignment_api.sh --policy_model_path ... --num_engines 4          # without SLURM
#   VENV=.venv-cluster sbatch slurm/train_accl_alignment_api.sh --engine vllm ...           # vLLM generates
#
# Arguments go to the Python script (--help lists them) and win over CONFIG_FILE (alignment/ES/es_alignment.yaml). Submit it
# from the repository root. Five minutes before the time limit the run saves and the job is queued again; a job that was
# killed, preempted or requeued goes on where its run was: to the same weights, whenever it is stopped. Settings of the site:
# slurm/site.env (`bash slurm/submit.sh slurm/train_accl_alignment_api.sh ...` gives sbatch those that it needs).
#SBATCH --job-name=es_alignment
#SBATCH --output=logs/es_alignment_%j.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=256G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
begin_job
config="${CONFIG_FILE:-alignment/ES/es_alignment.yaml}"
scorer_flag
wandb_flag

launcher=()
if in_job && [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    meeting_point
    # srun passes signals on to all processes. If one of them is killed, the others have --wait seconds to end.
    launcher=(srun --ntasks="$SLURM_NTASKS" --wait=120)
    # train_with_scorer.sh keeps one of the GPUs for the scorer; srun would show all of them.
    if [ -n "${TRAIN_GPUS:-}" ]; then launcher+=(env "CUDA_VISIBLE_DEVICES=$TRAIN_GPUS"); fi
fi
code=0
run "${launcher[@]}" "${python[@]}" alignment/ES/es-fine-tuning_alignment_accl_api.py \
    --config "$config" "${scorer[@]}" "${wandb[@]}" "$@" || code=$?
finish "$code"
