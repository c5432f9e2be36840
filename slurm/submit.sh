#!/bin/bash
# sbatch with the site's settings, after a check that costs nothing.
#
#   bash slurm/submit.sh [options of sbatch] SCRIPT [arguments of the script]
#   bash slurm/submit.sh slurm/run_scorer_service.sh
#   bash slurm/submit.sh --time=4:00:00 alignment/evaluation/classify_reward_cost_unified.sh
#
# slurm/site.env says account, partition, time and so on; options given here win over it. The number of array tasks follows
# sweep_configs.yaml (CONFIG_FILE) for classification and BETAS for GRPO, unless --array is given, which must then fit.
# What would fail in the queue is told here, in one line: a missing logs/ folder, a typo in site.env, an unknown partition.
set -euo pipefail
[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
load_site
activate

options=()
array=
while [ $# -gt 0 ] && [[ "$1" == -* ]]; do
    case "$1" in
    --array=*) array="${1#*=}" ;;
    --array | -a | -[A-Za-z]) fail "$1: write options of sbatch as --name=value" ;;
    esac
    options+=("$1")
    shift
done
[ $# -gt 0 ] || fail "usage: bash slurm/submit.sh [options of sbatch] SCRIPT [arguments of the script]"
script="$1"
[ -f "$script" ] || fail "$script is not there"
command -v sbatch >/dev/null || fail "sbatch not found: without SLURM, bash $script runs it here"
[ -d logs ] && [ -w logs ] || fail "no folder logs/ that can be written: SLURM would drop the job without a word (mkdir logs)"

site=()
add() { # shellcheck disable=SC2206 # each setting is several words
    site+=($1)
}
add "${ALL_SBATCH:-}"
if [ -n "${MAIL_USER:-}" ]; then site+=("--mail-user=$MAIL_USER" "--mail-type=${MAIL_TYPE:-FAIL,REQUEUE,END}"); fi
last=
case "$(basename "$script")" in
run_scorer_service.sh) add "${SCORER_SBATCH:-}" ;;
train_accl_alignment_api.sh) add "${ES_SBATCH:-}" ;;
train_with_scorer.sh) add "${JOINT_SBATCH:-}" ;;
run_grpo_alignment.sh)
    add "${GRPO_SBATCH:-}"
    last="$(($(wc -w <<<"${BETAS:-0.01 0.1}") - 1))"
    if [ -n "${BETA:-}" ]; then last=0; fi
    source="BETAS has $((last + 1)) values"
    ;;
classify_reward_cost_unified.sh)
    add "${CLASSIFY_SBATCH:-}"
    config="${CONFIG_FILE:-alignment/evaluation/sweep_configs.yaml}"
    last="$("${python[@]}" slurm/sweep_tasks.py last "$config")"
    source="$config has $((last + 1)) sweeps"
    if [ -n "${SWEEP:-}" ]; then
        last=0
        source="SWEEP is $SWEEP"
    fi
    ;;
*) add "${CPU_SBATCH:-}" ;;
esac
if [ -n "$last" ] && [ -n "$array" ]; then
    for index in $(grep -oE '(^|[,-])[0-9]+' <<<"${array%%%*}" | tr -d ',-'); do # not the step in 0-8:2, the limit in %2
        [ "$index" -le "$last" ] || fail "--array=$array: there is no task $index, $source: 0 to $last"
    done
elif [ -n "$last" ]; then
    site+=("--array=0-$last")
fi

if ! told="$(sbatch --test-only "${site[@]}" "${options[@]}" "$@" 2>&1)"; then
    problem="$(grep -m 1 'error: ' <<<"$told" || tail -n 1 <<<"$told")"
    fail "SLURM refuses $script: ${problem##*error: }"
fi
exec sbatch "${site[@]}" "${options[@]}" "$@"
