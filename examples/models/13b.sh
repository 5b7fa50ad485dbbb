# shellcheck shell=bash disable=SC2034
# Student of 13B parameters, beyond the paper's sizes: Llama 2 13B with grouped queries and the paper's vocabulary.
MODEL_ARGS=(
    --num-layers 40
    --hidden-size 5120
    --ffn-hidden-size 13824
    --num-attention-heads 40
    --group-query-attention
    --num-query-groups 8
    --untie-embeddings-and-output-weights
)
PARALLEL_ARGS=(--tensor-model-parallel-size 8 --sequence-parallel)
