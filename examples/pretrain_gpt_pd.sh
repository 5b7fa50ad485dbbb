#!/usr/bin/env bash
# Pre-train a student with PD* (KLD, top-0.95-50, τ = 2, α and learning rate on WSD schedules).
#
#   MODEL=1.9b DATA=/data/corpus TOKENIZER=/data/tokenizer SAVE=/ckpt/student-1.9b \
#       examples/pretrain_gpt_pd.sh [more Megatron or --pd-* flags]
#
# DATA is the prefix of a Megatron .bin/.idx corpus with its logit store DATA.pd beside it
# (examples/dump_teacher.sh makes it). Several machines: see launch.sh. On SIGTERM it saves a
# checkpoint and ends; run again, after any stop, it goes on from the last checkpoint.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/launch.sh"
source "$here/models/${MODEL:?one of 330m 670m 1.9b 3.8b 6.8b}.sh"

# 100B tokens in batches of 2048 x 4096, as in the paper; the schedules follow the paper's reported
# 10% warmup and 1% decay. The peak of 6e-4 is reported second-hand.
TRAIN_ITERS=${TRAIN_ITERS:-11921}
TRAINING_ARGS=(
    --seq-length 4096 --max-position-embeddings 4096
    --micro-batch-size "${MICRO_BATCH_SIZE:-1}" --global-batch-size "${GLOBAL_BATCH_SIZE:-2048}"
    --train-iters "$TRAIN_ITERS"
    --lr 6e-4 --min-lr 6e-5
    --lr-decay-style WSD --lr-wsd-decay-style cosine
    --lr-warmup-fraction 0.1 --lr-wsd-decay-iters "$((TRAIN_ITERS / 100))"
    # One mean over the batch's tokens; else each micro-batch's mean counts alike, however many of
    # its tokens have a loss.
    --calculate-per-token-loss
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --attention-dropout 0 --hidden-dropout 0
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --rotary-base 500000
    --init-method-std 0.02
)
DISTILLATION_ARGS=(
    --pd-recipe pd-star
    # The output layer's logits exist for 2048 tokens at a time, where that saves memory.
    --pd-loss-chunk-tokens auto
)
DATA_ARGS=(
    --data-path "${DATA:?prefix of the corpus}" --split "${SPLIT:-999,1,0}"
    --data-cache-path "${DATA_CACHE:-$DATA.cache}"
    --tokenizer-type "${TOKENIZER_TYPE:-HuggingFaceTokenizer}"
    --tokenizer-model "${TOKENIZER:?the tokenizer that the corpus was made with}"
    --no-create-attention-mask-in-dataloader --num-workers 4
)
OUTPUT_ARGS=(
    --save "${SAVE:?folder for checkpoints}" --load "$SAVE" --save-interval 500
    # Whatever TP, PP and DP the next run has, it can go on from such a checkpoint.
    --dist-ckpt-optim-fully-reshardable
    # SIGTERM: save a checkpoint after this iteration, then end.
    --exit-signal-handler
    --tensorboard-dir "$SAVE/tensorboard" --log-interval 10
    --eval-interval 500 --eval-iters 10
)
launch -m megatron_pd.pretrain \
    "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DISTILLATION_ARGS[@]}" \
    "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
