"""What `megatron-pd dump` does with any teacher: its flags, and every corpus of `--data-path`."""

import argparse
from collections.abc import Sequence

from megatron_pd.data.corpus import MegatronCorpus, store_path_of
from megatron_pd.errors import UserError, if_stopped
from megatron_pd.options import add_options
from megatron_pd.teacher.dump import dump
from megatron_pd.teacher.dump_config import DumpConfig
from megatron_pd.teacher.protocol import Teacher

__all__ = ["add_dump_arguments", "checked_corpora", "dump_corpora"]


def add_dump_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The group of the `--dump-*` flags."""
    group = parser.add_argument_group(title="teacher dump")
    group.add_argument(
        "--dump-store",
        default=None,
        help="Store to write, where --data-path is one corpus. Default: <prefix>.pd beside it.",
    )
    add_options(group, DumpConfig, "dump")
    return group


def checked_corpora(prefixes: Sequence[str], store: str | None) -> list[MegatronCorpus]:
    """The corpora of `--data-path`. Raises UserError where one is missing or damaged, or
    `--dump-store` names one store for several."""
    if store is not None and len(prefixes) > 1:
        raise UserError(
            f"--dump-store names one store, --data-path {len(prefixes)} corpora: leave it out, and "
            "each gets <prefix>.pd, or dump them one by one."
        )
    return [MegatronCorpus(prefix) for prefix in prefixes]


def dump_corpora(
    teacher: Teacher, prefixes: Sequence[str], store: str | None, config: DumpConfig
) -> None:
    """Write the store of every corpus, or what is still missing of them."""
    for prefix in prefixes:
        with if_stopped("the same command goes on after the rows that were written"):
            dump(teacher, MegatronCorpus(prefix), store or store_path_of(prefix), config)
