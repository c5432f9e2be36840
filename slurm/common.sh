# shellcheck shell=bash
# What the job scripts share. They source it from the repository root, after their #SBATCH lines:
#
#   . slurm/common.sh
#   begin_job                                    settings of the site, the environment, a line about this start
#   run "${python[@]}" script.py ... || code=$?  signals reach it at once
#   finish "$code"                               queued again if it saved and stopped at SLURM's warning
#
# How a job survives. Before the time limit, SLURM sends USR1 to the script (#SBATCH --signal=B:USR1@300). It is passed on;
# the trainer saves and ends with 128 + USR1; the script then queues its own job again, MAX_RESTARTS times at most, and the
# same command goes on where the run was. So it does after exit code 75: the scorer stayed away. TERM is passed on too: it
# comes from scancel, which ends the job (also while it saves), and from preemption, after which SLURM itself queues the job
# again (#SBATCH --requeue); with a grace time srun's tasks get TERM first, and the script then queues the job again. `run`
# waits in the background, because bash runs no trap while it waits for a command in the foreground.

STOPPED=138 # 128 + SIGUSR1: saved and stopped, as the trainers say; also what is left of a script that a USR1 ended
TERMED=143  # 128 + SIGTERM
PASSING=75  # no scorer answered for long; all is saved (alignment/errors.py)

# What says what a job does; a site file that exports one of these for other programs does not win over the job's own.
JOB_SETTINGS="BETA BETAS CONFIG_FILE EXPERIMENT_ID FORCE OUTPUT_DIR PROCESSES SCORER_HOST SCORER_JOB_ID SCORER_URL SEED SWEEP"

fail() {
    echo "error: $*" >&2
    exit 2
}

# show_head "$@": with --help, prints the comment at the script's head and ends. For scripts that do more than hand their
# arguments to one Python script, which has a --help of its own.
show_head() {
    case "${1:-}" in -h | --help) ;; *) return 0 ;; esac
    sed -n -e 1d -e '/^#SBATCH/d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
    exit 0
}

in_job() { [ -n "${SLURM_JOB_ID:-}" ]; }

# The names that a site settings file may assign: those in the example, which shows all of them.
site_names() { sed -nE 's/^#?([A-Z][A-Z0-9_]*)=.*/\1/p' slurm/site.env.example; }

# Reads SITE_ENV (slurm/site.env where it exists). What the environment says already wins over it.
load_site() {
    local file="${SITE_ENV:-slurm/site.env}" names line name problem
    if [ ! -e "$file" ]; then
        [ -z "${SITE_ENV:-}" ] || fail "SITE_ENV is $file, which is not there"
        return 0
    fi
    names=" $(site_names | tr '\n' ' ')"
    while IFS= read -r line; do
        name="${line#*:}"
        name="${name%%=*}"
        case "$names" in *" ${name// /} "*) ;; *)
            fail "$file, line ${line%%:*}: unknown setting ${name}$(nearest "${name// /}" "$names") (all: slurm/site.env.example;" \
                "for a variable of other programs write: export NAME=value)"
            ;;
        esac
        if [ "$name" != "${name// /}" ]; then fail "$file, line ${line%%:*}: no space before the = of ${name// /}"; fi
    done < <(grep -nE '^[A-Za-z_][A-Za-z0-9_]* *=' "$file")
    problem="$(bash -ec '. "$1"' bash "$(realpath "$file")" 2>&1 >/dev/null | tail -n 1; exit "${PIPESTATUS[0]}")" ||
        fail "$file: ${problem:-its last command failed: instead of 'test && command' write if}"

    local -A before=()
    for name in $names $JOB_SETTINGS; do
        if [ -n "${!name+set}" ]; then before[$name]="${!name}"; fi
    done
    set -a
    # shellcheck source=/dev/null
    . "$(realpath "$file")"
    set +a
    for name in "${!before[@]}"; do export "$name=${before[$name]}"; done
}

# nearest WORD "NAMES": "; did you mean NAME?" where a name is close and a python3 is at hand to say so.
nearest() {
    # shellcheck disable=SC2086 # a list of words
    python3 - "$1" $2 2>/dev/null <<'PYTHON' || true
import difflib, sys
for name in difflib.get_close_matches(sys.argv[1], sys.argv[2:], n=1):
    print(f"; did you mean {name}?", end="")
PYTHON
}

# Sets the array `python`: the interpreter of the site's environment, in its container if it has one.
activate() {
    set +eu # module files, conda's and venv's scripts are not made for these
    if [ -n "${MODULES:-}" ]; then
        # shellcheck disable=SC2086 # several names
        module load $MODULES || fail "MODULES: 'module load $MODULES' failed"
    fi
    if [ -n "${VENV:-}" ]; then
        # shellcheck source=/dev/null
        . "$VENV/bin/activate" || fail "VENV: $VENV/bin/activate cannot be read"
    fi
    if [ -n "${CONDA_ENV:-}" ]; then
        eval "$(conda shell.bash hook)"
        conda activate "$CONDA_ENV" || fail "CONDA_ENV: cannot activate $CONDA_ENV"
    fi
    set -eu
    local default=python
    if [ -z "${VENV:-}${CONDA_ENV:-}${CONTAINER:-}" ] && [ -x .venv/bin/python ]; then default=.venv/bin/python; fi
    python=("${PYTHON:-$default}")
    if [ -n "${CONTAINER:-}" ]; then
        local gpu=()
        if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then gpu=(--nv); fi
        # shellcheck disable=SC2206 # CONTAINER_FLAGS is several words
        python=("${CONTAINER_RUNTIME:-apptainer}" exec "${gpu[@]}" --bind "$PWD" ${CONTAINER_FLAGS:-} "$CONTAINER" "${python[@]}")
    fi
    command -v "${python[0]}" >/dev/null || fail "${python[0]} not found: make install, or name it in slurm/site.env"
    "${python[@]}" -c "import alignment" 2>/dev/null ||
        fail "${python[*]} does not know this project: make install, or VENV, CONDA_ENV or CONTAINER in slurm/site.env"
}

begin_job() {
    [ -f alignment/objective.py ] || fail "run this from the repository root (now in $PWD)"
    set -euo pipefail
    load_site
    activate
    export LOGS_DIR="${LOGS_DIR:-logs}"
    # srun of recent SLURM versions forgets the job's CPUs a task.
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
    received=
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM INT # what runs in the background of a script does not hear Ctrl-C
    if ! in_job; then return; fi
    local restarts="${SLURM_RESTART_COUNT:-0}"
    echo "== job $SLURM_JOB_ID (${SLURM_JOB_NAME:-}), start $((restarts + 1)), $(date '+%F %T')," \
        "on ${SLURM_JOB_NODELIST:-?}, GPUs ${CUDA_VISIBLE_DEVICES:-none}"
    if [ "$restarts" -gt "${MAX_RESTARTS:-20}" ]; then
        fail "queued again $restarts times, more than MAX_RESTARTS=${MAX_RESTARTS:-20}; submit it again to go on"
    fi
}

# A TERM after the warning is the time limit itself: the warning stays the reason, and the job is queued again.
on_signal() {
    if [ "$received" != USR1 ]; then received="$1"; fi
    interrupted=yes
    if [ -n "${child:-}" ]; then stop_child "$1"; fi
}

# How a signal reaches what runs; scripts whose launcher keeps signals to itself have their own.
stop_child() { kill -s "$1" "$child" 2>/dev/null || true; }

# Runs a command, hears signals meanwhile, and returns its exit code. What `wait` returns after a signal is the signal's, and
# the command may have ended by then: so it is asked again.
run() {
    local code
    "$@" &
    child=$!
    if [ -n "$received" ]; then stop_child "$received"; fi
    interrupted=yes
    while [ -n "$interrupted" ]; do
        interrupted=
        code=0
        wait "$child" || code=$?
    done
    child=
    return "$code"
}

# Whether a scorer will come: not when SLURM has no job that is the experiment's scorer. That of train_with_scorer.sh runs in
# the same job, and comes again with it.
scorer_may_come() {
    [ -z "${EXPERIMENT_ID:-}" ] || [ "${SCORER_JOB_ID:-}" = "$SLURM_JOB_ID" ] ||
        [ -n "$(squeue --noheader --me --name="scorer.$EXPERIMENT_ID,scorer_service" 2>&1)" ]
}

# The experiment's scorer, where it waits in SLURM's queue: what this job then waits for, without counting restarts meanwhile.
pending_scorer() {
    [ -n "${EXPERIMENT_ID:-}" ] || return 0
    squeue --noheader --me --name="scorer.$EXPERIMENT_ID" --states=PENDING,RUNNING --format="%T %i" 2>/dev/null |
        awk '$1 == "RUNNING" { runs = 1 } { id = $2 } END { if (id && !runs) print id }'
}

# finish CODE ["stopped after step 3"]: ends the script with the command's exit code; a job that saved and stopped at the
# warning, or because the scorer was away, is queued again instead.
finish() {
    local code="$1" what="${2:-stopped and saved}" restarts="${SLURM_RESTART_COUNT:-0}"
    in_job || exit "$code"
    # A TERM that came to the program alone, and not to this script, is the beginning of a preemption's grace time; one after
    # the warning is the time limit.
    if [ "$code" = "$TERMED" ] && [ "${received:-}" != TERM ]; then code="$STOPPED"; fi
    case "$code" in
    "$STOPPED") ;;
    "$PASSING")
        if [ "${received:-}" = TERM ]; then exit "$code"; fi
        if ! scorer_may_come; then
            echo "error: $what, and SLURM has no job of its scorer, scorer.$EXPERIMENT_ID: submit one, and this again" >&2
            exit "$code"
        fi
        what="$what for want of a scorer"
        ;;
    *) exit "$code" ;;
    esac
    if [ "$restarts" -ge "${MAX_RESTARTS:-20}" ]; then
        echo "error: $what; queued again $restarts times already (MAX_RESTARTS): submit it again to go on" >&2
        exit "$code"
    fi
    # Of an array, this task alone: the SLURM_JOB_ID of one of its tasks is the number of the whole array.
    local job="$SLURM_JOB_ID"
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"; fi
    # While it saved, scancel may have come. Its TERM looks like that of the time limit; SLURM knows which it was.
    case "$(scontrol show job "$job" 2>/dev/null)" in
    *Reason=TimeLimit*) ;;
    *JobState=CANCELLED* | *JobState=COMPLETING*)
        echo "$what, and cancelled: not queued again"
        exit "$code"
        ;;
    esac
    echo "$what, queued again"
    if ! scontrol requeue "$job"; then
        echo "error: $what, but SLURM does not queue this job again: submit it again to go on" >&2
        exit "$code"
    fi
    # A scorer that waits in the queue is not waited for on GPUs.
    if [ "$code" = "$PASSING" ]; then
        local until="starttime=now+${SCORER_PAUSE:-900}" scorer_job
        scorer_job="$(pending_scorer)"
        if [ -n "$scorer_job" ]; then until="dependency=after:$scorer_job"; fi
        scontrol update "jobid=$job" "$until" || true
    fi
    exit 0
}

# Sets the array `scorer` to a trainer's flag where the environment names an address: SCORER_URL; or, as published,
# SCORER_HOST (and SCORER_PORT). Otherwise arguments and settings file decide; their default is to find the scorer.
# shellcheck disable=SC2034 # the job scripts use it
scorer_flag() {
    scorer=()
    if [ -n "${SCORER_URL:-}" ]; then
        scorer=(--scorer_url "$SCORER_URL")
    elif [ -n "${SCORER_HOST:-}" ]; then
        scorer=(--scorer_url "http://$SCORER_HOST:${SCORER_PORT:-8000}")
    fi
}

# Sets the array `wandb` to the flag for a trainer. The run folder keeps the run's id, so a restart goes on in the same run.
# shellcheck disable=SC2034
wandb_flag() {
    wandb=()
    if [ -n "${WANDB_PROJECT:-}" ]; then wandb=(--wandb_project "$WANDB_PROJECT"); fi
}

# Sets MASTER_ADDR and MASTER_PORT for processes that meet: the job's first node, a port that other jobs do not take.
meeting_point() {
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    MASTER_PORT="${MASTER_PORT:-$((29400 + SLURM_JOB_ID % 1000))}"
    export MASTER_ADDR MASTER_PORT
}
