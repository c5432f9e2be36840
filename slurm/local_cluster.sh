#!/bin/bash
# A real SLURM on this one machine, to try the job scripts on: two nodes with pretended GPUs, the real sbatch and squeue.
#
#   bash slurm/local_cluster.sh start      installs what is missing (Debian's packages, as root), returns when jobs can run
#   bash slurm/local_cluster.sh status     its daemons and nodes; exit code 0 only when jobs can run
#   bash slurm/local_cluster.sh stop       cancels all jobs and ends its daemons
#
# It refuses to start where another SLURM is: a daemon, or an /etc/slurm/slurm.conf that this script did not write. Only
# processes whose ids it wrote down are ever ended. GPUs, CPUs and memory are counted, not enforced: a job gets
# CUDA_VISIBLE_DEVICES, and the real cores are shared by all. There is no accounting: `sacct` says so, and
# DIR/log/jobs.txt has a line for every job that ended.
#
# Settings: LOCAL_SLURM_DIR (/tmp/local-slurm-$USER), LOCAL_SLURM_PORT (6817, then one a node), LOCAL_SLURM_GPUS (8 a node),
# LOCAL_SLURM_REQUEUE_WAIT (seconds before a requeued job starts again: 5; 120 is SLURM's default),
# LOCAL_SLURM_KILL_WAIT (seconds from SIGTERM to SIGKILL: 10; 30 is SLURM's).
set -euo pipefail

dir="${LOCAL_SLURM_DIR:-/tmp/local-slurm-$(id -un)}"
port="${LOCAL_SLURM_PORT:-6817}"
gpus="${LOCAL_SLURM_GPUS:-8}"
nodes="node1 node2"
host="$(uname -n)"
host="${host%%.*}"
site_conf=/etc/slurm/slurm.conf
mark="# slurm/local_cluster.sh"
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export SLURM_CONF="$dir/slurm.conf"

fail() {
    echo "error: $*" >&2
    exit 1
}

# The process id of one of our daemons, if it runs: the number in the file may be another process's by now.
running() {
    local pid
    pid="$(cat "$dir/run/$1.pid" 2>/dev/null)" || return 1
    tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -Fqx "SLURM_CONF=$SLURM_CONF" || return 1
    echo "$pid"
}

daemons() {
    echo munged
    echo slurmctld
    # shellcheck disable=SC2086 # a list of words
    printf 'slurmd.%s\n' $nodes
}

# start_daemon NAME COMMAND...: the command puts itself into the background and writes DIR/run/NAME.pid.
start_daemon() {
    local name="$1" tries
    shift
    if running "$name" >/dev/null; then return; fi
    rm -f "$dir/run/$name.pid"
    # Descriptor 9 is the lock, which must not outlive this script.
    "$@" </dev/null >"$dir/log/$name.start" 2>&1 9>&- || fail "$name did not start: $(tail -n 1 "$dir/log/$name.start")"
    for tries in $(seq 100); do
        if running "$name" >/dev/null; then return; fi
        sleep 0.1
    done
    fail "$name did not start after $tries tries, see $dir/log"
}

end_daemon() {
    local pid tries
    if ! pid="$(running "$1")"; then return; fi
    kill -TERM "$pid" 2>/dev/null || true
    for tries in $(seq 100); do
        if [ ! -e "/proc/$pid" ]; then break; fi
        if [ "$tries" = 80 ]; then kill -KILL "$pid" 2>/dev/null || true; fi
        sleep 0.1
    done
    rm -f "$dir/run/$1.pid"
}

# Where the kernel's freezer can be used, slurmd finds and ends every process of a job with it, as clusters do.
freezer() {
    local mount probe
    mount="$(awk '$3 == "cgroup" && $2 ~ /\/freezer$/ {print $2; exit}' /proc/self/mounts)"
    probe="$mount/local-slurm-probe.$$"
    if [ -n "$mount" ] && mkdir "$probe" 2>/dev/null && rmdir "$probe"; then echo "$mount"; fi
}

refuse_other_clusters() {
    if [ -e "$site_conf" ] && ! head -n 1 "$site_conf" | grep -qF "$mark"; then
        fail "$site_conf is there: this machine belongs to a SLURM cluster, use that one"
    fi
    local comm
    for comm in /proc/[0-9]*/comm; do
        case "$(cat "$comm" 2>/dev/null)" in
        slurmctld | slurmd)
            comm="${comm#/proc/}"
            fail "a SLURM daemon runs here already (process ${comm%/comm}): use that cluster"
            ;;
        esac
    done
}

install_packages() {
    local wanted=()
    command -v munged >/dev/null || wanted+=(munge)
    command -v slurmctld >/dev/null || wanted+=(slurmctld)
    command -v slurmd >/dev/null || wanted+=(slurmd)
    command -v sbatch >/dev/null || wanted+=(slurm-client)
    if [ ${#wanted[@]} = 0 ]; then return; fi
    command -v apt-get >/dev/null || fail "${wanted[*]} not found, and no apt-get to install them with"
    echo "installing ${wanted[*]}"
    {
        DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 update &&
            DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "${wanted[@]}"
    } </dev/null >"$dir/log/apt.log" 2>&1 9>&- || fail "apt-get failed: $(tail -n 1 "$dir/log/apt.log") (all: $dir/log/apt.log)"
    # The packages may start a slurmd of their own where an init system runs; without a slurm.conf it ends at once.
}

write_configuration() {
    local mount track=linuxproc number=0 node index
    mount="$(freezer)"
    rm -f "$dir/cgroup.conf"
    if [ -n "$mount" ]; then
        track=cgroup
        printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=no "CgroupMountpoint=${mount%/*}" >"$dir/cgroup.conf"
    fi
    # slurmd wants a character device for each GPU.
    for index in $(seq 0 $((gpus - 1))); do ln -sfn /dev/null "$dir/dev/nvidia$index"; done
    printf '%s\n' AutoDetect=off "Name=gpu File=$dir/dev/nvidia[0-$((gpus - 1))]" >"$dir/gres.conf"
    {
        cat <<CONF
$mark wrote this; slurm/local_cluster.sh stop takes it away
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credential of its former start has expired.
AuthInfo=socket=$dir/munge/socket,cred_expire=${LOCAL_SLURM_REQUEUE_WAIT:-5}
CredType=cred/munge
MailProg=/bin/true
MpiDefault=none
StateSaveLocation=$dir/state/controller
SlurmdSpoolDir=$dir/state/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/$track
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
KillWait=${LOCAL_SLURM_KILL_WAIT:-10}
# Jobs that ended can be asked about for a day.
MinJobAge=86400
# Nodes may claim more than the machine has; a busy machine gets time.
SlurmdParameters=config_overrides
ReturnToService=2
MessageTimeout=60
BatchStartTimeout=120
SlurmdTimeout=600
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
GresTypes=gpu
CONF
        for node in $nodes; do
            number=$((number + 1))
            echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.1.$number Port=$((port + number)) Sockets=2" \
                "CoresPerSocket=64 ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:$gpus State=UNKNOWN"
        done
        echo "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
        echo "PartitionName=cpu Nodes=ALL Default=NO MaxTime=INFINITE State=UP"
    } >"$SLURM_CONF"
}

# Jobs look node names up, and the scorer publishes the machine's name.
write_hosts() {
    local number=0 node
    if ! getent hosts "$host" >/dev/null; then echo "127.0.0.1 $host $mark" >>/etc/hosts; fi
    for node in $nodes; do
        number=$((number + 1))
        if ! getent hosts "$node" >/dev/null; then echo "127.0.1.$number $node $mark" >>/etc/hosts; fi
    done
}

usable() {
    local name
    for name in $(daemons); do running "$name" >/dev/null || return 1; done
    ! sinfo -h -N -o %T 2>&1 | grep -Evq '^(idle|mixed|allocated|completing)$'
}

start() {
    local node until=$((SECONDS + 90))
    if usable; then
        echo "the local cluster runs already"
        return
    fi
    [ "$(id -u)" = 0 ] || fail "start needs root: it installs SLURM and runs its daemons"
    [ ${#dir} -le 60 ] || fail "LOCAL_SLURM_DIR is too long a path for the sockets in it: $dir"
    local name alive=no
    for name in $(daemons); do if running "$name" >/dev/null; then alive=yes; fi; done
    if [ "$alive" = no ]; then
        refuse_other_clusters
        install_packages
        rm -rf "$dir/state" # jobs of a cluster that was not stopped are gone with it
        mkdir -p "$dir/state/controller"
        write_configuration
    fi
    mkdir -p "$(dirname "$site_conf")"
    if [ ! -e "$site_conf" ]; then ln -sfn "$SLURM_CONF" "$site_conf"; fi
    write_hosts
    if [ ! -s "$dir/munge/key" ]; then
        mkdir -p "$dir/munge"
        chmod 711 "$dir/munge"
        (umask 377 && head -c 1024 /dev/urandom >"$dir/munge/key")
    fi
    start_daemon munged munged --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/run/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
    start_daemon slurmctld slurmctld -f "$SLURM_CONF"
    for node in $nodes; do start_daemon "slurmd.$node" slurmd -N "$node" -f "$SLURM_CONF"; done
    until usable; do
        if [ $SECONDS -ge $until ]; then fail "nodes are not ready: $(sinfo -h -N -o '%N %T' 2>&1 | paste -sd, -); logs: $dir/log"; fi
        for node in $(sinfo -h -N -o '%N %T' 2>/dev/null | awk '$2 ~ /^(down|drain)/ {print $1}'); do
            scontrol update nodename="$node" state=resume 2>/dev/null || true
        done
        sleep 0.3
    done
    echo "the local cluster is ready: $(sinfo -h -o '%D nodes, %G' | head -n 1); logs in $dir/log"
}

stop() {
    local name tries mount node
    if running slurmctld >/dev/null; then
        squeue -h -a -o %A 2>/dev/null | sort -u | xargs -r scancel --quiet 2>/dev/null || true
        for tries in $(seq 150); do # jobs get SIGTERM, and SIGKILL after KillWait
            if [ -z "$(squeue -h -a -o %A 2>/dev/null)" ]; then break; fi
            sleep 0.2
        done
        [ "$tries" -lt 150 ] || echo "some jobs did not end" >&2
    fi
    for name in $(daemons | tac); do end_daemon "$name"; done
    if [ "$(readlink "$site_conf" 2>/dev/null)" = "$SLURM_CONF" ]; then rm -f "$site_conf"; fi
    if grep -qF "$mark" /etc/hosts; then # the file may be a mount: its content is replaced, not the file
        local rest
        rest="$(grep -vF "$mark" /etc/hosts || true)"
        printf '%s\n' "$rest" >/etc/hosts
    fi
    mount="$(freezer)"
    for node in $nodes; do
        if [ -n "$mount" ] && [ -d "$mount/slurm_$node" ]; then
            find "$mount/slurm_$node" -depth -type d -exec rmdir {} + 2>/dev/null || true
        fi
    done
    echo "the local cluster is stopped; logs are in $dir/log"
}

status() {
    local name pid
    for name in $(daemons); do
        if pid="$(running "$name")"; then echo "$name runs, process $pid"; else echo "$name does not run"; fi
    done
    usable || fail "jobs cannot run"
    sinfo
}

case "${1:-}" in
start | stop)
    mkdir -p "$dir/run" "$dir/log" "$dir/dev"
    exec 9>"$dir/lock"
    flock -w 300 9 || fail "another run of this script holds $dir/lock"
    "$1"
    ;;
status) status ;;
*)
    echo "usage: bash slurm/local_cluster.sh start|stop|status" >&2
    exit 2
    ;;
esac
