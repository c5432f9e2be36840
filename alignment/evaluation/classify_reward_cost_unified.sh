#!/bin/bash
# Classifies one model of a sweep file a task.
#
#   bash slurm/submit.sh alignment/evaluation/classify_reward_cost_unified.sh         # all entries of the file
#   sbatch --array=0-2 alignment/evaluation/classify_reward_cost_unified.sh           # entries 0 to 2
#   CONFIG_FILE=my_sweeps.yaml bash slurm/submit.sh alignment/evaluation/classify_reward_cost_unified.sh
#   SWEEP=ES-500 sbatch alignment/evaluation/classify_reward_cost_unified.sh          # one, by its index or model_name
#   SWEEP=ES-500 bash alignment/evaluation/classify_reward_cost_unified.sh            # without SLURM
#
# Further arguments go to the Python script and win over the file. Run it from the repository root. A task that was killed
# or requeued goes on where it stopped. One whose results are there already, with the settings of now, ends at once, unless
# FORCE=1, which moves them to replaced/ first; so are answers of other settings, or of a policy that was trained further since,
# and made anew (slurm/sweep_tasks.py). Settings of the site: slurm/site.env.
#SBATCH --job-name=classify_reward_cost_unified
#SBATCH --output=logs/classify_reward_cost_unified_%A_%a.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=96G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --array=0
[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
begin_job
sweep="${SWEEP:-${SLURM_ARRAY_TASK_ID:-0}}"
# SWEEP wins over the script's own --array=0, but not over an array that was asked for.
if [ -n "${SWEEP:-}" ] && [ "${SLURM_ARRAY_TASK_ID:-0}:${SLURM_ARRAY_TASK_COUNT:-1}" != 0:1 ]; then
    fail "SWEEP is $SWEEP, and this is array task $SLURM_ARRAY_TASK_ID: give SWEEP or --array"
fi
config="${CONFIG_FILE:-alignment/evaluation/sweep_configs.yaml}"
code=0
"${python[@]}" slurm/sweep_tasks.py todo "$config" "$sweep" "$@" || code=$?
case "$code" in
0) ;;
3) exit 0 ;;
*) exit "$code" ;;
esac
echo "sweep ${sweep} of ${config}"
code=0
run "${python[@]}" alignment/evaluation/classify_reward_cost_unified.py --sweep "$sweep" --sweep_config "$config" "$@" ||
    code=$?
finish "$code"
