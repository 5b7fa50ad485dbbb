#!/usr/bin/env bash
# Write the logit store DATA.pd of a corpus: a Megatron teacher checkpoint over all its documents.
#
#   TEACHER=/ckpt/teacher DATA=/data/corpus examples/dump_teacher.sh [more flags]
#
# Architecture and tokenizer come from the checkpoint. Each model replica writes shards of its own;
# stopped at any moment, run it again (on any number of machines, see launch.sh) and it goes on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/launch.sh"
launch -m megatron_pd.cli dump \
    --load "${TEACHER:?checkpoint folder}" --data-path "${DATA:?prefix of the corpus}" \
    --tensor-model-parallel-size "${TENSOR_PARALLEL:-1}" \
    --micro-batch-size "${MICRO_BATCH_SIZE:-8}" --bf16 \
    --dump-top-p 0.95 --dump-top-k 100 "$@"
