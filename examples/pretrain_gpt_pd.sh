#!/usr/bin/env bash
# Pre-train a student, distilled or not, on corpora with their logit stores.
#
#   MODEL=1.9b DATA=/data/corpus TOKENIZER=/data/tokenizer SAVE=/ckpt/student-1.9b \
#       examples/pretrain_gpt_pd.sh [more Megatron or --pd-* flags]
#
#   MODEL        330m 670m 1.9b 3.8b 6.8b, the paper's Table 7, or 13b
#   DATA         prefix of a Megatron .bin/.idx corpus with its logit store DATA.pd beside it
#                (examples/dump_teacher.sh makes it), or a blend: "0.7 /data/web 0.3 /data/code"
#   TOKENIZER    what the corpus was made with (TOKENIZER_TYPE, HuggingFaceTokenizer)
#   SAVE         folder of the checkpoints
#   RECIPE       pd-star (default: KLD, top-0.95-50, τ = 2, α on a WSD schedule), robust, vanilla, or
#                lm: the LM loss alone on the same batches in the same order, without a store
#   TRAIN_ITERS  (11921: 100B tokens)     GLOBAL_BATCH_SIZE  sequences (2048)
#   SPLIT        (999,1,0)                MICRO_BATCH_SIZE   sequences (1)
#   SAVE_INTERVAL  iterations (500)       RETAIN_INTERVAL    of those that stay (4 x as many)
#   ASYNC_SAVE     0: training waits for its checkpoints
#   DATA_CACHE     folder of the sample index (beside the corpus)
#   EXIT_MINUTES   save and end after so many minutes
#   WANDB_PROJECT  log to Weights & Biases, too, as WANDB_NAME
#
# On SIGTERM it saves a checkpoint and ends; run again, after any stop, it goes on from the last
# checkpoint. docs/clusters.md has what to set for speed, Slurm and containers.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=examples/launch.sh
source "$here/launch.sh"
show_help_if_asked "${BASH_SOURCE[0]}" "$@"
read_model "${MODEL:-}"
need DATA "the prefix of the corpus, or a blend of weights and prefixes"
need TOKENIZER "the tokenizer that the corpus was made with"
need SAVE "the folder for checkpoints"
read -r -a blend <<<"$DATA"

# 100B tokens in batches of 2048 x 4096, as in the paper; the schedules follow the paper's reported
# 10% warmup and 1% decay. The peak of 6e-4 is reported second-hand.
TRAIN_ITERS=${TRAIN_ITERS:-11921}
decay=$((TRAIN_ITERS / 100))
((decay > 0)) || stop "TRAIN_ITERS=$TRAIN_ITERS leaves no iteration for the decay, which is the" \
    "last 1%: set 100 or more. For a short trial end with --train-iters and --lr-wsd-decay-iters."
TRAINING_ARGS=(
    --seq-length 4096 --max-position-embeddings 4096
    --micro-batch-size "${MICRO_BATCH_SIZE:-1}" --global-batch-size "${GLOBAL_BATCH_SIZE:-2048}"
    --train-iters "$TRAIN_ITERS"
    --lr 6e-4 --min-lr 6e-5
    --lr-decay-style WSD --lr-wsd-decay-style cosine
    --lr-warmup-fraction 0.1 --lr-wsd-decay-iters "$decay"
    # One mean over the batch's tokens; else each micro-batch's mean counts alike, however many of
    # its tokens have a loss.
    --calculate-per-token-loss
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --attention-dropout 0 --hidden-dropout 0
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --rotary-base 500000
    --init-method-std 0.02
    # Python's collector at the same moment on all ranks; at its own, each makes the others wait.
    --manual-gc --manual-gc-interval 100
)
case ${RECIPE:=pd-star} in
    lm) LOSS_ARGS=(--pd-lm-only) ;;
    pd-star | robust | vanilla) LOSS_ARGS=(--pd-recipe "$RECIPE") ;;
    *) stop "RECIPE=$RECIPE is none of pd-star robust vanilla lm." ;;
esac
DATA_ARGS=(
    --data-path "${blend[@]}" --split "${SPLIT:-999,1,0}"
    --data-cache-path "${DATA_CACHE:-${blend[-1]}.cache}"
    --tokenizer-type "${TOKENIZER_TYPE:-HuggingFaceTokenizer}" --tokenizer-model "$TOKENIZER"
    --no-create-attention-mask-in-dataloader --num-workers 4
)
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
RETAIN_INTERVAL=${RETAIN_INTERVAL:-$((4 * SAVE_INTERVAL))}
((RETAIN_INTERVAL % SAVE_INTERVAL == 0)) || stop "RETAIN_INTERVAL=$RETAIN_INTERVAL is no multiple of" \
    "SAVE_INTERVAL=$SAVE_INTERVAL, and of what is saved those at its multiples stay."
OUTPUT_ARGS=(
    --save "$SAVE" --load "$SAVE"
    --save-interval "$SAVE_INTERVAL" --save-retain-interval "$RETAIN_INTERVAL"
    # Whatever TP, PP and DP the next run has, it can go on from such a checkpoint.
    --dist-ckpt-optim-fully-reshardable
    # Making the sample index of 100B tokens may outlast Megatron's 10 minutes.
    --distributed-timeout-minutes 60
    # SIGTERM: save a checkpoint after this iteration, then end.
    --exit-signal-handler
    --tensorboard-dir "$SAVE/tensorboard" --log-interval 10 --log-timers-to-tensorboard
    --timing-log-level 1 --log-throughput
    --eval-interval 500 --eval-iters 10
)
if [[ "${ASYNC_SAVE:-1}" != 0 ]]; then # by Megatron's own writer; its default needs a package more
    OUTPUT_ARGS+=(--async-save --async-strategy mcore --use-persistent-ckpt-worker)
fi
if [[ -n "${EXIT_MINUTES:-}" ]]; then
    OUTPUT_ARGS+=(--exit-duration-in-mins "$EXIT_MINUTES")
fi
if [[ -n "${WANDB_PROJECT:-}" ]]; then
    OUTPUT_ARGS+=(--wandb-project "$WANDB_PROJECT" --wandb-save-dir "$SAVE/wandb")
    OUTPUT_ARGS+=(--wandb-exp-name "${WANDB_NAME:-$MODEL-$RECIPE}")
fi
launch -m megatron_pd.pretrain \
    "${MODEL_ARGS[@]}" "${PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${LOSS_ARGS[@]}" \
    "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "${EXTRA[@]}" "$@"
