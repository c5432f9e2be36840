#!/bin/bash
# Is everything here that the jobs need? Says in plain words what is missing or refused, before anything is queued.
#
#   bash slurm/check_site.sh                          # the job scripts with slurm/site.env
#   bash slurm/check_site.sh slurm/pipeline.yaml      # and what this experiment needs; first:
#   cp slurm/pipeline.example.yaml slurm/pipeline.yaml
#
# Run it on a login node, from the repository root. Exit code 0: nothing is missing; 1: something is; 2: slurm/site.env or
# the experiment's file cannot be used.
set -euo pipefail
[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
load_site
activate
exec "${python[@]}" slurm/site_check.py "$@"
