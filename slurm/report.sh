#!/bin/bash
# Figures, comparison and report of an experiment, on a CPU.
#
#   sbatch slurm/report.sh alignment/outputs/experiments/NAME Alpaca-7B ES GRPO-0.01
#   bash slurm/report.sh FOLDER MODEL...                                # without SLURM
#
# FOLDER is one that submit_pipeline.sh filled: model_comparisons/ with the classified models, of which the first named is the
# one compared with, run folders es/ and grpo/*/, ratings/ratings.json. What is not there is left out.
#SBATCH --job-name=report
#SBATCH --output=logs/report_%j.log
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=16G
#SBATCH --time=1:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
show_head "$@"
begin_job
[ $# -ge 2 ] || fail "usage: report.sh FOLDER MODEL..."
folder="$1"
shift
[ -d "$folder/model_comparisons" ] || fail "$folder/model_comparisons is not there: name a folder that submit_pipeline.sh filled"
data=(--data-dir "$folder/model_comparisons")
figures="$folder/figures"
mkdir -p "$figures"

runs=()
labels=()
for run_folder in "$folder"/es "$folder"/grpo/*/; do
    if [ -f "$run_folder/metrics.jsonl" ]; then
        runs+=("${run_folder%/}")
        labels+=("$(basename "$run_folder")")
    fi
done
step() { # one script; a failure ends the job
    local code=0
    run "${python[@]}" "$@" || code=$?
    if [ "$code" != 0 ]; then finish "$code"; fi
}

step alignment/visualization/plot_reward_cost_grid.py "${data[@]}" --models "$@" --output "$figures/reward_cost_grid.png"
step alignment/visualization/plot_safety_ratios.py "${data[@]}" --models "$@" --output "$figures/safety_ratios.png"
if [ $# -ge 2 ]; then step alignment/evaluation/compare_models.py "$@" "${data[@]}"; fi
report=("${data[@]}" --models "$@" --title "$(basename "$folder")" --output "$folder/report.html")
if [ ${#runs[@]} -gt 0 ]; then
    # Iterations of ES and of GRPO are not alike: both are drawn over the number of scored answers.
    step alignment/visualization/plot_training_curves.py "${runs[@]}" --labels "${labels[@]}" --x samples \
        --output "$figures/training_curves.png"
    report+=(--runs "${runs[@]}" --labels "${labels[@]}")
fi
if [ -f "$folder/ratings/ratings.json" ]; then
    step alignment/visualization/plot_gpt_elo_figure.py --ratings "$folder/ratings/ratings.json" \
        --outfile "$figures/ratings.png"
    report+=(--ratings "$folder/ratings/ratings.json")
    if [ -f "$folder/ratings/judgments.jsonl" ]; then report+=(--judgments "$folder/ratings/judgments.jsonl"); fi
fi
step alignment/visualization/make_report.py "${report[@]}"
