#!/bin/bash
# Where an experiment is: stages, states, steps, objective, safe ratio, the scorer's load, time left, last errors.
#
#   bash slurm/status.sh slurm/pipeline.yaml              # first: cp slurm/pipeline.example.yaml slurm/pipeline.yaml
#   bash slurm/status.sh slurm/pipeline.yaml --watch 30
set -euo pipefail
[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
load_site
activate
exec "${python[@]}" slurm/status.py "$@"
