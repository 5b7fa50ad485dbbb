# Sourced by the launch scripts: torchrun over NODES machines.
#
#   NODES        machines (1)             GPUS_PER_NODE  processes on each (8)
#   NODE_RANK    this machine, 0 …        MASTER_ADDR    the first machine's address (localhost)
#   MASTER_PORT  (6000)                   DRY_RUN=1      print the command instead of running it
#
# The same variables serve by hand on each machine and under Slurm (see pretrain_gpt_pd.sbatch).
# SIGTERM goes to the training processes themselves: torchrun would kill them 30 s after it, and a
# checkpoint may take longer.
launch() {
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS-1}"
    local command=(
        torchrun
        --nnodes "${NODES:-1}" --nproc-per-node "${GPUS_PER_NODE:-8}"
        --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-6000}"
        "$@"
    )
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        printf '%q ' "${command[@]}"; echo
        return
    fi
    set -m  # a background command would ignore Ctrl-C otherwise
    "${command[@]}" &
    local torchrun=$!
    trap 'pkill -TERM -P "$torchrun" || kill -TERM "$torchrun"' TERM
    trap 'kill -INT "$torchrun"' INT
    while kill -0 "$torchrun" 2>/dev/null; do
        wait "$torchrun" || true  # a trap ends it early
    done
    wait "$torchrun"
}
