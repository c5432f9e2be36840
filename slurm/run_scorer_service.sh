#!/bin/bash
# The scorer service (alignment/scoring/README.md) on one GPU.
#
#   sbatch slurm/run_scorer_service.sh                                   # or with the site's settings:
#   bash slurm/submit.sh slurm/run_scorer_service.sh
#   REWARD_MODEL=models/r COST_MODEL=models/c MAX_LENGTH=1024 sbatch slurm/run_scorer_service.sh
#   SCORER_BIND=127.0.0.1 bash slurm/run_scorer_service.sh               # without SLURM, for this machine only
#
# Submit it from the repository root. The log says `Service will be available at http://<HOST>:8000`, or which port is free
# instead; jobs find it by themselves (--scorer_url auto), by EXPERIMENT_ID where that is set. It listens on all interfaces
# and asks for a token, which it writes for its owner alone into LOGS_DIR/scorer; SCORER_AUTH=none opens it to everybody.
# A scorer that dies is started again at once. At its time limit the job is queued again, so cancel it when nobody needs it:
# scancel JOB. Settings of the service: the environment, see its README.md; of the site: slurm/site.env.
#SBATCH --job-name=scorer_service
#SBATCH --output=logs/scorer_service_%j.log
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
begin_job
# Not the HOST of the environment: some shells set it to the name of the login node.
export HOST="${SCORER_BIND:-0.0.0.0}"
# The warning before the time limit ends the service as scancel does: it answers what it has, and goes.
stop_child() { kill -s TERM "$child" 2>/dev/null || true; }

for start in $(seq 0 "${MAX_RESTARTS:-20}"); do
    code=0
    began=$SECONDS
    run "${python[@]}" alignment/scoring/scorer_service.py "$@" || code=$?
    # 2: a setting is wrong. Soon after the start: it would only fail again.
    if [ -n "$received" ] || [ "$code" = 0 ] || [ "$code" = 2 ] || [ $((SECONDS - began)) -lt 10 ]; then break; fi
    echo "the scorer ended with exit code $code after $((SECONDS - began)) s, started again ($((start + 1)))" >&2
done
if [ "$code" = 0 ] && [ "$received" = USR1 ]; then code="$STOPPED"; fi
finish "$code"
