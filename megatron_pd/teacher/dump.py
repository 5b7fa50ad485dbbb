"""The teacher's offline pass: a Megatron checkpoint over a corpus → the corpus's logit store.

    megatron-pd dump --load CHECKPOINT --data-path PREFIX [--dump-* flags, Megatron flags]

The corpus is split into shards of whole documents, which depend on the corpus alone. Every model
replica takes shards in turn and writes them without talking to the others. A shard is dumped
document group by document group; after each group its rows are durable, and a run that was stopped
goes on after the last one, on any number of replicas.
"""

import argparse
import functools
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_pd.errors import UserError
from megatron_pd.megatron.inference import ForwardOnlyModel, finish, load_model

# isort: split
# Megatron may be imported only after forward_only has prepared the device.
from megatron.core import mpu

from megatron_pd.data.corpus import (
    MegatronCorpus,
    store_path_of,
    training_prefixes,
)
from megatron_pd.data.tokenizer import tokenizer_fingerprint
from megatron_pd.data.windows import Batch, Window, batches_of, windows_of
from megatron_pd.distill.targets import check_truncation
from megatron_pd.store import LogitStoreWriter, TeacherRows
from megatron_pd.store._logit_codec import MAX_VALUE_BITS, MIN_VALUE_BITS
from megatron_pd.store.admin.merge import even_ranges
from megatron_pd.store.format import CODECS
from megatron_pd.teacher.capture import CapturedRows, capture_rows

__all__ = ["dump", "main", "shards_of"]

_GROUP_TOKENS = 1 << 16
_TOP_P, _TOP_K = 0.95, 50  # PD*, arXiv 2410.16215, appendix A.6


def main() -> int:
    """Entry point: dump every corpus of `--data-path`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    model = load_model(_add_dump_arguments)
    for prefix in training_prefixes(model.args):
        dump(model, prefix)
    finish()
    return 0


def _add_dump_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group(title="teacher dump")
    group.add_argument(
        "--dump-store",
        default=None,
        help="Store to write, where --data-path is one corpus. Default: <prefix>.pd beside it.",
    )
    group.add_argument(
        "--dump-top-p",
        type=float,
        default=None,
        help="Keep the smallest set of tokens with this full-vocabulary mass, in (0, 1]. "
        f"Default: {_TOP_P}.",
    )
    group.add_argument(
        "--dump-top-k",
        type=int,
        default=None,
        help=f"Then the k likeliest of it. Default: {_TOP_K}.",
    )
    group.add_argument(
        "--dump-sampled",
        type=int,
        default=None,
        metavar="N",
        help="Store N random draws from every full distribution, seeded by --seed, instead of its "
        "likeliest tokens: the rows that --pd-tail sampled reads (arXiv 2503.16870 draws 50).",
    )
    group.add_argument(
        "--dump-overlap",
        type=int,
        default=None,
        help="Tokens of context that a window shares with the one before it in a document longer "
        "than --seq-length. Default: a quarter of --seq-length.",
    )
    group.add_argument(
        "--dump-statistics",
        action="store_true",
        help="Store entropy and standard deviation of every full distribution, which the adaptive "
        "temperatures read.",
    )
    group.add_argument(
        "--dump-codec",
        choices=sorted(CODECS),
        default="compact",
        help="compact: about a fifth of the bytes, at most 3e-4 nats off per row of 50 entries (at "
        "10 value bits); exact: float32 log-probabilities.",
    )
    group.add_argument(
        "--dump-value-bits",
        type=int,
        choices=range(MIN_VALUE_BITS, MAX_VALUE_BITS + 1),
        default=10,
        help="Resolution of compact log-probabilities: each bit more quarters their error "
        "and costs about an eighth of a byte per entry.",
    )
    return parser


def dump(model: ForwardOnlyModel, prefix: str) -> None:
    """Write the store of one corpus, or what is still missing of it.

    Raises:
        UserError: flags out of range, or tokens that the tokenizer doesn't have.
    """
    args = model.args
    _check_rows_asked_for(args)
    overlap = args.seq_length // 4 if args.dump_overlap is None else args.dump_overlap
    if not 0 <= overlap < args.seq_length:
        raise UserError(
            f"--dump-overlap is {overlap}; it must be at least 0 and less than --seq-length "
            f"({args.seq_length})."
        )
    corpus = MegatronCorpus(prefix)
    path = args.dump_store or store_path_of(prefix)
    lengths = corpus.document_lengths
    replica, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    shards = shards_of(lengths)[replica::replicas]
    progress = tqdm(
        total=int(sum(lengths[shard.start : shard.stop].sum() for shard in shards)),
        desc=f"dump {os.path.basename(path)}",
        unit=" tokens",
        unit_scale=True,
        disable=not (model.writes and replica == 0),
    )
    with progress:
        for documents in shards:
            _dump_shard(model, corpus, path, documents, overlap, progress)


def _check_rows_asked_for(args: argparse.Namespace) -> None:
    check_truncation(args.dump_top_p, args.dump_top_k, "--dump-top-p", "--dump-top-k")
    if args.dump_sampled is None:
        return
    if args.dump_sampled < 1:
        raise UserError(f"--dump-sampled is {args.dump_sampled}; a row needs 1 draw or more.")
    if args.dump_top_p is not None or args.dump_top_k is not None:
        raise UserError(
            "--dump-sampled draws from the full distribution, which --dump-top-p and --dump-top-k "
            "would cut: leave them out, or dump a second store with another --dump-store."
        )


def shards_of(document_lengths: np.ndarray) -> list[range]:
    """Contiguous document ranges of about equal numbers of tokens.

    A function of the corpus alone, so that a dump can go on with other parallelism: at least 64
    shards (fewer only where they would hold less than 64k tokens), each of 2^30 tokens at most.
    """
    tokens = int(document_lengths.sum())
    count = max(min(64, -(-tokens >> 16)), -(-tokens >> 30), 1)
    return even_ranges(document_lengths, count)


def _dump_shard(
    model: ForwardOnlyModel,
    corpus: MegatronCorpus,
    path: str,
    documents: range,
    overlap: int,
    progress: tqdm,
) -> None:
    writer = _open_writer(model, corpus, path, documents) if model.writes else None
    durable = _agree_on_written(model, writer, documents)
    try:
        for group in _document_groups(corpus, documents):
            windows = [
                window
                for document in group
                for window in windows_of(
                    document, int(corpus.document_lengths[document]), model.args.seq_length, overlap
                )
                if window.start + window.length > durable[document - documents.start]
            ]
            rows = _rows_of(model, corpus, windows)
            if writer is not None:
                for document in group:
                    _append(
                        writer, document, corpus, rows, int(durable[document - documents.start])
                    )
                writer.flush()
            progress.update(int(corpus.document_lengths[group.start : group.stop].sum()))
        if writer is not None:
            writer.close()
    finally:
        if writer is not None:
            writer.abandon()


def _open_writer(
    model: ForwardOnlyModel, corpus: MegatronCorpus, path: str, documents: range
) -> LogitStoreWriter:
    args = model.args
    sampled = args.dump_sampled is not None
    return LogitStoreWriter(
        path,
        vocab_size=model.tokenizer.vocab_size,
        document_lengths=corpus.document_lengths,
        metadata={
            "teacher": os.path.abspath(args.load),
            "iteration": args.iteration,
            "tokenizer": tokenizer_fingerprint(model.tokenizer),
            **({"seed": args.seed} if sampled else _truncation(args)),
            "sequence_length": args.seq_length,
        },
        kind="sampled" if sampled else "top",
        draws=args.dump_sampled or 0,
        codec=args.dump_codec,
        value_bits=args.dump_value_bits,
        corpus=corpus,
        documents=documents,
    )


def _truncation(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "top_p": _TOP_P if args.dump_top_p is None else args.dump_top_p,
        "top_k": _TOP_K if args.dump_top_k is None else args.dump_top_k,
    }


def _agree_on_written(
    model: ForwardOnlyModel, writer: LogitStoreWriter | None, documents: range
) -> np.ndarray:
    """Durable rows of every document, int64 [documents], on all ranks of the replica."""
    durable = torch.zeros(len(documents), dtype=torch.int64, device=torch.cuda.current_device())
    if writer is not None:
        durable.copy_(torch.tensor([writer.written(document) for document in documents]))
    torch.distributed.all_reduce(
        durable, op=torch.distributed.ReduceOp.MAX, group=mpu.get_model_parallel_group()
    )
    return durable.cpu().numpy()


def _document_groups(corpus: MegatronCorpus, documents: range) -> Iterator[range]:
    """Consecutive documents of about _GROUP_TOKENS tokens: in memory, and durable, at once."""
    start, tokens = documents.start, 0
    for document in documents:
        tokens += int(corpus.document_lengths[document])
        if tokens >= _GROUP_TOKENS or document == documents.stop - 1:
            yield range(start, document + 1)
            start, tokens = document + 1, 0


def _rows_of(
    model: ForwardOnlyModel, corpus: MegatronCorpus, windows: list[Window]
) -> dict[int, list[tuple[int, TeacherRows]]]:
    """Document → (offset, rows) of its windows' own tokens; empty unless this rank writes."""
    args = model.args
    rows: dict[int, list[tuple[int, TeacherRows]]] = {}

    def capture(
        logits: torch.Tensor, labels: torch.Tensor, selection: dict[str, Any]
    ) -> CapturedRows:
        return capture_rows(
            logits,
            labels,
            **selection,
            vocab_size=model.tokenizer.vocab_size,
            tp_group=model.tp_group,
            statistics=args.dump_statistics,
        )

    for batch in batches_of(
        corpus,
        windows,
        batch_size=args.micro_batch_size,
        sequence_length=args.seq_length,
        length_multiple=args.tensor_model_parallel_size,
    ):
        selection = _truncation(args)
        if args.dump_sampled is not None:
            uniforms = _uniforms(batch, args.seed, args.dump_sampled)
            selection = {"uniforms": uniforms.to(torch.cuda.current_device())}
        captured = model.run(batch, functools.partial(capture, selection=selection))
        if model.writes:
            for window, window_rows in _split(batch, captured):
                rows.setdefault(window.document, []).append((window.keep, window_rows))
    return rows


def _uniforms(batch: Batch, seed: int, draws: int) -> torch.Tensor:
    """Random numbers for the draws, float64 [B, L, N]: a function of the window and the seed, so
    that neither the batch, the parallel layout nor a restart changes what is drawn."""
    uniforms = np.zeros((*batch.tokens.shape, draws))
    for row, window in enumerate(batch.windows):
        random = np.random.default_rng([seed, window.document, window.start])
        uniforms[row, : window.length] = random.random((window.length, draws))
    return torch.from_numpy(uniforms)


def _split(batch: Batch, captured: CapturedRows) -> Iterator[tuple[Window, TeacherRows]]:
    """The rows that each window keeps, as the store takes them."""
    targets = captured.targets
    ids, logprobs, counts = (
        tensor.cpu().numpy() for tensor in (targets.ids, targets.logprobs, targets.counts)
    )
    statistics = {"label_logprob": captured.label_logprob.cpu().numpy()}
    if targets.entropy is not None and targets.std is not None:
        statistics |= {"entropy": targets.entropy.cpu().numpy(), "std": targets.std.cpu().numpy()}
    for row, window in enumerate(batch.windows):
        own = slice(window.keep - window.start, window.length)
        yield (
            window,
            TeacherRows(
                ids[row, own],
                logprobs[row, own],
                counts[row, own],
                {name: values[row, own] for name, values in statistics.items()},
            ),
        )


def _append(
    writer: LogitStoreWriter,
    document: int,
    corpus: MegatronCorpus,
    rows: dict[int, list[tuple[int, TeacherRows]]],
    durable: int,
) -> None:
    """Append a document's rows in order, from the first that is not durable, and its empty last."""
    for offset, window_rows in sorted(rows.get(document, []), key=lambda part: part[0]):
        skip = max(0, durable - offset)
        writer.append(document, offset + skip, window_rows[skip:])
    last = int(corpus.document_lengths[document]) - 1
    if durable <= last:
        template = next((part for _, part in rows.get(document, [])), TeacherRows.empty(0))
        writer.append(document, last, _empty_row(template))


def _empty_row(like: TeacherRows) -> TeacherRows:
    """The last row of a document, with the statistics that its other rows have."""
    empty = TeacherRows.empty(1, like.ids.shape[1])
    statistics = {name: np.full(1, np.nan, np.float32) for name in like.statistics}
    return TeacherRows(empty.ids, empty.logprobs, empty.counts, statistics)
