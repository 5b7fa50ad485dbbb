"""The teacher data of a training run: one logit store per training corpus, checked against it."""

import os
from dataclasses import dataclass
from typing import Any

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

__all__ = ["TeacherData", "open_teacher_data"]


@dataclass(frozen=True)
class TeacherData:
    stores: dict[str, str]
    """Corpus prefix → path of its logit store."""

    columns: int
    """K: the most entries of any row that training reads."""

    statistic: str | None
    """The per-row statistic that training reads too: PDConfig.row_statistic."""


def open_teacher_data(args: Any, config: PDConfig) -> TeacherData:
    """Find and check the store of every training corpus.

    Every rank opens the stores, which reads kilobytes; the first also compares them with the
    corpora, by a sample of their tokens.

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
    for prefix, path in zip(prefixes, paths, strict=True):
        corpus = MegatronCorpus(prefix)
        store = _open_store(prefix, path)
        _check_tokenizer(store, path, tokenizer)
        _check_kind(store, path, config)
        _check_statistic(store, path, config)
        if int(os.environ.get("RANK", "0")) == 0:
            store.check_corpus(corpus)
            for note in _truncation_notes(store, path, config):
                print(note, flush=True)
        columns = max(columns, store.max_count)
    if config.top_k is not None:
        columns = min(columns, config.top_k)
    return TeacherData(
        dict(zip(prefixes, paths, strict=True)), columns, statistic=config.row_statistic
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
    if config.tail == "sampled" and not store.draws:
        raise UserError(
            f"{path} holds the teacher's top tokens, and --pd-tail sampled reads random "
            "draws: dump a store of draws with `megatron-pd dump --dump-sampled 50`, or choose "
            "another --pd-tail."
        )
    if config.tail != "sampled" and store.draws:
        raise UserError(
            f"{path} holds {store.draws} random draws for each token, which --pd-tail "
            f"{config.tail} would take for the head of the distribution: give --pd-tail sampled "
            "and no temperature or truncation, or a store that was dumped without --dump-sampled."
        )


def _truncation_notes(store: LogitStore, path: str, config: PDConfig) -> list[str]:
    """Where the configuration, perhaps by its recipe, asks for more than the store holds."""
    notes = []
    for name, limit in (("top-p", config.top_p), ("top-k", config.top_k)):
        stored = store.metadata.get(name.replace("-", "_"))
        if limit is not None and stored is not None and limit > stored:
            notes.append(
                f"note: {path} was dumped with --dump-{name} {stored}, so --pd-{name} {limit} cuts "
                "nothing more."
            )
    return notes


def _check_statistic(store: LogitStore, path: str, config: PDConfig) -> None:
    statistic = config.row_statistic
    if statistic is not None and statistic not in store.read(0, 0, 1).statistics:
        raise UserError(
            f"{path} has no statistic {statistic!r}, which --pd-adaptive-temperature "
            f"{config.adaptive_temperature} reads for every row: dump the teacher again with "
            "--dump-statistics, or choose wttm or a fixed --pd-temperature."
        )
