#!/usr/bin/env bash
# The batch script on a real Slurm of two nodes, on this one machine: a run that is preempted in the
# middle, queued again and finished has the losses of an unbroken one, to the last bit.
#
#   apt-get install slurmctld slurmd slurm-client munge        (Debian; as root, in a container, say)
#   tools/slurm_trial.sh FOLDER
#
# FOLDER gets Slurm's files, a corpus with its logit store, two runs and their logs. Slurm has its own
# configuration and ports, and ends with the script. It takes five minutes of two cores; no GPU.
# docs/clusters.md has what it printed.
set -euo pipefail
folder=$(realpath -m "${1:?folder for all that is written}")
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$folder/slurm"
cd "$folder"

export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} MEGATRON_PD_DEVICE=cpu OMP_NUM_THREADS=1
export SLURM_CONF=$folder/slurm.conf

# --- Slurm: a slurmctld, two slurmd with a "GPU" each, a partition that preempts the other ----------
start_slurm() {
    local host cpus
    host=$(hostname -s) cpus=$(nproc)
    cat >slurm.conf <<EOF
ClusterName=trial
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/slurm
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdSpoolDir=$folder/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16821 CPUs=$cpus Gres=gpu:1
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16822 CPUs=$cpus Gres=gpu:1
PartitionName=train Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=n1,n2 PriorityTier=9 PreemptMode=OFF
EOF
    echo "Name=gpu File=/dev/null" >gres.conf # a GPU wants a device; nothing opens it
    [[ -f munge.key ]] || head -c 1024 /dev/urandom >munge.key
    chmod 600 munge.key
    munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" \
        --pid-file "$folder/munge.pid" --log-file "$folder/munge.log" --seed-file "$folder/munge.seed"
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
}

stop_slurm() {
    local pid
    for pid in slurmctld slurmd-n1 slurmd-n2 munge; do
        [[ ! -f "$pid.pid" ]] || kill "$(<"$pid.pid")" 2>/dev/null || true
    done
}

# --- a corpus of Python's own sources, a teacher of 30 iterations, its logits -----------------------
SMALL="--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 128 --max-position-embeddings 128 --micro-batch-size 4 --global-batch-size 32
    --eval-iters 0 --log-interval 1 --num-workers 1 --lr 3e-3 --min-lr 3e-4"
export TOKENIZER=$folder/tokenizer.model TOKENIZER_TYPE=SentencePieceTokenizer DATA=$folder/corpus
export SPLIT=100,0,0 MODEL=330m GPUS_PER_NODE=1 MASTER_ADDR=localhost EXTRA_ARGS=${SMALL//$'\n'/ }

make_store() {
    local library
    library=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    python -m megatron_pd.cli train-tokenizer --input "$library"/[a-d]*.py --output "$TOKENIZER" \
        --vocab-size 1024
    python -m megatron_pd.cli preprocess --input "$library"/[a-d]*.py --output-prefix "$DATA" \
        --tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER"
    RECIPE=lm SAVE=$folder/teacher "$repository/examples/pretrain_gpt_pd.sh" \
        --train-iters 30 --lr-wsd-decay-iters 3
    TEACHER=$folder/teacher EXTRA_ARGS="" "$repository/examples/dump_teacher.sh"
}

# --- the jobs --------------------------------------------------------------------------------------
submit() { # NAME of the run; prints the job's number
    SAVE=$folder/$1 sbatch --parsable --job-name "$1" --nodes 2 --gpus-per-node 1 \
        --output "$folder/%x-%j.log" "$repository/examples/pretrain_gpt_pd.sbatch"
}

wait_for() { # a command that becomes true within five minutes
    local second
    for ((second = 0; second < 300; second++)); do
        ! "$@" || return 0
        sleep 1
    done
    echo "error: $* didn't come true in 300 s; see $folder." >&2
    return 1
}

has_iteration() { grep -qs " iteration *$2/" "$1"; }                # LOG ITERATION
is_done() { grep -qs "saved at iteration $TRAIN_ITERS of" "$1"; } # LOG
event() { echo "$(date +%T) $*"; }

trap stop_slurm EXIT
start_slurm
[[ -d "$DATA.pd" ]] || make_store >make_store.log 2>&1
wait_for sinfo -h >/dev/null
sinfo
export TRAIN_ITERS=200

job=$(submit unbroken)
event "the unbroken run is job $job"
wait_for is_done "unbroken-$job.log"

job=$(submit preempted)
event "the run to be preempted is job $job"
wait_for has_iteration "preempted-$job.log" 60
urgent=$(sbatch --parsable --partition urgent --nodes 2 --exclusive --job-name urgent \
    --output urgent.log --wrap "sleep 10")
event "iteration 60: job $urgent takes both nodes"
wait_for grep -qs "exiting program after receiving SIGTERM" "preempted-$job.log"
event "the run has saved a checkpoint at iteration $(<preempted/latest_checkpointed_iteration.txt)"
wait_for is_done "preempted-$job.log"
event "done"
squeue

grep -E "SIGTERM|queued again|: done|successfully loaded" "preempted-$job.log"
python - unbroken preempted <<'END'
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

curves = []
for run in sys.argv[1:]:
    events = EventAccumulator(f"{run}/tensorboard", size_guidance={"scalars": 0})
    events.Reload()
    curves.append({tag: {event.step: event.value for event in events.Scalars(tag)}
                   for tag in ("lm loss", "kd loss", "grad-norm")})
whole, broken = curves
for tag, values in whole.items():
    differ = sum(values[step] != broken[tag].get(step) for step in values)
    last = max(values)
    print(f"{tag}: {len(values)} and {len(broken[tag])} iterations, {differ} differ; the last "
          f"{values[last]:.6f} and {broken[tag][last]:.6f}")
    assert len(values) == 200 and not differ
END
