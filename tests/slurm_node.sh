#!/usr/bin/env bash
# A SLURM cluster of one machine, for the tests: `slurm_node.sh` as root on Debian or Ubuntu, in seconds; `slurm_node.sh stop` ends it.
#
# It installs slurm-wlm and munge where they are missing, and runs the daemons without systemd: one for each of three nodes, which are this
# machine with 2 cores: tnt1 and tnt2 with 2 made-up GPUs each, tnt3 without. Of their partitions `urgent` preempts `main`, and tnt3 is
# `cpu`; jobs that are preempted are requeued; no accounting, as on many small clusters. It refuses to touch a SLURM that it has not set up.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

etc=/etc/slurm
mark="# by tests/slurm_node.sh"
state=/var/lib/slurm-node
nodes="tnt1 tnt2 tnt3"

stop() { # $1: a daemon's program, $2: its pid file
    local pid
    pid=$(cat "$state/$2.pid" 2>/dev/null) || return 0
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] || return 0
    kill "$pid"
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
}

[ "$(id -u)" = 0 ] || { echo "slurm_node.sh: to be run as root" >&2; exit 3; }
if [ -e "$etc/slurm.conf" ] && ! head -1 "$etc/slurm.conf" | grep -qxF "$mark"; then
    echo "slurm_node.sh: $etc/slurm.conf is of another cluster, which stays as it is" >&2
    exit 3
fi
if [ "${1:-}" = stop ]; then
    for node in $nodes; do stop slurmd "slurmd-$node"; done
    stop slurmctld slurmctld
    stop munged munged
    exit 0
fi
up() {
    [ "$(sinfo --noheader --Node --responding --states="$1" --format=%N 2>/dev/null | sort -u | wc -l)" = 3 ]
}
! up idle,alloc,mix,comp || exit 0
missing() { # of programs: `command -v` of several is content with one
    local program
    for program in "$@"; do command -v "$program" >/dev/null || return 0; done
    return 1
}
if missing slurmctld slurmd munged srun; then
    # Their own start-up scripts would start them as a cluster that they are not.
    policy=/usr/sbin/policy-rc.d
    [ -e $policy ] || { trap 'rm -f $policy' EXIT; printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy; }
    install="apt-get install -y -qq --no-install-recommends slurm-wlm munge"
    $install >/dev/null 2>&1 || { apt-get update -qq >/dev/null 2>&1 || true; $install >/dev/null; }
fi

host=$(hostname -s)
memory=$(awk '/^MemTotal:/ {print int($2 / 2048)}' /proc/meminfo)
grep -q "$nodes" /etc/hosts || echo "127.0.0.1 $nodes $mark" >>/etc/hosts
mkdir -p "$etc" "$state" "$state/spool" "$state/ctld" /run/munge /var/log/munge /var/lib/munge
[ -e /etc/munge/munge.key ] || { mkdir -p /etc/munge && head -c 1024 /dev/urandom >/etc/munge/munge.key; }
chown -R munge: /etc/munge /run/munge /var/log/munge /var/lib/munge
chmod 400 /etc/munge/munge.key
chmod 755 /run/munge "$state"
for n in 0 1 2 3; do # GPUs of which only the names are there; without a device file the node would be invalid
    [ -e "$state/gpu$n" ] || mknod "$state/gpu$n" c 1 3
done
cat >"$etc/gres.conf" <<CONF
NodeName=tnt1 Name=gpu File=$state/gpu[0-1]
NodeName=tnt2 Name=gpu File=$state/gpu[2-3]
CONF
cat >"$etc/slurm.conf" <<CONF
$mark
ClusterName=one
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/spool/%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
NodeName=tnt1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=$memory Gres=gpu:2 State=UNKNOWN
NodeName=tnt2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=$memory Gres=gpu:2 State=UNKNOWN
NodeName=tnt3 NodeHostname=$host NodeAddr=127.0.0.1 Port=17003 CPUs=2 RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=tnt[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=cpu Nodes=tnt3 MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=tnt[1-2] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF

for node in $nodes; do stop slurmd "slurmd-$node"; done
stop slurmctld slurmctld
pgrep -x munged >/dev/null || { runuser -u munge -- /usr/sbin/munged && cp /run/munge/munged.pid "$state/munged.pid"; }
slurmctld -c # without the jobs of another time
for node in $nodes; do mkdir -p "$state/spool/$node" && slurmd -N "$node"; done
for _ in $(seq 100); do
    ! up idle || exit 0
    sleep 0.1
done
echo "slurm_node.sh: the nodes do not come up: $(tail -n 3 "$state"/*.log 2>&1)" >&2
exit 1
