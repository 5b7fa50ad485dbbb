"""Megatron's features one by one, each in four runs of a tiny model; not part of the suite.

    pytest tests/training/megatron_features.py            (-k "moe" for some of them)

Each is run by Megatron alone (stock_job.py), by us without a --pd-* flag, whose losses have to be
the same digit by digit, with --pd-alpha 0, whose LM loss and gradient have to be the same up to
rounding, and as PD*. docs/megatron-features.md names the cases.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from jobs import PD_STAR, World
from megatron.core.datasets.indexed_dataset import IndexedDataset


@dataclass(frozen=True)
class Case:
    flags: str
    ranks: int = 1
    without: tuple[str, ...] = ()
    """Flags of the tiny model, and how many values they have, that these take the place of."""

    before: str = ""
    """Flags of a plain run before these, which need its files."""

    tolerance: float = 1e-4


MOE = "--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.01"
CASES: dict[str, Case] = {
    # --------------------------------------------------------------------------- the model
    "moe": Case(MOE),
    "moe alltoall, expert parallel": Case(
        f"{MOE} --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall", 2
    ),
    "moe, shared expert and z-loss": Case(
        f"{MOE} --moe-shared-expert-intermediate-size 64 --moe-z-loss-coeff 1e-3 "
        "--moe-input-jitter-eps 0.01 --moe-per-layer-logging"
    ),
    "moe, sinkhorn": Case(
        "--num-experts 4 --moe-router-topk 1 --moe-router-load-balancing-type sinkhorn"
    ),
    "moe, sequence-wide balance, pipeline": Case(
        f"{MOE} --moe-router-load-balancing-type seq_aux_loss --pipeline-model-parallel-size 2", 2
    ),
    "overlapped expert communication": Case(
        f"{MOE} --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --bf16 "
        "--overlap-moe-expert-parallel-comm",
        2,
        tolerance=1e-2,
    ),
    "moe, bias instead of a loss, every second layer": Case(
        "--num-experts 4 --moe-router-topk 2 --moe-router-enable-expert-bias "
        "--moe-router-score-function sigmoid --moe-layer-freq 2 --moe-router-dtype fp32"
    ),
    "multi-token prediction": Case("--mtp-num-layers 1"),
    "multi-token prediction, pipeline": Case(
        "--mtp-num-layers 1 --pipeline-model-parallel-size 2", 2
    ),
    "grouped queries, query-key norms": Case(
        "--group-query-attention --num-query-groups 2 --qk-layernorm --add-qkv-bias"
    ),
    "learned positions, LayerNorm, GELU, biases": Case(
        "--position-embedding-type learned_absolute --normalization LayerNorm --openai-gelu",
        without=("--position-embedding-type 1", "--swiglu", "--disable-bias-linear"),
    ),
    "squared ReLU": Case("--squared-relu", without=("--swiglu",)),
    "no positions, scaled attention": Case(
        "--position-embedding-type none --apply-query-key-layer-scaling "
        "--attention-softmax-in-fp32 --fp16 --initial-loss-scale 1024",
        without=("--position-embedding-type 1",),
        tolerance=2e-2,
    ),
    "some layers without positions": Case("--no-rope-freq 2"),
    "yarn": Case(
        "--position-embedding-type yarn --rotary-scaling-factor 2 "
        "--yarn-original-max-position-embeddings 32 --yarn-beta-fast 32 --yarn-beta-slow 1",
        without=("--position-embedding-type 1",),
    ),
    "rope scaling": Case("--use-rope-scaling --rotary-percent 0.5 --rotary-base 500000"),
    "mup": Case("--use-mup --mup-width-mult 2 --mup-output-mult 0.5"),
    "initialization": Case("--data-parallel-random-init --init-method-std 0.01"),
    "dropout": Case("--attention-dropout 0.1 --hidden-dropout 0.1"),
    # --------------------------------------------------------------------------- precision
    "bf16": Case("--bf16", tolerance=1e-2),
    "bf16, gradients reduced in bf16": Case("--bf16 --grad-reduce-in-bf16", 2, tolerance=2e-2),
    "fp16": Case("--fp16 --initial-loss-scale 1024", tolerance=1e-2),
    # --------------------------------------------------------------------------- parallelism
    "distributed optimizer, overlapped": Case(
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--ddp-num-buckets 3",
        2,
    ),
    "two instances of the distributed optimizer": Case(
        "--use-distributed-optimizer --num-distributed-optimizer-instances 2", 2
    ),
    "average in the collective": Case("--ddp-average-in-collective --ddp-bucket-size 50000", 2),
    "uneven stages": Case(
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1", 2
    ),
    "stages of a layout": Case(
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tt|t|L", 2
    ),
    "embedding and loss count as layers": Case(
        "--pipeline-model-parallel-size 2 --num-layers 6 "
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
        2,
        without=("--num-layers 1",),
    ),
    "no overlapped point-to-point": Case(
        "--pipeline-model-parallel-size 2 --no-overlap-p2p-communication",
        2,
    ),
    "tp-pp-dp mapping": Case("--use-tp-pp-dp-mapping --tensor-model-parallel-size 2", 2),
    "recomputation, full": Case(
        "--recompute-granularity full --recompute-method block --recompute-num-layers 2"
    ),
    "recomputation, selective": Case("--recompute-activations"),
    "one rank of many": Case(
        "--fake-process-group --tensor-model-parallel-size 1 --use-distributed-optimizer"
    ),
    # --------------------------------------------------------------------------- the loss
    "mean over tokens": Case("--calculate-per-token-loss --eod-mask-loss", 2),
    "fused cross-entropy": Case(
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl native "
        "--tensor-model-parallel-size 2",
        2,
        tolerance=5e-3,  # Megatron's fusion rounds the gradient to bf16
    ),
    "cross-entropy in fp16": Case(
        "--fp16-lm-cross-entropy --fp16 --initial-loss-scale 1024", tolerance=2e-2
    ),
    "spiky losses": Case("--check-for-spiky-loss"),
    "no check for NaN": Case("--no-check-for-nan-in-loss-and-grad"),
    "large gradients": Case("--check-for-large-grads"),
    "results validated": Case("--rerun-mode validate_results"),
    "deterministic": Case("--deterministic-mode"),
    # --------------------------------------------------------------------------- optimization
    "SGD": Case("--optimizer sgd"),
    "batch size that grows": Case("--rampup-batch-size 4 4 8"),
    "frozen": Case("--freeze-all-layers"),
    "weight decay that grows": Case(
        "--start-weight-decay 0.01 --end-weight-decay 0.1 --weight-decay-incr-style cosine "
        "--weight-decay 0.1 --lr-warmup-init 1e-4"
    ),
    "learning rate of the embeddings": Case("--decoupled-lr 1e-3 --decoupled-min-lr 1e-4"),
    "cosine learning rate": Case("--lr-decay-style cosine"),
    "a run in samples": Case(
        "--train-samples 24 --lr-wsd-decay-samples 8 --lr-warmup-samples 8",
        without=("--train-iters 1", "--lr-wsd-decay-iters 1", "--lr-warmup-iters 1"),
    ),
    "skipped iterations": Case("--iterations-to-skip 2"),
    "smaller batches where ranks are lost": Case("--decrease-batch-size-if-needed"),
    # --------------------------------------------------------------------------- data
    "data workers": Case("--num-workers 2"),
    "cyclic": Case("--dataloader-type cyclic"),
    "documents apart": Case(
        "--reset-position-ids --reset-attention-mask --eod-mask-loss",
        without=("--no-create-attention-mask-in-dataloader",),
    ),
    "no memory mapping": Case("--no-mmap-bin-files"),
    "blend": Case("--data-path 0.3 {corpus} 0.7 {corpus}", without=("--data-path 1",)),
    "corpora of each split": Case(
        "--train-data-path {corpus} --valid-data-path {corpus} --test-data-path {corpus} "
        "--eval-iters 1",
        without=("--data-path 1", "--split 1", "--eval-iters 1"),
    ),
    "corpora in a file": Case("--data-args-path {blend}", without=("--data-path 1",)),
    "corpora of each split in a file": Case(
        "--per-split-data-args-path {blends}", without=("--data-path 1", "--split 1")
    ),
    "fast load": Case(
        "--train-data-path {corpus} --data-cache-path {cache} --dataloader-fast-cache-load "
        "--dataloader-defer-npy-index-mmap --per-dataset-sequences-path {counts}",
        without=("--data-path 1", "--split 1"),
        before="--train-data-path {corpus} --data-cache-path {cache}",
    ),
    # --------------------------------------------------------------------------- validation
    "validation": Case(
        "--eval-iters 2 --eval-interval 2 --split 80,10,10 --eval-micro-batch-size 1 "
        "--eval-global-batch-size 4 --log-validation-ppl-to-tensorboard",
        2,
    ),
    "full validation": Case(
        "--full-validation --multiple-validation-sets --eval-interval 2 "
        "--train-data-path {corpus} --valid-data-path {corpus} {corpus}",
        without=("--data-path 1", "--split 1"),
    ),
    "validation from an iteration on": Case(
        "--eval-iters 1 --eval-interval 1 --start-eval-at-iter 2 --split 90,10,0"
    ),
    # --------------------------------------------------------------------------- logs
    "logs": Case(
        "--log-params-norm --log-num-zeros-in-grad --log-throughput --log-progress --save {save} "
        "--save-interval 9 --timing-log-level 2 --timing-log-option all "
        "--log-timers-to-tensorboard --log-memory-to-tensorboard --log-device-memory-used "
        "--log-world-size-to-tensorboard --tensorboard-log-interval 1 --logging-level 20",
        2,
    ),
    "stragglers": Case("--log-straggler --straggler-minmax-count 1", 2),
    "profile": Case("--profile --use-pytorch-profiler --profile-step-start 1 --profile-step-end 2"),
    "weights compared across replicas": Case(
        "--check-weight-hash-across-dp-replicas-interval 1", 2
    ),
    "garbage by hand": Case(
        "--manual-gc --manual-gc-interval 1 --empty-unused-memory-level 1 --train-sync-interval 1"
    ),
    "gradients and parameters kept": Case(
        "--save {save} --save-interval 9 --save-params-interval 1 --save-wgrads-interval 1"
    ),
    # --------------------------------------------------------------------------- checkpoints
    "checkpoints, asynchronous": Case(
        "--save {save} --save-interval 1 --async-save --use-persistent-ckpt-worker "
        "--async-strategy mcore --ckpt-assume-constant-structure",
        2,
    ),
    "checkpoints, not persistent": Case(
        "--save {save} --save-interval 9 --non-persistent-save-interval 1 "
        "--non-persistent-ckpt-type global --non-persistent-global-ckpt-dir {save}/short"
    ),
    "checkpoints, few kept": Case("--save {save} --save-interval 1 --save-retain-interval 2"),
    "checkpoints, weights alone": Case(
        "--save {save} --save-interval 1 --no-save-optim --no-save-rng"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_feature(name: str, world: World, tmp_path: Path) -> None:
    case = CASES[name]
    files = corpus_files(world, tmp_path)
    argv = without(
        world.training_flags("--train-iters", 3, "--lr-wsd-decay-iters", 1), case.without
    )
    curves = {}
    for run, flags, distillation in (
        *([("before", case.before, [])] if case.before else []),
        ("stock", case.flags, []),
        ("plain", case.flags, []),
        ("alpha-0", case.flags, ["--pd-alpha", "0"]),
        ("pd-star", case.flags, PD_STAR),
    ):
        own = flags.format(save=tmp_path / run, cache=tmp_path / "cache", **files).split()
        module = "stock_job" if run == "stock" else "megatron_pd.pretrain"
        curves[run] = world.curves_of([*argv, *own, *distillation], case.ranks, module)
    assert curves["plain"].keys() == curves["stock"].keys()
    for tag in (tag for tag in curves["stock"] if "loss" in tag or tag == "grad-norm"):
        np.testing.assert_array_equal(curves["plain"][tag], curves["stock"][tag], err_msg=tag)
    for tag in ("lm loss", "grad-norm"):
        np.testing.assert_allclose(
            curves["alpha-0"][tag],
            curves["plain"][tag],
            rtol=case.tolerance,
            atol=case.tolerance,
            err_msg=tag,
        )
    kd_loss = curves["pd-star"]["kd loss"]
    assert len(kd_loss) == len(curves["plain"]["lm loss"]) >= 2
    assert np.isfinite(kd_loss).all() and (kd_loss > 0).all()


def corpus_files(world: World, folder: Path) -> dict[str, Path]:
    """Files that name the corpus in Megatron's ways."""
    corpus = world.corpus
    documents = len(IndexedDataset(str(corpus)))
    content = {
        "blend": f"0.5 {corpus} 0.5 {corpus}",
        "blends": json.dumps({split: [str(corpus)] for split in ("train", "valid", "test")}),
        "counts": json.dumps({str(corpus): [documents, documents + 1]}),
    }
    for name, text in content.items():
        (folder / name).write_text(text)
    return {"corpus": corpus, **{name: folder / name for name in content}}


def without(argv: list[str], flags: tuple[str, ...]) -> list[str]:
    """A command line less some flags, each given with how many values it has ("--split 1")."""
    for flag, _, values in (entry.partition(" ") for entry in flags):
        while flag in argv:
            index = argv.index(flag)
            del argv[index : index + 1 + int(values or 0)]
    return argv
