"""A launch line, rehearsed on one CPU: each check reports what it found, or the mistake.

The data, the stores and the folder for checkpoints are those of the run, so it is rehearsed where
the run will be: on every node that has copies of its own.
"""

import copy
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.training.training import num_floating_point_operations
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_pd.cluster.assumptions import Assumptions
from megatron_pd.cluster.cut import cut_flags
from megatron_pd.cluster.launch_line import LaunchLine
from megatron_pd.cluster.layout import readers_per_node, reading_ranks
from megatron_pd.cluster.plan import total_parameters
from megatron_pd.cluster.sizes import CHECKPOINT_BYTES_PER_PARAMETER, checkpoints_kept
from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.dataset import PDGPTDataset, PDGPTDatasetConfig, dataset_fields
from megatron_pd.distill.schedules import alpha_at
from megatron_pd.errors import UserError
from megatron_pd.megatron.arguments import (
    learning_rate_of_flags,
    pd_config_from_args,
    resolve_schedule,
    total_samples,
)
from megatron_pd.megatron.launch import config_of_args
from megatron_pd.megatron.unsupported import check_splits, splits_of
from megatron_pd.store import LogitStore
from megatron_pd.train.teacher_data import TeacherData, open_teacher_data

__all__ = ["Check", "Rehearsal"]

_READ_SECONDS = 3.0


@dataclass(frozen=True)
class Check:
    name: str
    found: tuple[str, ...] = ()
    mistake: str | None = None


@dataclass
class Rehearsal:
    """The checks of one launch line.

    Args:
        args: Megatron's, validated at the line's world size (`args_at_scale`).
        max_epochs: how often the run may see a token.
        plot: PNG for α and the learning rate.
    """

    args: Any
    line: LaunchLine
    assumed: Assumptions
    max_epochs: float
    plot: str | None = None

    teacher: TeacherData | None = None
    """Once `_teacher_data` has found it whole."""

    def checks(self) -> Iterator[Check]:
        """One after another; a mistake doesn't end them, but for what could not work after it."""
        sound = True  # enough to read and train
        for name, check in (
            ("layout", self._layout),
            ("corpora and stores", self._data),
            ("schedules", self._schedules),
        ):
            done = _checked(name, check)
            sound &= done.mistake is None
            yield done
        yield _checked("tokens", self._tokens)
        yield _checked("disk", self._disk)
        if sound:
            yield _checked("reading", self._reading)
            yield _checked("steps", self._steps)

    def _layout(self) -> list[str]:
        args = self.args
        here = copy.copy(args)
        here.apply_rope_fusion = False  # it takes Transformer Engine, which this machine may lack
        model = config_of_args(here).model.transformer
        stages = args.pipeline_model_parallel_size
        chunks = args.virtual_pipeline_model_parallel_size
        layers = [
            sum(
                get_num_layers_to_build(model, vp_stage=chunk, pp_rank=stage)
                for chunk in (range(chunks) if chunks else (None,))
            )
            for stage in range(stages)
        ]
        ranks = reading_ranks(args)
        nodes = len({rank // self.line.processes_per_node for rank in ranks})
        return [
            f"{args.world_size:,} ranks: TP {args.tensor_model_parallel_size}, PP {stages}, CP "
            f"{args.context_parallel_size}, DP {args.data_parallel_size}",
            f"layers of the stages: {' '.join(map(str, layers))}",
            f"{len(ranks):,} ranks read, on {nodes:,} nodes: {_few(ranks)}",
        ]

    def _data(self) -> list[str]:
        check_splits(self.args)
        config = pd_config_from_args(self.args)
        if config is None:
            prefixes = dict.fromkeys(prefix for prefix, *_ in splits_of(self.args))
            return [f"{prefix}: {len(MegatronCorpus(prefix)):,} documents" for prefix in prefixes]
        self.teacher = open_teacher_data(self.args, config)
        return [
            f"{prefix}: {path} is of this corpus and tokenizer"
            for prefix, path in self.teacher.stores.items()
        ]

    def _tokens(self) -> list[str]:
        needed = total_samples(self.args) * self.args.seq_length
        there = {
            prefix: _tokens_between(prefix, begin, end)
            for prefix, split, begin, end in splits_of(self.args)
            if split == "training"
        }
        shares = _shares(self.args, there)
        epochs = {prefix: shares[prefix] * needed / max(1, there[prefix]) for prefix in there}
        worst = max(epochs, key=lambda prefix: epochs[prefix])
        if epochs[worst] > self.max_epochs:
            raise UserError(
                f"the run takes {shares[worst] * needed:,.0f} tokens of {worst}, whose training "
                f"split has {there[worst]:,}: each would be seen {epochs[worst]:.3g} times. Give a "
                f"larger corpus, another blend or fewer iterations, or allow it by --max-epochs "
                f"{np.ceil(epochs[worst]):.0f}."
            )
        return [f"{prefix}: {epochs[prefix]:.3g} epochs of {there[prefix]:,}" for prefix in there]

    def _schedules(self) -> list[str]:
        rate, total = learning_rate_of_flags(self.args), total_samples(self.args)
        batch = self.args.global_batch_size
        decay = rate.wsd_decay_steps or 0
        if rate.lr_warmup_steps + decay > total:
            raise UserError(
                f"the learning rate warms up over {rate.lr_warmup_steps / batch:,.0f} iterations "
                f"and decays over {decay / batch:,.0f}, and the run has {total / batch:,.0f}: give "
                "a smaller --lr-wsd-decay-iters or --lr-warmup-fraction, or a longer run."
            )
        config = pd_config_from_args(self.args)
        schedule = None if config is None else resolve_schedule(config, rate, total)
        found = [
            f"learning rate {self.args.lr_decay_style}: warmup {rate.lr_warmup_steps / batch:,.0f} "
            f"and decay {decay / batch:,.0f} of {total / batch:,.0f} iterations"
        ]
        if schedule is not None:
            alphas = [alpha_at(schedule, round(total * at), total) for at in (0, 0.05, 0.5, 1)]
            found.append("α at 0, 5, 50, 100%: " + " ".join(f"{alpha:.3g}" for alpha in alphas))
        if self.plot is not None:
            _plot(self.plot, rate, schedule, total, batch)
            found.append(f"plotted in {self.plot}")
        return found

    def _disk(self) -> list[str]:
        args = self.args
        if args.save is None or not args.save_interval:
            return ["no checkpoints: there is no --save with --save-interval"]
        size = total_parameters(args) * CHECKPOINT_BYTES_PER_PARAMETER
        iterations = total_samples(args) // args.global_batch_size
        kept = checkpoints_kept(iterations, args.save_interval, args.save_retain_interval)
        place = next(
            path
            for path in (Path(args.save).absolute(), *Path(args.save).absolute().parents)
            if path.exists()
        )
        free = shutil.disk_usage(place).free
        found = (
            f"{kept} checkpoints of {size / 1e9:,.1f} GB in {args.save}, {free / 1e9:,.0f} GB free"
        )
        if kept * size > free:
            raise UserError(
                f"{found}: the disk would be full. Give another --save, a larger "
                "--save-retain-interval or --save-interval."
            )
        return [found]

    def _reading(self) -> list[str]:
        args = self.args
        dataset_class: type[GPTDataset] = GPTDataset
        config = GPTDatasetConfig(**dataset_fields(args))
        if self.teacher is not None:
            dataset_class = PDGPTDataset
            config = PDGPTDatasetConfig(
                **dataset_fields(args),
                stores=self.teacher.stores,
                teacher_columns=self.teacher.columns,
                teacher_statistic=self.teacher.statistic,
            )
        sizes = [total_samples(args), None, None]
        begin = time.perf_counter()
        train = BlendedMegatronDatasetBuilder(dataset_class, sizes, lambda: True, config).build()[0]
        indexed = time.perf_counter() - begin
        rate = _samples_per_second(train)
        readers = readers_per_node(reading_ranks(args), self.line.processes_per_node)
        step = num_floating_point_operations(args, args.global_batch_size) / (
            args.world_size * self.assumed.tflops * 1e12
        )
        need = readers * args.global_batch_size / args.data_parallel_size / step
        has = rate * readers * max(1, args.num_workers)
        found = (
            f"one process reads {rate:,.1f} sequences/s, {readers} readers with "
            f"{max(1, args.num_workers)} workers each {has:,.0f}, and a node needs {need:,.1f} for "
            f"steps of {step:.3g} s ({self.assumed.tflops:g} TFLOP/s a GPU)"
        )
        if has < need:
            raise UserError(
                f"{found}: training would wait. Give more --num-workers, or a faster disk."
            )
        tokens = args.global_batch_size // args.data_parallel_size * args.seq_length
        stores = [] if self.teacher is None else map(LogitStore, self.teacher.stores.values())
        return [
            found,
            *(
                f"a step of one rank reads {store.nbytes / store.num_rows * tokens:,.0f} bytes of "
                f"{store.path} where all of it comes from there"
                for store in stores
            ),
            f"the sample index took {indexed:.1f} s; it lies where training looks for it",
        ]

    def _steps(self) -> list[str]:
        ranks = sorted({0, reading_ranks(self.args)[0]})
        with tempfile.TemporaryDirectory() as cache:
            flags = cut_flags(self.args, self.line.flags, cache)
            for rank in ranks:  # rank 0 makes the sample index for the others
                _run_rank(rank, self.args.world_size, self.line.processes_per_node, flags)
        return [
            f"rank {rank} of {self.args.world_size:,} trained two iterations of the cut model"
            for rank in ranks
        ]


def _checked(name: str, check: Callable[[], list[str]]) -> Check:
    try:
        return Check(name, tuple(check()))
    except UserError as error:
        return Check(name, mistake=str(error))


def _tokens_between(prefix: str, begin: float, end: float) -> int:
    lengths = MegatronCorpus(prefix).document_lengths
    first, last = (round(share * float(len(lengths))) for share in (begin, end))
    return int(lengths[first:last].sum())


def _shares(args: Any, there: dict[str, int]) -> dict[str, float]:
    """What part of the run's tokens each corpus gives: by its weight, else by its size."""
    blend, per_split = get_blend_and_blend_per_split(args)
    prefixes, weights = blend if blend is not None else per_split[0]
    weights = weights or [there[prefix] for prefix in prefixes]
    shares = dict.fromkeys(there, 0.0)
    for prefix, weight in zip(prefixes, weights, strict=True):
        shares[prefix] += weight / sum(weights)
    return shares


def _samples_per_second(dataset: Any) -> float:
    """One process reads samples from all over the run's order, none twice."""
    places = np.random.default_rng(0).permutation(len(dataset))
    done, begin = 0, time.perf_counter()
    while done < len(places) and time.perf_counter() - begin < _READ_SECONDS:
        dataset[int(places[done])]
        done += 1
    return done / (time.perf_counter() - begin)


def _run_rank(rank: int, world_size: int, processes_per_node: int, flags: list[str]) -> None:
    """Two iterations of one rank, whose collectives go nowhere.

    Raises:
        UserError: it failed; the end of its log.
    """
    done = subprocess.run(
        [sys.executable, "-m", "megatron_pd.pretrain", *flags, "--fake-process-group"],
        env={
            **os.environ,
            "MEGATRON_PD_DEVICE": "cpu",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % processes_per_node),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "6000",  # nobody listens: the store is a fake, too
        },
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-15:]
        raise UserError(f"rank {rank} of the cut run failed:\n" + "\n".join(last))


def _plot(path: str, rate: Any, schedule: Any, total: int, batch: int) -> None:
    from matplotlib.figure import Figure

    samples = np.linspace(0, total, 501).astype(int)
    rates = []
    for sample in samples.tolist():
        rate.num_steps = sample
        rates.append(rate.get_lr({}))
    figure = Figure(figsize=(8, 4), layout="tight")
    axes = figure.subplots()
    axes.plot(samples / batch, rates, color="C0")
    axes.set_xlabel("iteration")
    axes.set_ylabel("learning rate", color="C0")
    if schedule is not None:
        other = axes.twinx()
        other.plot(
            samples / batch, [alpha_at(schedule, s, total) for s in samples.tolist()], "C1--"
        )
        other.set_ylabel("α", color="C1")
    figure.savefig(path)


def _few(ranks: list[int]) -> str:
    shown = " ".join(map(str, ranks[:4]))
    return shown if len(ranks) <= 4 else f"{shown} … {ranks[-1]}"
