"""The teacher data of a training run: one logit store per training corpus, checked against it."""

import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from megatron_pd.data.corpus import (
    MegatronCorpus,
    store_path_of,
    training_prefixes,
)
from megatron_pd.data.tokenizer import tokenizer_fingerprint
from megatron_pd.distill.config import PDConfig
from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore
from megatron_pd.store.admin.scan import sampled_documents

__all__ = ["TeacherData", "check_same_everywhere", "open_teacher_data"]

_FEW_TAUGHT = 0.01
_SAMPLED_ROWS = 1 << 16


@dataclass(frozen=True)
class TeacherData:
    stores: dict[str, str]
    """Corpus prefix → path of its logit store."""

    columns: int
    """K: the most entries of any row that training reads."""

    statistic: str | None
    """The per-row statistic that training reads too: PDConfig.row_statistic."""

    identities: tuple[tuple[str, str], ...]
    """(path, store id) of every store."""


def open_teacher_data(args: Any, config: PDConfig) -> TeacherData:
    """Find and check the store of every training corpus.

    Every rank opens the stores, which reads kilobytes; the first of each machine also compares them
    with the corpora there, by a sample of their tokens. `check_same_everywhere` does the rest, once
    the ranks can talk to each other.

    Raises:
        UserError: a store that is missing, incomplete, or of another corpus, tokenizer or
            vocabulary.
    """
    prefixes = training_prefixes(args)
    paths = config.store or tuple(map(store_path_of, prefixes))
    if len(paths) != len(prefixes):
        raise UserError(
            f"--pd-store names {len(paths)} stores for {len(prefixes)} training corpora: give one "
            "for each prefix, in the same order."
        )
    tokenizer = build_tokenizer(args)
    columns = 0
    identities = []
    for prefix, path in zip(prefixes, paths, strict=True):
        corpus = MegatronCorpus(prefix)
        store = _open_store(prefix, path)
        _check_tokenizer(store, path, tokenizer)
        _check_kind(store, path, config)
        _check_statistic(store, path, config)
        _check_entries(store, path)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            store.check_corpus(corpus)
        if int(os.environ.get("RANK", "0")) == 0:
            for note in _notes(store, path, config):
                print(note, flush=True)
        identities.append((path, f"{store.store_id:016x}"))
        columns = max(columns, store.max_count)
    if config.top_k is not None:
        columns = min(columns, config.top_k)
    return TeacherData(
        dict(zip(prefixes, paths, strict=True)), columns, config.row_statistic, tuple(identities)
    )


def check_same_everywhere(data: TeacherData) -> None:
    """Raise UserError, on all ranks, where some rank reads other stores than the first one."""
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, (socket.gethostname(), data.identities))
    for rank, (host, identities) in enumerate(ranks):
        for (path, here), (_, there) in zip(identities, ranks[0][1], strict=True):
            if here != there:
                raise UserError(
                    f"{path} on {host} (rank {rank}) is another store, id {here}, than the one "
                    f"that rank 0 reads, id {there}: copy the same store to every machine, or put "
                    "it on a shared file system."
                )


def _open_store(prefix: str, path: str) -> LogitStore:
    if not os.path.isdir(path):
        raise UserError(
            f"{path} does not exist: the corpus {prefix} has no logit store. Make one with "
            f"`megatron-pd dump --data-path {prefix}`, or name it with --pd-store."
        )
    return LogitStore(path)


def _check_tokenizer(store: LogitStore, path: str, tokenizer: Any) -> None:
    if store.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{path} holds ids of a vocabulary of {store.vocab_size:,}, but the tokenizer has "
            f"{tokenizer.vocab_size:,}: distil from a teacher with the student's tokenizer."
        )
    expected, found = store.metadata.get("tokenizer"), tokenizer_fingerprint(tokenizer)
    if expected is not None and expected != found:
        raise UserError(
            f"{path} was dumped with another tokenizer (fingerprint {expected}, this run's is "
            f"{found}): give the --tokenizer-model that the teacher used."
        )


def _check_kind(store: LogitStore, path: str, config: PDConfig) -> None:
    if config.tail_policy.of_draws and not store.draws:
        raise UserError(
            f"{path} holds the teacher's top tokens, and --pd-tail {config.tail} reads random "
            "draws: dump a store of draws with `megatron-pd dump --dump-sampled 50`, or choose "
            "another --pd-tail."
        )
    if store.draws and not config.tail_policy.of_draws:
        raise UserError(
            f"{path} holds {store.draws} random draws for each token, which --pd-tail "
            f"{config.tail} would take for the head of the distribution: give --pd-tail sampled "
            "and no temperature or truncation, or a store that was dumped without --dump-sampled."
        )


def _check_entries(store: LogitStore, path: str) -> None:
    if store.num_entries == 0:
        raise UserError(
            f"{path} holds no entry at all, so there is nothing to distil from: was the teacher's "
            "output not finite? Dump it again, or train without --pd-* flags."
        )


def _notes(store: LogitStore, path: str, config: PDConfig) -> list[str]:
    """What is allowed and perhaps not meant: few tokens with a teacher, a store that can't be
    compared with its corpus, a configuration that asks for more than the store holds."""
    notes = []
    if (share := _taught_share(store)) < _FEW_TAUGHT:
        notes.append(
            f"warning: about {share:.2%} of the tokens of {path} have a teacher; all others train "
            "on the LM loss alone. `megatron-pd stats` counts them."
        )
    if unbound := store.unbound_documents():
        notes.append(
            f"note: {path} holds no digests of the tokens of {sum(map(len, unbound)):,} of its "
            f"{store.num_documents:,} documents (from {unbound[0].start} to {unbound[-1].stop - 1})"
            ", so only their lengths could be compared; `megatron-pd convert from-parquet "
            "--corpus` makes a bound store."
        )
    for name, limit in (("top-p", config.top_p), ("top-k", config.top_k)):
        stored = store.metadata.get(name.replace("-", "_"))
        if limit is not None and stored is not None and limit > stored:
            notes.append(
                f"note: {path} was dumped with --dump-{name} {stored}, so --pd-{name} {limit} cuts "
                "nothing more."
            )
    return notes


def _taught_share(store: LogitStore) -> float:
    """About which share of the tokens has a teacher, from a sample of the documents."""
    taught = rows = 0
    for document in sampled_documents(store, _SAMPLED_ROWS).tolist():
        counts = store.read(document, 0, min(store.document_length(document), 4096)).counts
        taught, rows = taught + int((counts > 0).sum()), rows + len(counts)
    return taught / max(1, rows)


def _check_statistic(store: LogitStore, path: str, config: PDConfig) -> None:
    statistic = config.row_statistic
    if statistic is not None and (lacking := store.documents_without(statistic)):
        raise UserError(
            f"{path}: documents {lacking[0].start} to {lacking[0].stop - 1} have no statistic "
            f"{statistic!r}, which --pd-adaptive-temperature {config.adaptive_temperature} reads "
            "for every row: dump the teacher again with --dump-statistics, or choose wttm or a "
            "fixed --pd-temperature."
        )
