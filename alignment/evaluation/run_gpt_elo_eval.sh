#!/bin/bash
# Judged ratings of the classified models (gpt_elo_eval.py): of all in the data folder, unless --models names some.
#
#   export OPENAI_API_KEY=...                       # the job inherits it; it is never an argument
#   sbatch alignment/evaluation/run_gpt_elo_eval.sh
#   sbatch alignment/evaluation/run_gpt_elo_eval.sh --models Alpaca-7B ES-500 --max-prompts 50 --budget 5
#   bash alignment/evaluation/run_gpt_elo_eval.sh --dry-run        # without SLURM: what would it cost?
#
# Arguments go to the Python script and win over the ones below. Run it from the repository root. A job that was killed or
# requeued asks only for what is missing. OPENAI_BASE_URL names another endpoint; settings of the site: slurm/site.env.
#SBATCH --job-name=gpt_elo_eval
#SBATCH --output=logs/gpt_elo_eval_%j.log
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=16G
#SBATCH --time=6:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
begin_job
echo "judged ratings on $(uname -n)"
code=0
run "${python[@]}" alignment/evaluation/gpt_elo_eval.py \
    --max-prompts 200 \
    --concurrency 8 \
    "$@" || code=$?
finish "$code"
