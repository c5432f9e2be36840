#!/bin/bash
# The whole pipeline by sbatch, with tiny models on CPUs: `make demo-slurm`.
#
#   bash slurm/demo_slurm.sh
#
# Takes the SLURM that is there, or starts a local one (slurm/local_cluster.sh, as root) and stops it at the end. Submits
# slurm/demo.yaml, waits until no job is left, asks that all of them completed, runs the same once more without SLURM, and
# compares the results byte by byte. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
. slurm/common.sh
show_head "$@"
[ $# = 0 ] || fail "demo_slurm.sh takes no arguments (--help tells what it does)"
if ! sinfo >/dev/null 2>&1; then
    trap 'bash slurm/local_cluster.sh stop' EXIT
    bash slurm/local_cluster.sh start
    export SITE_ENV=/dev/null # the settings of another cluster
fi
load_site
activate

echo "== tiny models"
"${python[@]}" alignment/demo/build.py --output alignment/outputs/demo/models
results=alignment/outputs/demo_slurm
rm -rf "$results"
mkdir -p "$results" logs

echo "== all jobs, submitted at once"
began=$SECONDS
bash slurm/submit_pipeline.sh slurm/demo.yaml
mapfile -t jobs < <(grep -oE '"[0-9]+"' "$results/demo/jobs.json" | tr -d '"')
listed="$(IFS=, && echo "${jobs[*]}")"
shown=
while [ -n "$(squeue --noheader --jobs="$listed" 2>/dev/null)" ]; do
    states="$(squeue --noheader --array --jobs="$listed" --format='%j %K %T' 2>/dev/null | sort)"
    if [ "$states" != "$shown" ]; then
        bash slurm/status.sh slurm/demo.yaml
        shown="$states"
    fi
    if [ $((SECONDS - began)) -gt "${DEMO_LIMIT:-900}" ]; then
        scancel "${jobs[@]}"
        fail "not done after $((SECONDS - began)) s: see logs/"
    fi
    sleep 3
done
bash slurm/status.sh slurm/demo.yaml
for job in "${jobs[@]}"; do
    bad="$(scontrol --oneliner show job "$job" | grep -v 'JobState=COMPLETED' | grep -oE 'JobName=\S+|JobState=\S+' | paste -sd' ' || true)"
    [ -z "$bad" ] || fail "job $job did not complete: $bad"
done
echo "all jobs completed after $((SECONDS - began)) s"

echo "== the same without SLURM"
sed 's/^name: demo$/name: plain/' slurm/demo.yaml >"$results/plain.yaml"
bash slurm/submit_pipeline.sh "$results/plain.yaml" --local >"$results/plain.log" 2>&1 ||
    fail "the plain run failed: $(tail -n 1 "$results/plain.log") (all: $results/plain.log)"
compared=0
for file in "$results"/plain/{es,grpo/*}/final/model.safetensors "$results"/plain/{es,grpo/*}/eval/* \
    "$results"/plain/model_comparisons/*_points.jsonl "$results"/plain/ratings/ratings.json; do
    cmp "$file" "$results/demo/${file#"$results"/plain/}" || fail "the results differ"
    compared=$((compared + 1))
done
echo "$compared files (weights, held-out answers, classified answers, ratings) are the same with SLURM and without"
echo "report: $PWD/$results/demo/report.html"
