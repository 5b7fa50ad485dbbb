# shellcheck shell=bash disable=SC2034
# Student of 670M parameters (arXiv 2410.16215, Table 7; SwiGLU and the vocabulary of 151,552 give the size).
MODEL_ARGS=(
    --num-layers 24
    --hidden-size 1024
    --ffn-hidden-size 4096
    --num-attention-heads 16
    --group-query-attention
    --num-query-groups 2
    --untie-embeddings-and-output-weights
)
PARALLEL_ARGS=(--tensor-model-parallel-size 1)
