#!/bin/bash
# Trains with GRPO on four GPUs, one value of beta an array task.
#
#   sbatch alignment/GRPO/run_grpo_alignment.sh --model_name MODEL --scorer_url http://HOST:8000
#   BETAS="0.01 0.03 0.1" sbatch --array=0-2 alignment/GRPO/run_grpo_alignment.sh ...
#   ACCELERATE_CONFIG=alignment/GRPO/accelerate_1gpu.yaml sbatch --gpus-per-node=1 alignment/GRPO/run_grpo_alignment.sh \
#       --lora_rank 16 --per_device_train_batch_size 15 ...
#   BETA=0.1 bash alignment/GRPO/run_grpo_alignment.sh ...                                         # without SLURM
#
# Further arguments go to train_grpo_alignment.py and win over the file. Submit it from the repository root. The runs are
# OUTPUT_DIR/beta_<value>, so that a task that was killed, preempted or requeued goes on where its run was; five minutes
# before the time limit the run saves and the task is queued again. Settings, from the environment or slurm/site.env:
#   BETAS               values of beta, one an array task      0.01 0.1
#   CONFIG_FILE         settings of the runs                   alignment/GRPO/grpo_alignment.yaml
#   ACCELERATE_CONFIG   GPUs and how they share the model      alignment/GRPO/accelerate_4gpu_zero2.yaml
#   OUTPUT_DIR          folder of the runs                     alignment/outputs/grpo
#   SCORER_URL          where no --scorer_url is given; SCORER_AUTH is the service's token
#   SEED, PYTHON        42, python; site.env can also activate an environment and set HF_HOME
# Account and partition: SBATCH_ACCOUNT, SBATCH_PARTITION in the environment.
#SBATCH --job-name=grpo_alignment
#SBATCH --output=logs/grpo_alignment_%A_%a.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=256G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --array=0-1
set -euo pipefail

if [ ! -f alignment/GRPO/train_grpo_alignment.py ]; then
    echo "error: run this from the repository root (now in $PWD)" >&2
    exit 2
fi
if [ -f slurm/site.env ]; then
    set -a
    # shellcheck source=/dev/null
    . slurm/site.env
    set +a
fi

read -r -a betas <<<"${BETAS:-0.01 0.1}"
task="${SLURM_ARRAY_TASK_ID:-0}"
if [ -z "${BETA:-}" ] && [ "$task" -ge "${#betas[@]}" ]; then
    echo "error: array task $task, but BETAS has ${#betas[@]} values (${betas[*]}): use --array=0-$((${#betas[@]} - 1))" >&2
    exit 2
fi
beta="${BETA:-${betas[$task]}}"
run="${OUTPUT_DIR:-alignment/outputs/grpo}/beta_${beta}"
scorer=()
if [ -n "${SCORER_URL:-}" ]; then
    scorer=(--scorer_url "$SCORER_URL")
fi

# The launcher keeps signals from the training processes; they look for this file after every step.
asked_to_stop=no
trap 'asked_to_stop=yes; mkdir -p "$run"; touch "$run/stop"' USR1 TERM

echo "beta ${beta}, run ${run}, on $(uname -n)"
"${PYTHON:-python}" -m accelerate.commands.launch \
    --config_file "${ACCELERATE_CONFIG:-alignment/GRPO/accelerate_4gpu_zero2.yaml}" \
    alignment/GRPO/train_grpo_alignment.py \
    --config "${CONFIG_FILE:-alignment/GRPO/grpo_alignment.yaml}" \
    --beta "$beta" --seed "${SEED:-42}" --output_dir "$run" "${scorer[@]}" "$@" &
launcher=$!
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do # a trapped signal ends `wait`, not the launcher
    code=0
    wait "$launcher" || code=$?
done

if [ "$asked_to_stop" = yes ] && [ -f "$run/stopped.json" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    echo "stopped after step $(sed -n 's/.*"iteration": \([0-9]*\).*/\1/p' "$run/stopped.json"), queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
