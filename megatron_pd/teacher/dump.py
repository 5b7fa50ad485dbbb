"""The teacher's offline pass: its rows of a corpus → the corpus's logit store.

The corpus is split into shards of whole documents, which depend on the corpus alone. Every replica
of the teacher claims shards as they come, by the lock of the shard's file, and no one waits for
another: a replica that finds no shard left is done. A shard is dumped document group by document
group, each written while the teacher runs the next one; a written group's rows are durable, and a
run that was stopped goes on after the last one, on any number of replicas.
"""

import os

import numpy as np
from tqdm import tqdm

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.windows import Windows, batches_of, document_groups, windows_of
from megatron_pd.errors import UserError
from megatron_pd.store import LogitStoreWriter, ShardInUseError, TeacherRows
from megatron_pd.store.admin.merge import even_ranges
from megatron_pd.teacher.beside import Beside
from megatron_pd.teacher.dump_config import DumpConfig
from megatron_pd.teacher.protocol import Teacher

__all__ = ["dump", "shards_of"]

_GROUP_TOKENS = 1 << 16  # in memory, and durable, at once


def dump(teacher: Teacher, corpus: MegatronCorpus, path: str, config: DumpConfig) -> None:
    """Write the store of one corpus, or what is still missing of it. Every rank calls it.

    It returns on a replica that finds no shard to write; others may still write theirs.

    Args:
        path: of the store, a folder on a file system whose locks (flock) hold on all machines.
    Raises:
        StoreError: the store there was begun with another corpus, teacher or configuration.
        UserError: the teacher gave something that is no distribution.
    """
    lengths = corpus.document_lengths
    shards = shards_of(lengths)
    first = teacher.replica * len(shards) // teacher.replicas  # replicas begin far apart
    progress = tqdm(
        total=int(lengths.sum()),
        desc=f"dump {os.path.basename(path)}",
        unit=" tokens",
        unit_scale=True,
        disable=not (teacher.writes and teacher.replica == 0),
    )
    with progress, Beside() as beside:
        for documents in shards[first:] + shards[:first]:
            _dump_shard(teacher, corpus, path, documents, config, progress, beside)


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
    beside: Beside,
) -> None:
    lengths = corpus.document_lengths[documents.start : documents.stop]
    writer = _claim(teacher, corpus, path, documents, config) if teacher.writes else None
    found = None
    if teacher.writes:
        # A shard that another replica writes is as good as written.
        found = lengths if writer is None else writer.written_rows
    durable = teacher.share(found)
    try:
        for group in document_groups(lengths, _GROUP_TOKENS):
            if (durable[group] < lengths[group]).any():
                rows = _rows_of(teacher, corpus, documents[group], durable[group], config)
                if writer is not None:
                    beside.run(_write, writer, documents[group].start, rows)
            progress.update(int(lengths[group].sum()))
        if writer is not None:
            beside.run(writer.close)
    except BaseException:
        beside.finish()
        if writer is not None:
            writer.abandon()
        raise


def _write(writer: LogitStoreWriter, document: int, rows: TeacherRows) -> None:
    writer.append_run(document, 0, rows)
    writer.flush()


def _claim(
    teacher: Teacher, corpus: MegatronCorpus, path: str, documents: range, config: DumpConfig
) -> LogitStoreWriter | None:
    """The shard's writer; None where another process writes it."""
    try:
        return LogitStoreWriter(
            path,
            vocab_size=teacher.vocab_size,
            document_lengths=corpus.document_lengths,
            metadata={**teacher.identity, **config.identity},
            kind="sampled" if config.sampled else "top",
            draws=config.sampled or 0,
            codec=config.codec,
            value_bits=config.value_bits,
            statistics=config.row_statistics,
            corpus=corpus,
            documents=documents,
        )
    except ShardInUseError:
        return None


def _rows_of(
    teacher: Teacher,
    corpus: MegatronCorpus,
    documents: range,
    durable: np.ndarray,
    config: DumpConfig,
) -> TeacherRows:
    """The rows of all tokens of these documents, one document after another.

    Rows that are durable already may be left empty, and each document's last row is; on ranks that
    don't write all are.

    Args:
        durable: int64 [documents], rows of each document that needn't be computed.
    """
    assert config.overlap is not None
    lengths = corpus.document_lengths[documents.start : documents.stop]
    windows = windows_of(
        np.arange(documents.start, documents.stop), lengths, config.sequence_length, config.overlap
    )
    done = durable[windows.documents - documents.start]
    batches = batches_of(
        corpus,
        windows[windows.starts + windows.lengths > done],
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        length_multiple=teacher.length_multiple,
    )
    starts = np.cumsum(lengths) - lengths
    found: list[tuple[np.ndarray, TeacherRows]] = []
    for batch in batches:
        rows_of_batch = teacher.run(batch, config)
        if rows_of_batch is None:
            continue
        _check_taught(teacher, batch.windows, rows_of_batch)
        numbers, offsets, own = batch.windows.rows
        at = starts[numbers[own] - documents.start] + offsets[own]
        found.append((at, rows_of_batch[own]))
    width = max((part.ids.shape[1] for _, part in found), default=0)
    rows = TeacherRows.empty(int(lengths.sum()), width, config.row_statistics)
    for at, part in found:
        rows.put(at, part)
    return rows


def _check_taught(teacher: Teacher, windows: Windows, rows: TeacherRows) -> None:
    """A window's tokens all have a next one, so each has a distribution."""
    if len(empty := np.flatnonzero(rows.counts == 0)):
        documents, offsets, _ = windows.rows
        raise UserError(
            f"{teacher.identity.get('teacher', 'The teacher')} gives no distribution at document "
            f"{documents[empty[0]]}, offset {offsets[empty[0]]}: its probabilities are not numbers "
            "or all 0. Check its weights, and the precision that it runs in."
        )
