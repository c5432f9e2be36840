#!/bin/bash
# Trains with GRPO on four GPUs, one value of beta an array task.
#
#   sbatch alignment/GRPO/run_grpo_alignment.sh --model_name MODEL
#   BETAS="0.01 0.03 0.1" sbatch --array=0-2 alignment/GRPO/run_grpo_alignment.sh ...
#   sbatch --nodes=2 alignment/GRPO/run_grpo_alignment.sh ...                                      # eight GPUs, two nodes
#   ACCELERATE_CONFIG=alignment/GRPO/accelerate_1gpu.yaml sbatch --gpus-per-node=1 alignment/GRPO/run_grpo_alignment.sh \
#       --lora_rank 16 --per_device_train_batch_size 15 ...
#   BETA=0.1 bash alignment/GRPO/run_grpo_alignment.sh ...                                         # without SLURM
#
# Further arguments go to train_grpo_alignment.py and win over the file (--output_dir and --beta are the settings below).
# Submit it from the repository root. The runs are OUTPUT_DIR/beta_<value>, so that a task that was killed, preempted or
# requeued goes on where its run was; five minutes before the time limit (a step must end, and optimiser states of 7B weights
# take their time) the run saves and the task is queued again. Settings, from the environment:
#   BETAS               values of beta, one an array task      0.01 0.1
#   CONFIG_FILE         settings of the runs                   alignment/GRPO/grpo_alignment.yaml
#   ACCELERATE_CONFIG   GPUs and how they share the model      alignment/GRPO/accelerate_4gpu_zero2.yaml
#                       torchrun: PROCESSES (1) processes a node without a file, on CPUs too
#   OUTPUT_DIR          folder of the runs                     alignment/outputs/grpo
#   SCORER_URL, SCORER_HOST  where the scorer is not to be found by itself (and no --scorer_url is given)
#   SEED                42
#SBATCH --job-name=grpo_alignment
#SBATCH --output=logs/grpo_alignment_%A_%a.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=256G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --array=0-1
[ -f slurm/common.sh ] || { echo "error: run this from the repository root (now in $PWD)" >&2; exit 2; }
. slurm/common.sh
show_head "$@"
begin_job

# The warning before the time limit goes to the run's folder, which is known here.
for argument in "$@"; do
    case "$argument" in
    --output[_-]dir | --output[_-]dir=*) fail "${argument%%=*}: the run's folder is OUTPUT_DIR/beta_<value>: set OUTPUT_DIR" ;;
    --beta | --beta=*) fail "--beta: it names the run's folder: set BETAS, one value an array task, or BETA" ;;
    esac
done
read -r -a betas <<<"${BETAS:-0.01 0.1}"
task="${SLURM_ARRAY_TASK_ID:-0}"
if [ -z "${BETA:-}" ] && [ "$task" -ge "${#betas[@]}" ]; then
    fail "array task $task, but BETAS has ${#betas[@]} values (${betas[*]}): use --array=0-$((${#betas[@]} - 1))"
fi
beta="${BETA:-${betas[$task]}}"
folder="${OUTPUT_DIR:-alignment/outputs/grpo}/beta_${beta}"
config="${CONFIG_FILE:-alignment/GRPO/grpo_alignment.yaml}"
scorer_flag
wandb_flag

# The launcher keeps signals from the training processes; they look for this file after every step, batch of held-out
# answers and checkpoint. It is for this launch alone: another job may be at work in the folder, and refuse this one.
export LAUNCH_ID="${SLURM_JOB_ID:-$$}.${SLURM_RESTART_COUNT:-0}"
stop_child() {
    mkdir -p "$folder"
    touch "$folder/stop.$LAUNCH_ID"
}

nodes="${SLURM_JOB_NUM_NODES:-1}"
accelerate="${ACCELERATE_CONFIG:-alignment/GRPO/accelerate_4gpu_zero2.yaml}"
if [ "$accelerate" = torchrun ]; then
    launcher=("${python[@]}" -m torch.distributed.run --nproc_per_node "${PROCESSES:-1}")
else
    [ -f "$accelerate" ] || fail "ACCELERATE_CONFIG is $accelerate, which is not there"
    if grep -q '^distributed_type: *DEEPSPEED' "$accelerate" &&
        ! "${python[@]}" -c 'import sys; from importlib.util import find_spec; sys.exit(not find_spec("deepspeed"))'; then
        fail "$accelerate wants DeepSpeed, which is not installed (requirements-cluster.txt); without it, ACCELERATE_CONFIG is" \
            "alignment/GRPO/accelerate_1gpu.yaml, accelerate_4gpu_ddp.yaml or torchrun"
    fi
    launcher=("${python[@]}" -m accelerate.commands.launch --config_file "$accelerate")
fi
if [ "$nodes" -gt 1 ]; then
    meeting_point
    if [ "$accelerate" = torchrun ]; then
        each="${PROCESSES:-1}"
        launcher+=(--nnodes "$nodes" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --node_rank)
    else
        each="$(sed -n 's/^num_processes: *\([0-9]*\).*/\1/p' "$accelerate")"
        launcher+=(--num_machines "$nodes" --num_processes $((each * nodes)) --rdzv_backend static)
        launcher+=(--deepspeed_multinode_launcher standard) # also where a file leaves it out: srun starts the nodes
        launcher+=(--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --machine_rank)
    fi
    export EXPECTED_PROCESSES=$((each * nodes)) # a launcher that makes each node a run of its own is refused
    # One launcher a node; what it says first is the number of its node, which only srun's task knows.
    # shellcheck disable=SC2016 # expanded there
    launcher=(srun --ntasks="$nodes" --ntasks-per-node=1 --wait=120 bash -c 'exec "${@/#NODE_RANK/$SLURM_NODEID}"' bash
        "${launcher[@]}" NODE_RANK)
elif [ "$accelerate" = torchrun ]; then
    launcher+=(--standalone)
elif ! grep -qs '^main_process_port:' "$accelerate"; then
    launcher+=(--main_process_port "${MASTER_PORT:-0}") # 0: one that is free; two tasks on a node would race for 29500
fi

rm -f "$folder/stop.$LAUNCH_ID" # of an earlier process with this number, without SLURM
echo "beta ${beta}, run ${folder}"
code=0
run "${launcher[@]}" alignment/GRPO/train_grpo_alignment.py --config "$config" \
    --beta "$beta" --seed "${SEED:-42}" --output_dir "$folder" "${scorer[@]}" "${wandb[@]}" "$@" || code=$?
rm -f "$folder/stop.$LAUNCH_ID"
# Launchers lose the exit code; the file says that this launch saved and stopped, and why.
if grep -qs "\"launch\": \"$LAUNCH_ID\"" "$folder/stopped.json"; then
    what="stopped after step $(sed -n 's/.*"iteration": \([0-9]*\).*/\1/p' "$folder/stopped.json")"
    if grep -q "\"exit_code\": $PASSING" "$folder/stopped.json"; then finish "$PASSING" "$what"; fi
    if grep -q '"signal": "SIGTERM"' "$folder/stopped.json"; then finish "$TERMED" "$what"; fi
    if [ "$received" = USR1 ]; then finish "$STOPPED" "$what"; fi
fi
finish "$code"
