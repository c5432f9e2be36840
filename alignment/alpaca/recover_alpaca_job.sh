#!/bin/bash
# The recovery as a job: a CPU node is enough. Settings: see alignment/alpaca/recover_alpaca_full.sh.
#
#   sbatch alignment/alpaca/recover_alpaca_job.sh
#   DTYPE=bfloat16 sbatch alignment/alpaca/recover_alpaca_job.sh
#
# Submit it from the repository root. Where compute nodes have no network, run the download on a login node first:
#   python alignment/alpaca/download_models.py --models_dir DIR
# and submit with MODELS_DIR=DIR: the job sees that the folders are complete. A job that was killed or requeued goes on with
# the shard it was at. Settings of the site: slurm/site.env.
#SBATCH --job-name=recover_alpaca
#SBATCH --output=logs/recover_alpaca_%j.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
[ -f slurm/common.sh ] || { echo "error: submit this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
show_head "$@"
begin_job
echo "recovery on $(uname -n)"
code=0
run bash alignment/alpaca/recover_alpaca_full.sh "$@" || code=$?
finish "$code"
