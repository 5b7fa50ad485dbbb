"""Megatron's cached logits → logit stores.

    megatron-pd convert from-megatron --logits-load-dir DIR <the teacher run's data flags>

Megatron's tars are ordered by training step; a store is ordered by document. Two passes:

1. tars → a scratch store whose "documents" are the run's samples, exactly as they were saved;
2. for every document of the corpora, the spans of it that the run's samples held (Megatron's own
   dataset order, `data/order.py`) → the corpora's stores.

Both write through `LogitStoreWriter`: the command can be stopped at any time and goes on.

A token that several samples hold (several epochs) gets the row of the one that begins earliest in
its document, in which the teacher saw most of it. A token that none holds gets an empty row.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_pd.errors import UserError, if_stopped, reporting_errors
from megatron_pd.megatron import cpu

with reporting_errors():
    cpu.install()  # before Megatron is imported

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.training.arguments import parse_args
from megatron.training.distillation.utils_logits import compute_dataset_hash
from megatron.training.global_vars import set_args

from megatron_pd.data.corpus import (
    MegatronCorpus,
    store_path_of,
    training_prefixes,
)
from megatron_pd.data.dataset import dataset_fields
from megatron_pd.data.order import CorpusOrder, SampleSpan, corpus_orders
from megatron_pd.data.tokenizer import tokenizer_fingerprint
from megatron_pd.megatron.arguments import HelpFormatter
from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows
from megatron_pd.store.admin.merge import plan_shards
from megatron_pd.store.admin.parallel import Progress, run_jobs
from megatron_pd.store.admin.stats import kept_mass
from megatron_pd.store.codecs import CODECS
from megatron_pd.teacher.cached_logits.tars import CachedLogits, Flush, sample_rows

__all__ = ["convert", "main"]

_FLUSH_ROWS = 1 << 16
_IDENTITY_FLAGS = {
    "seed": "--seed",
    "sequence_length": "--seq-length",
    "train_samples": "--train-samples (or --train-iters x --global-batch-size)",
    "blend": "--data-path",
}


def main() -> int:
    """Entry point: read Megatron's flags from `sys.argv` and convert."""
    args = parse_args(_add_convert_arguments)
    with if_stopped("the same command goes on from here"):
        stores = convert(args)
    for store in stores:
        print(
            f"{store.path}: {store.num_documents:,} documents, {store.num_rows:,} tokens, "
            f"{store.num_entries:,} entries, {store.nbytes:,} bytes"
        )
    return 0


def _add_convert_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.formatter_class = HelpFormatter
    group = parser.add_argument_group(title="conversion of cached logits")
    group.add_argument(
        "--convert-store",
        help="Store to write, where the run had one corpus. Default: <prefix>.pd beside each.",
    )
    group.add_argument(
        "--convert-scratch",
        help="Directory for the rows in the order of the run, about 8 bytes an entry; removed at "
        "the end. Default: <first store>.samples.",
    )
    group.add_argument("--convert-codec", choices=CODECS, default="compact")
    group.add_argument("--convert-value-bits", type=int, default=10)
    group.add_argument("--convert-workers", type=int, default=os.cpu_count() or 1)
    return parser


_Iteration = tuple[int, list[tuple[np.ndarray, np.ndarray]]]
"""An iteration's number and its micro-batches, as `CachedLogits.micro_batches` gives them."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """The teacher's run, as its flags and its tars tell it."""

    args: Any
    cached: CachedLogits
    dataset: GPTDataset | BlendedDataset
    tokenizer: Any
    hash: str
    metadata: dict[str, Any]

    @property
    def samples(self) -> int:
        """Samples that the tars can hold."""
        return min(len(self.dataset), self.cached.iterations * self.args.global_batch_size)

    def samples_of(self, flush: Flush) -> range:
        batch = self.args.global_batch_size
        return range(
            min(self.samples, flush.first * batch), min(self.samples, (flush.last + 1) * batch)
        )


def convert(args: Any) -> list[LogitStore]:
    """Writes the store of every corpus of the run, or what is missing of them.

    Args:
        args: Megatron's parsed arguments, of the teacher's run, with the `--convert-*` ones.
    Raises:
        UserError: settings under which the teacher's run cannot have written these tars.
    """
    run = _open_run(args)
    prefixes = list(dict.fromkeys(training_prefixes(args)))
    if args.convert_store and len(prefixes) > 1:
        raise UserError(
            f"--convert-store names one store, the run has {len(prefixes)} corpora: leave it out, "
            "and each gets <prefix>.pd."
        )
    paths = {prefix: Path(args.convert_store or store_path_of(prefix)) for prefix in prefixes}
    first = next(iter(paths.values()))
    scratch = Path(args.convert_scratch or f"{os.path.normpath(first)}.samples")
    if (finished := _finished(paths, run)) is not None:
        return finished
    _write_samples(run, scratch)
    orders = corpus_orders(run.dataset, run.samples)
    samples = LogitStore(scratch, allow_partial=True)
    stores = []
    for prefix, path in paths.items():
        own_orders = [order for name, order in orders if name == prefix]
        stores.append(_write_documents(run, samples, own_orders, MegatronCorpus(prefix), path))
    shutil.rmtree(scratch)
    return stores


def _open_run(args: Any) -> _Run:
    folder = args.logits_load_dir or args.logits_save_dir
    if folder is None:
        raise UserError("Give the folder of the tars as --logits-load-dir (or --logits-save-dir).")
    cached = CachedLogits.open(folder)
    _refuse(args)
    for prefix in training_prefixes(args):
        MegatronCorpus(prefix)  # says what is wrong with it
    metadata = cached.metadata()
    looked_at = _some_iterations(cached, metadata["hash"])
    batch = cached.dp_size * sum(ids.shape[1] for ids, _ in looked_at[0][1])
    if args.global_batch_size not in (None, batch):
        raise UserError(
            f"{folder} has {batch} samples an iteration ({cached.dp_size} data-parallel ranks), "
            f"--global-batch-size is {args.global_batch_size}: give the teacher run's."
        )
    args.global_batch_size = batch
    if args.train_samples is None:
        if args.train_iters is None:
            raise UserError("Give the teacher run's --train-iters or --train-samples.")
        samples = args.train_iters * batch
    else:
        samples = args.train_samples
    set_args(args)
    own_hash, identity = compute_dataset_hash()
    _check_identity(folder, metadata, own_hash, identity)
    fields = {**dataset_fields(args), "fast_cache_load": False, "defer_npy_index_mmap": False}
    dataset = BlendedMegatronDatasetBuilder(
        GPTDataset, [samples, 0, 0], lambda: True, GPTDatasetConfig(**fields)
    ).build()[0]
    run = _Run(args, cached, dataset, fields["tokenizer"], own_hash, metadata)
    _check_alignment(run, looked_at)
    return run


def _refuse(args: Any) -> None:
    unsupported = {
        "--dataloader-type cyclic or external": args.dataloader_type not in (None, "single"),
        "--rampup-batch-size": args.rampup_batch_size,
        "--phase-transition-iterations": args.phase_transition_iterations,
        "--hybrid-context-parallel": args.hybrid_context_parallel,
        "--dataloader-inter-document-masking with context parallelism": (
            args.dataloader_inter_document_masking and args.context_parallel_size > 1
        ),
        "--sft": args.sft,
        "--fim-data": args.fim_data,
        "--mock-data": args.mock_data,
        "--yaml-cfg": args.yaml_cfg,
    }
    for flag, given in unsupported.items():
        if given:
            raise UserError(f"{flag}: rows of such a run cannot be assigned to documents.")


def _check_identity(
    folder: str, metadata: dict[str, Any], own_hash: str, identity: dict[str, Any]
) -> None:
    if metadata["hash"] == own_hash:
        return
    # Through JSON, as the tar's have gone: its numbers and lists compare alike.
    own = json.loads(json.dumps(identity))
    for name, flag in _IDENTITY_FLAGS.items():
        there = metadata.get("identifiers", {}).get(name)
        if there != own[name]:
            raise UserError(
                f"{folder} was written by a run with {name} {there}; by these flags it is "
                f"{own[name]}: give the teacher run's {flag}."
            )
    raise UserError(f"{folder} was written by a run with other data: give the teacher run's flags.")


def _some_iterations(cached: CachedLogits, hash_: str) -> list[_Iteration]:
    """The first iteration of data-parallel rank 0 in each of up to 16 flushes, over the whole run:
    of a short run, another order may begin with the same samples."""
    step = max(1, len(cached.flushes) // 16)
    found = [
        next(cached.micro_batches(flush, 0, 0, hash_), None) for flush in cached.flushes[::step]
    ]
    if iterations := [iteration for iteration in found if iteration is not None]:
        return iterations
    raise UserError(f"{cached.folder}: data-parallel rank 0 has no complete iteration there.")


def _check_alignment(run: _Run, iterations: list[_Iteration]) -> None:
    """The tars hold no tokens and their hash not all settings, but a teacher predicts its text: the
    true next token is among a row's entries about as often as their mass says."""
    length = run.args.seq_length
    expected = fitting = 0.0
    for iteration, micro_batches in iterations:
        for number, (ids, logprobs) in enumerate(micro_batches):
            if ids.shape[0] != length:
                raise UserError(
                    f"{run.cached.folder} has rows of {ids.shape[0]} tokens a sample, --seq-length "
                    f"is {length}: give the teacher run's, and all cp ranks' tars."
                )
            first = _first_sample(run, iteration, number, 0, ids.shape[1])
            samples = sample_rows(ids, logprobs, run.tokenizer.vocab_size)
            for sample, rows in enumerate(samples[: max(0, run.samples - first)], first):
                labels = run.dataset[sample]["labels"].numpy()
                expected += kept_mass(rows).sum()
                fitting += float((rows.ids == labels[:, None]).any(1).sum())
    if fitting < expected / 2 - 3 * expected**0.5:
        raise UserError(
            f"{run.cached.folder}: {fitting:.0f} rows of {len(iterations)} iterations have the "
            "true next token among their entries; by their probabilities it should be "
            f"{expected:.0f}. The run read other samples: give the teacher run's --split, "
            "--data-path with the very same files, and --tokenizer-model."
        )


def _first_sample(run: _Run, iteration: int, number: int, dp_rank: int, micro_batch: int) -> int:
    """Run sample of a micro-batch's first sample (Megatron's MegatronPretrainingSampler)."""
    start = iteration * run.args.global_batch_size
    return start + (number * run.cached.dp_size + dp_rank) * micro_batch


def _finished(paths: dict[str, Path], run: _Run) -> list[LogitStore] | None:
    try:
        stores = [LogitStore(path) for path in paths.values()]
    except StoreError:
        return None
    if any(store.metadata != _metadata(run) for store in stores):
        return None
    for prefix, store in zip(paths, stores, strict=True):
        store.check_corpus(MegatronCorpus(prefix), full=True)
    return stores


def _metadata(run: _Run) -> dict[str, Any]:
    saver = run.metadata.get("saver", {})
    return {
        "source": f"Megatron's cached logits, {os.path.abspath(run.cached.folder)}",
        "run": run.metadata.get("identifiers", {}),
        "iterations": run.cached.iterations,
        "tokenizer": tokenizer_fingerprint(run.tokenizer),
        "top_k": saver.get("k"),
        "top_p": saver.get("p"),
        "sequence_length": run.args.seq_length,
    }


def _write_samples(run: _Run, scratch: Path) -> None:
    """Pass 1. A sample has a last row more than it has predictions, which is empty."""
    length = run.args.seq_length
    flushes = [flush for flush in run.cached.flushes if len(run.samples_of(flush))]

    def write(flush: Flush, report: Progress) -> int:
        torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
        documents = run.samples_of(flush)
        with LogitStoreWriter(
            scratch,
            vocab_size=run.tokenizer.vocab_size,
            document_lengths=np.full(run.samples, length + 1),
            metadata={**_metadata(run), "order": run.dataset.unique_description_hash},
            codec="exact",
            documents=documents,
            flush_rows=_FLUSH_ROWS,
        ) as writer:
            return _write_flush(run, writer, flush, report)

    with _progress(run.samples * length, "read tars") as advance:
        missing = sum(n for _, n in run_jobs(write, flushes, run.args.convert_workers, advance))
    if missing:
        print(
            f"note: {missing:,} of {run.samples:,} samples are not in the tars of "
            f"{run.cached.folder}; their tokens have no teacher.",
            file=sys.stderr,
        )


def _write_flush(run: _Run, writer: LogitStoreWriter, flush: Flush, report: Progress) -> int:
    """Every sample of a flush; returns how many of them were in no tar."""
    length, batch = run.args.seq_length, run.args.global_batch_size
    written = np.array([writer.written(sample) for sample in writer.documents]) > length
    report(int(written.sum()) * length)
    for dp_rank in range(run.cached.dp_size):
        if written.all():
            break
        first = (writer.documents.start + int(np.argmin(written))) // batch
        for iteration, micro_batches in run.cached.micro_batches(flush, dp_rank, first, run.hash):
            for number, (ids, logprobs) in enumerate(micro_batches):
                sample = _first_sample(run, iteration, number, dp_rank, ids.shape[1])
                for rows in sample_rows(ids, logprobs, run.tokenizer.vocab_size):
                    if sample in writer.documents and not written[sample - writer.documents.start]:
                        done = writer.written(sample)
                        writer.append(sample, done, rows[done:])
                        writer.append(sample, length, TeacherRows.empty(1))
                        written[sample - writer.documents.start] = True
                        report(length)
                    sample += 1
    missing = np.flatnonzero(~written) + writer.documents.start
    for sample in missing.tolist():
        done = writer.written(sample)
        writer.append(sample, done, TeacherRows.empty(length + 1 - done))
        report(length)
    return len(missing)


def _write_documents(
    run: _Run,
    samples: LogitStore,
    orders: list[CorpusOrder],
    corpus: MegatronCorpus,
    path: Path,
) -> LogitStore:
    """Pass 2 for one corpus."""
    lengths = corpus.document_lengths

    def write(documents: range, report: Progress) -> None:
        with LogitStoreWriter(
            path,
            vocab_size=run.tokenizer.vocab_size,
            document_lengths=lengths,
            metadata=_metadata(run),
            codec=run.args.convert_codec,
            value_bits=run.args.convert_value_bits,
            corpus=corpus,
            documents=documents,
            flush_rows=_FLUSH_ROWS,
        ) as writer:
            for document in documents:
                offset, length = writer.written(document), int(lengths[document])
                report(offset)
                if offset == length:
                    continue
                spans = [span for order in orders for span in order.spans(document)]
                for rows in _rows_of(samples, spans, length, offset):
                    writer.append(document, offset, rows)
                    offset += len(rows)
                    report(len(rows))

    with _progress(int(lengths.sum()), f"write {path.name}") as advance:
        for _ in run_jobs(write, plan_shards(lengths), run.args.convert_workers, advance):
            pass
    return LogitStore(path)


def _rows_of(
    samples: LogitStore, spans: list[SampleSpan], length: int, offset: int
) -> Iterator[TeacherRows]:
    """The rows of a document of `length` tokens from `offset` on; the last has no next token."""
    for span in sorted(spans):
        stop = min(span.offset + span.length, length - 1)
        begin = max(offset, span.offset)
        if stop <= begin or not samples.document_length(span.sample):
            continue
        rows = samples.read(span.sample, span.position + begin - span.offset, stop - begin)
        if not rows.counts.any():
            continue  # no tar had this sample; another one may have the tokens too
        if begin > offset:
            yield TeacherRows.empty(begin - offset)
        yield rows
        offset = stop
    if offset < length:
        yield TeacherRows.empty(length - offset)


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Progress]:
    with tqdm(
        total=total, desc=what, unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty()
    ) as bar:

        def advance(tokens: int) -> None:
            bar.update(tokens)

        yield advance
