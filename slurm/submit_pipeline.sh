#!/bin/bash
# Submits a whole experiment: scorer, ES, GRPO for each beta, classification, ratings, figures and report.
#
#   bash slurm/submit_pipeline.sh slurm/pipeline.yaml             # first: cp slurm/pipeline.example.yaml slurm/pipeline.yaml
#   bash slurm/submit_pipeline.sh slurm/pipeline.yaml --dry-run   # the plan and every command, nothing submitted
#   bash slurm/submit_pipeline.sh slurm/pipeline.yaml --local     # without SLURM: here, one after the other
#
# Prints the jobs and what each waits for. The same command again submits only what has neither a result nor a job, so it is
# also the way to go on after a failure. The scorer is stopped when no job needs it any more. Run it from the repository root.
set -euo pipefail
[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
load_site
activate
exec "${python[@]}" slurm/pipeline.py "$@"
