# shellcheck shell=bash
# Sourced by the launch scripts: torchrun over NODES machines.
#
#   NODES        machines (1)             GPUS_PER_NODE  processes on each (8)
#   NODE_RANK    this machine, 0 …        MASTER_ADDR    the first machine's address (localhost)
#   MASTER_PORT  (6000)                   DRY_RUN=1      print the command instead of running it
#   EXTRA_ARGS   more flags, by spaces, before those of the command line: the last of a flag counts
#
# The same variables serve by hand on each machine and under Slurm (see pretrain_gpt_pd.sbatch). What
# is set in the environment is left as it is (docs/clusters.md).
# SIGTERM saves a checkpoint and ends the run. torchrun would kill the training processes 30 s after
# it, and the processes that read data and write checkpoints would die of it, which Slurm sends to all
# of them alike. So all ignore it but the training processes, where Megatron listens to it from its
# first iteration on; while they start it has no effect.

# stop SENTENCE: end with it, before anything is started.
stop() {
    echo "error: $*" >&2
    exit 2
}

# --help: the comment that a launch script begins with, and launch.sh's variables.
show_help_if_asked() { # SCRIPT, then its arguments
    local script=$1 word
    shift
    for word in "$@"; do
        case $word in -h | --help)
            sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//p}' "$script"
            printf '\nOn several machines:\n\n'
            sed -n '4,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        esac
    done
}

# Sets MODEL_ARGS and PARALLEL_ARGS by the size's name.
read_model() { # MODEL
    local sizes="330m 670m 1.9b 3.8b 6.8b 13b"
    [[ -n "$1" ]] || stop "MODEL is not set: one of $sizes."
    local file
    file=$(dirname "${BASH_SOURCE[0]}")/models/$1.sh
    [[ -f "$file" ]] || stop "MODEL=$1 is none of $sizes, nor is there $file for it."
    # shellcheck source=examples/models/1.9b.sh
    source "$file"
}

need() { # NAME, what it is
    [[ -n "${!1:-}" ]] || stop "$1 is not set: $2."
}

# shellcheck disable=SC2034 # of the scripts
read -r -a EXTRA <<<"${EXTRA_ARGS:-}"

launch() { # the arguments of torchrun's command
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS-1}"
    # torchrun's --signals-to-handle, by the variable that torch before 2.10 doesn't look at.
    export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE-SIGINT,SIGHUP,SIGQUIT}"
    local command=(
        torchrun
        --nnodes "${NODES:-1}" --nproc-per-node "${GPUS_PER_NODE:-8}"
        --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-6000}"
        "$@"
    )
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    set -m # a background command would ignore Ctrl-C otherwise
    (
        trap '' TERM
        exec "${command[@]}"
    ) &
    local torchrun=$!
    # shellcheck disable=SC2064 # the process of this launch is meant
    trap "pkill -TERM -P $torchrun || true" TERM
    # shellcheck disable=SC2064
    trap "kill -INT $torchrun" INT
    while kill -0 "$torchrun" 2>/dev/null; do
        wait "$torchrun" || true # a trap ends it early
    done
    wait "$torchrun"
}
