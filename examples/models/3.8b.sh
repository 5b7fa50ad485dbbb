# shellcheck shell=bash disable=SC2034
# Student of 3.8B parameters (arXiv 2410.16215, Table 7; SwiGLU and the vocabulary of 151,552 give the size).
MODEL_ARGS=(
    --num-layers 28
    --hidden-size 3072
    --ffn-hidden-size 8192
    --num-attention-heads 24
    --group-query-attention
    --num-query-groups 8
    --untie-embeddings-and-output-weights
)
PARALLEL_ARGS=(--tensor-model-parallel-size 2 --sequence-parallel)
