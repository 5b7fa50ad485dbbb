# shellcheck shell=bash disable=SC2034
# Student of 1.9B parameters (arXiv 2410.16215, Table 7; SwiGLU and the vocabulary of 151,552 give the size).
MODEL_ARGS=(
    --num-layers 24
    --hidden-size 2048
    --ffn-hidden-size 6912
    --num-attention-heads 16
    --group-query-attention
    --num-query-groups 2
    --untie-embeddings-and-output-weights
)
PARALLEL_ARGS=(--tensor-model-parallel-size 1)
