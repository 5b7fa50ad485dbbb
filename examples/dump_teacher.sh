#!/usr/bin/env bash
# Write the logit store DATA.pd of a corpus: a Megatron teacher checkpoint over all its documents.
#
#   TEACHER=/ckpt/teacher DATA=/data/corpus examples/dump_teacher.sh [more flags]
#
#   TEACHER      checkpoint folder: architecture and tokenizer come from it
#   DATA         prefix of the corpus
#   TENSOR_PARALLEL   ranks that share a teacher (1)     MICRO_BATCH_SIZE  sequences (8)
#
# Each model replica writes shards of its own; stopped at any moment, run it again (on any number of
# machines) and it goes on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=examples/launch.sh
source "$here/launch.sh"
show_help_if_asked "${BASH_SOURCE[0]}" "$@"
need TEACHER "the folder of the teacher's checkpoint"
need DATA "the prefix of the corpus"
launch -m megatron_pd.cli dump \
    --load "$TEACHER" --data-path "$DATA" \
    --tensor-model-parallel-size "${TENSOR_PARALLEL:-1}" \
    --micro-batch-size "${MICRO_BATCH_SIZE:-8}" --bf16 \
    --dump-top-p 0.95 --dump-top-k 100 "${EXTRA[@]}" "$@"
