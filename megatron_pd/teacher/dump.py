"""The teacher's offline pass: its rows of a corpus → the corpus's logit store.

The corpus is split into shards of whole documents, which depend on the corpus alone. Every replica
of the teacher takes shards in turn and writes them without talking to the others. A shard is dumped
document group by document group; after each group its rows are durable, and a run that was stopped
goes on after the last one, on any number of replicas.
"""

import os
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.windows import Window, batches_of, windows_of
from megatron_pd.store import LogitStoreWriter, TeacherRows
from megatron_pd.store.admin.merge import even_ranges
from megatron_pd.teacher.dump_config import DumpConfig
from megatron_pd.teacher.protocol import Teacher

__all__ = ["dump", "shards_of"]

_GROUP_TOKENS = 1 << 16


def dump(teacher: Teacher, corpus: MegatronCorpus, path: str, config: DumpConfig) -> None:
    """Write the store of one corpus, or what is still missing of it. Every rank calls it.

    Args:
        path: of the store, a folder.
    Raises:
        StoreError: the store there was begun with another corpus, teacher or configuration.
    """
    lengths = corpus.document_lengths
    shards = shards_of(lengths)[teacher.replica :: teacher.replicas]
    progress = tqdm(
        total=int(sum(lengths[shard.start : shard.stop].sum() for shard in shards)),
        desc=f"dump {os.path.basename(path)}",
        unit=" tokens",
        unit_scale=True,
        disable=not (teacher.writes and teacher.replica == 0),
    )
    with progress:
        for documents in shards:
            _dump_shard(teacher, corpus, path, documents, config, progress)


def shards_of(document_lengths: np.ndarray) -> list[range]:
    """Contiguous document ranges of about equal numbers of tokens.

    A function of the corpus alone, so that a dump can go on with other parallelism: at least 64
    shards (fewer only where they would hold less than 64k tokens), each of 2^30 tokens at most.
    """
    tokens = int(document_lengths.sum())
    count = max(min(64, -(-tokens >> 16)), -(-tokens >> 30), 1)
    return even_ranges(document_lengths, count)


def _dump_shard(
    teacher: Teacher,
    corpus: MegatronCorpus,
    path: str,
    documents: range,
    config: DumpConfig,
    progress: tqdm,
) -> None:
    lengths = corpus.document_lengths
    writer = _open_writer(teacher, corpus, path, documents, config) if teacher.writes else None
    durable = teacher.share(
        None if writer is None else np.array([writer.written(d) for d in documents], np.int64)
    )
    assert config.overlap is not None
    try:
        for group in _document_groups(lengths, documents):
            windows = [
                window
                for document in group
                for window in windows_of(
                    document, int(lengths[document]), config.sequence_length, config.overlap
                )
                if window.start + window.length > durable[document - documents.start]
            ]
            rows = _rows_of(teacher, corpus, windows, config)
            if writer is not None:
                for document in group:
                    done = int(durable[document - documents.start])
                    _append(writer, document, rows.get(document, []), done)
                    if done < lengths[document]:
                        last = int(lengths[document]) - 1
                        writer.append(document, last, _last_row(config))
                writer.flush()
            progress.update(int(lengths[group.start : group.stop].sum()))
        if writer is not None:
            writer.close()
    finally:
        if writer is not None:
            writer.abandon()


def _open_writer(
    teacher: Teacher, corpus: MegatronCorpus, path: str, documents: range, config: DumpConfig
) -> LogitStoreWriter:
    return LogitStoreWriter(
        path,
        vocab_size=teacher.vocab_size,
        document_lengths=corpus.document_lengths,
        metadata={**teacher.identity, **config.identity},
        kind="sampled" if config.sampled else "top",
        draws=config.sampled or 0,
        codec=config.codec,
        value_bits=config.value_bits,
        corpus=corpus,
        documents=documents,
    )


def _document_groups(lengths: np.ndarray, documents: range) -> Iterator[range]:
    """Consecutive documents of about _GROUP_TOKENS tokens: in memory, and durable, at once."""
    start, tokens = documents.start, 0
    for document in documents:
        tokens += int(lengths[document])
        if tokens >= _GROUP_TOKENS or document == documents.stop - 1:
            yield range(start, document + 1)
            start, tokens = document + 1, 0


def _rows_of(
    teacher: Teacher, corpus: MegatronCorpus, windows: list[Window], config: DumpConfig
) -> dict[int, list[tuple[int, TeacherRows]]]:
    """Document → (offset, rows) of its windows' own tokens; empty unless this rank writes."""
    rows: dict[int, list[tuple[int, TeacherRows]]] = {}
    for batch in batches_of(
        corpus,
        windows,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        length_multiple=teacher.length_multiple,
    ):
        rows_of_batch = teacher.run(batch, config)
        if rows_of_batch is None:
            continue
        for window, window_rows in zip(batch.windows, rows_of_batch, strict=True):
            own = window_rows[window.keep - window.start :]
            rows.setdefault(window.document, []).append((window.keep, own))
    return rows


def _append(
    writer: LogitStoreWriter, document: int, parts: list[tuple[int, TeacherRows]], durable: int
) -> None:
    """Append a document's rows in order, from the first that is not durable."""
    for offset, rows in sorted(parts, key=lambda part: part[0]):
        skip = max(0, durable - offset)
        writer.append(document, offset + skip, rows[skip:])


def _last_row(config: DumpConfig) -> TeacherRows:
    """A document's last row, which predicts nothing, with the statistics that all rows have."""
    empty = TeacherRows.empty(1)
    unknown = {name: np.full(1, np.nan, np.float32) for name in config.row_statistics}
    return TeacherRows(empty.ids, empty.logprobs, empty.counts, unknown)
