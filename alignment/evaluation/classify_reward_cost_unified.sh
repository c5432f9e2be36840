#!/bin/bash
# Classifies one model of a sweep file a task.
#
#   sbatch --array=0-2 alignment/evaluation/classify_reward_cost_unified.sh           # entries 0 to 2 of the file
#   CONFIG_FILE=my_sweeps.yaml sbatch alignment/evaluation/classify_reward_cost_unified.sh
#   SWEEP=ES-500 bash alignment/evaluation/classify_reward_cost_unified.sh            # without SLURM
#
# Further arguments go to the Python script and win over the file. Run it from the repository root. A task that was killed
# or requeued goes on where it stopped. Account and partition: SBATCH_ACCOUNT, SBATCH_PARTITION in the environment.
# slurm/site.env, where it exists, is read as shell settings: what activates the environment, HF_HOME, PYTHON.
#SBATCH --job-name=classify_reward_cost_unified
#SBATCH --output=logs/classify_reward_cost_unified_%A_%a.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=96G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --array=0
set -euo pipefail

if [ ! -f alignment/evaluation/classify_reward_cost_unified.py ]; then
    echo "error: run this from the repository root (now in $PWD)" >&2
    exit 2
fi
if [ -f slurm/site.env ]; then
    set -a
    # shellcheck source=/dev/null
    . slurm/site.env
    set +a
fi

sweep="${SLURM_ARRAY_TASK_ID:-${SWEEP:-0}}"
config="${CONFIG_FILE:-alignment/evaluation/sweep_configs.yaml}"
echo "sweep ${sweep} of ${config} on $(uname -n)"
exec "${PYTHON:-python}" alignment/evaluation/classify_reward_cost_unified.py --sweep "$sweep" --sweep_config "$config" "$@"
