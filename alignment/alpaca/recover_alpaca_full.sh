#!/bin/bash
# Downloads LLaMA-7B and the Alpaca difference, recovers Alpaca-7B and verifies it. A rerun passes over what is done.
#
#   bash alignment/alpaca/recover_alpaca_full.sh
#   DTYPE=bfloat16 MODELS_DIR=/scratch/me/alpaca bash alignment/alpaca/recover_alpaca_full.sh
#   BASE_MODEL=/path/to/llama-7b DIFF_MODEL=/path/to/alpaca-7b-wdiff bash alignment/alpaca/recover_alpaca_full.sh
#
# Run it from the repository root. The software (modules, environment, container) is that of slurm/site.env, as for every
# job. Settings, all from the environment (a site that wants others writes: export NAME="${NAME:-value}" in slurm/site.env):
#   BASE_MODEL, DIFF_MODEL        hub repository or local folder   (huggyllama/llama-7b, tatsu-lab/alpaca-7b-wdiff)
#   BASE_REVISION, DIFF_REVISION  commit, tag or branch            (the pinned commits)
#   MODELS_DIR                    where downloads go               (alignment/outputs/alpaca)
#   ALPACA_PATH                   the recovered model              (MODELS_DIR/alpaca-7b)
#   DTYPE                         float32, float16 or bfloat16     (float32, as published)
#   CHECK_INTEGRITY               published sum must agree         (true)
#   EXPECTED_SUM                  the sum, for another pair of models
#   REFERENCE_MANIFEST            recovery_manifest.json of a recovery known to be good
#   OVERWRITE                     replace ALPACA_PATH              (false)
#   VERIFY                        load it and ask it               (true)
#   VERIFY_DTYPE, VERIFY_DEVICE   how it is loaded for that        (bfloat16, cpu: 14 GB of memory)
#   EXPECT_ANSWER                 what the capital of France is    (Paris; empty: any answer)
#   HF_TOKEN, HF_HOME, HF_ENDPOINT  as the hub's library reads them
# Further arguments go to recover_alpaca_weights.py.
set -euo pipefail

[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
show_head "$@"
load_site
activate

base="${BASE_MODEL:-huggyllama/llama-7b}"
diff="${DIFF_MODEL:-tatsu-lab/alpaca-7b-wdiff}"
models_dir="${MODELS_DIR:-alignment/outputs/alpaca}"
alpaca="${ALPACA_PATH:-$models_dir/alpaca-7b}"
dtype="${DTYPE:-float32}"

# Where download_models.py leaves a model: a local folder stays where it is.
place() {
    if [ -d "$1" ]; then echo "$1"; else echo "$models_dir/${1##*/}"; fi
}

download=(--models_dir "$models_dir" --base "$base" --diff "$diff")
if [ -n "${BASE_REVISION:-}" ]; then download+=(--base_revision "$BASE_REVISION"); fi
if [ -n "${DIFF_REVISION:-}" ]; then download+=(--diff_revision "$DIFF_REVISION"); fi
recover=(--path_raw "$(place "$base")" --path_diff "$(place "$diff")" --path_tuned "$alpaca" --dtype "$dtype")
recover+=(--check_integrity_naively "${CHECK_INTEGRITY:-true}" --overwrite "${OVERWRITE:-false}")
if [ -n "${EXPECTED_SUM:-}" ]; then recover+=(--expected_sum "$EXPECTED_SUM"); fi
if [ -n "${REFERENCE_MANIFEST:-}" ]; then recover+=(--reference_manifest "$REFERENCE_MANIFEST"); fi
verify=(--model_path "$alpaca" --dtype "${VERIFY_DTYPE:-bfloat16}" --device "${VERIFY_DEVICE:-cpu}")
expected="${EXPECT_ANSWER-Paris}"
if [ -n "$expected" ]; then verify+=(--expect "$expected"); fi

echo "== 1. download"
"${python[@]}" alignment/alpaca/download_models.py "${download[@]}"
echo "== 2. recover"
"${python[@]}" alignment/alpaca/recover_alpaca_weights.py "${recover[@]}" "$@"
if [ "${VERIFY:-true}" = true ]; then
    echo "== 3. verify"
    "${python[@]}" alignment/alpaca/verify_alpaca.py "${verify[@]}"
fi
echo "Alpaca-7B is in $alpaca"
