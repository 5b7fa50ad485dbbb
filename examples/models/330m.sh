# shellcheck shell=bash disable=SC2034
# Student of 330M parameters (arXiv 2410.16215, Table 7; SwiGLU and the vocabulary of 151,552 give the size).
MODEL_ARGS=(
    --num-layers 12
    --hidden-size 1024
    --ffn-hidden-size 4096
    --num-attention-heads 16
    --group-query-attention
    --num-query-groups 2
    # input and output embeddings are tied
)
PARALLEL_ARGS=(--tensor-model-parallel-size 1)
