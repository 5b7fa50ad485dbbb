"""The teacher's offline pass over the sequences that training packs (`--dump-context packed`).

The samples of a training run, in runs of some 65,000 tokens, are dealt out to the teacher's
replicas; each run's rows become a segment of a journal, which lies beside the store until all are
there. Then the segments are collected, by every replica that comes to it, and the journal goes.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from tqdm import tqdm

from megatron_pd.data.addresses import ADDRESSES, AddressedGPTDataset, AddressedGPTDatasetConfig
from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.dataset import dataset_fields
from megatron_pd.data.windows import Batch, Windows
from megatron_pd.errors import UserError, if_stopped
from megatron_pd.store import LogitStore, StoreError, TeacherRows
from megatron_pd.store.format import MANIFEST_NAME
from megatron_pd.teacher.beside import Beside
from megatron_pd.teacher.dump_config import DumpConfig
from megatron_pd.teacher.journal.collect import collect_beside_others, collections_of
from megatron_pd.teacher.journal.segments import (
    Journal,
    fingerprint_of,
    segment_name,
    write_segment,
)
from megatron_pd.teacher.protocol import Teacher

__all__ = ["check_packed", "dump_packed"]

_SEGMENT_TOKENS = 1 << 16


def check_packed(args: Any) -> None:
    """Raises UserError for flags with which the teacher would see something else than training."""
    for flag, given in {
        "--reset-position-ids": args.reset_position_ids,
        "--reset-attention-mask": args.reset_attention_mask,
    }.items():
        if given:
            raise UserError(
                f"{flag} separates the documents of a sequence, which --dump-context packed runs "
                "as one: leave it out, or take --dump-context document."
            )
    if args.mock_data or args.sft or args.fim_data:
        raise UserError("--mock-data, --sft and --fim-data have no sequences of --data-path.")


def dump_packed(
    teacher: Teacher, stores: Mapping[str, Path], args: Any, config: DumpConfig
) -> None:
    """Write the stores of all corpora, or what is still missing of them. Every rank calls it.

    Args:
        stores: corpus prefix → its store.
        args: Megatron's validated arguments, with the training run's data flags.
    Raises:
        StoreError: a store, or the journal, was begun with another teacher or configuration.
        UserError: the teacher gave something that is no distribution.
    """
    description = _described(teacher, stores, config)
    path = Path(f"{next(iter(stores.values()))}.samples")
    _check_begun(stores, description)
    is_done = _all_whole(stores)
    if teacher.share(np.array([is_done], np.int64) if teacher.writes else None)[0]:
        shutil.rmtree(path, ignore_errors=True)  # had the last run no time for it
        return
    dataset = _dataset(args, config, tuple(stores))
    run = Journal.begin(path, description).only_run()
    segments = _segments_of(run, min(len(dataset), config.samples or 0), config.sequence_length)
    with if_stopped("the same command goes on after the sequences that were written"):
        _write_segments(teacher, dataset, segments, description, config)
        if teacher.writes and all(segment.is_dir() for segment in segments):
            _collect(teacher, path, stores)


def _described(teacher: Teacher, stores: Mapping[str, Path], config: DumpConfig) -> dict[str, Any]:
    return {
        "corpora": list(stores),
        "fingerprints": [fingerprint_of(MegatronCorpus(prefix)) for prefix in stores],
        "vocab_size": teacher.vocab_size,
        "draws": config.sampled or 0,
        "codec": config.codec,
        "value_bits": config.value_bits,
        "row_statistics": list(config.row_statistics),
        "teacher": {**teacher.identity, **config.identity},
    }


def _check_begun(stores: Mapping[str, Path], description: Mapping[str, Any]) -> None:
    """What is there is of this teacher and configuration: said before the teacher runs."""
    expected = description["teacher"]
    for path in stores.values():
        if not (path / MANIFEST_NAME).exists():
            continue
        found = LogitStore(path, allow_partial=True).metadata
        for name, value in json.loads(json.dumps(expected)).items():
            if name != "teacher" and found.get(name) != value:
                raise StoreError(
                    f"{path}: the store was begun with {name} {found.get(name)!r}, now {value!r}. "
                    "Go on with what it was begun with, or write another store."
                )


def _all_whole(stores: Mapping[str, Path]) -> bool:
    try:
        return all(LogitStore(path) for path in stores.values())
    except StoreError:
        return False


def _dataset(args: Any, config: DumpConfig, corpora: tuple[str, ...]) -> Any:
    """The run's training samples, in their order."""
    fields = AddressedGPTDatasetConfig(**dataset_fields(args), corpora=corpora)
    sizes = [config.samples, 0, 0]
    builder = BlendedMegatronDatasetBuilder(AddressedGPTDataset, sizes, lambda: True, fields)
    return builder.build()[0]


def _segments_of(run: Path, samples: int, sequence_length: int) -> dict[Path, range]:
    """Segment → its samples: a function of its arguments, so that a dump finds them again."""
    step = max(1, _SEGMENT_TOKENS // sequence_length)
    return {
        run / segment_name("samples", number): range(start, min(samples, start + step))
        for number, start in enumerate(range(0, samples, step))
    }


def _write_segments(
    teacher: Teacher,
    dataset: Any,
    segments: Mapping[Path, range],
    description: Mapping[str, Any],
    config: DumpConfig,
) -> None:
    progress = tqdm(
        total=sum(map(len, segments.values())) * config.sequence_length,
        desc="dump sequences",
        unit=" tokens",
        unit_scale=True,
        disable=not (teacher.writes and teacher.replica == 0),
    )
    with progress, Beside() as beside:
        for number, (path, samples) in enumerate(segments.items()):
            if number % teacher.replicas == teacher.replica:
                is_there = np.array([path.is_dir()], np.int64) if teacher.writes else None
                if not teacher.share(is_there)[0]:
                    parts = list(_rows_of(teacher, dataset, samples, config))
                    if teacher.writes:
                        beside.run(write_segment, path, parts, description)
            progress.update(len(samples) * config.sequence_length)


def _rows_of(
    teacher: Teacher, dataset: Any, samples: range, config: DumpConfig
) -> Iterator[tuple[np.ndarray, int, TeacherRows]]:
    """What `write_segment` takes of each sample; nothing on ranks that don't write."""
    length = config.sequence_length
    for first in range(samples.start, samples.stop, config.batch_size):
        numbers = np.arange(first, min(samples.stop, first + config.batch_size))
        chosen = [dataset[number] for number in numbers.tolist()]
        zeros = np.zeros_like(numbers)
        batch = Batch(
            Windows(numbers, zeros, np.full_like(numbers, length), zeros),
            torch.stack([sample["tokens"] for sample in chosen]),
            torch.stack([sample["labels"] for sample in chosen]),
        )
        try:
            rows = teacher.run(batch, config)
        except UserError as error:
            raise UserError(f"{error} A document is a sample of the training run here.") from None
        if rows is not None:
            for index, (number, sample) in enumerate(zip(numbers.tolist(), chosen, strict=True)):
                own = rows[index * length : (index + 1) * length]
                yield sample[ADDRESSES].numpy(), number + 1, own


def _collect(teacher: Teacher, path: Path, stores: Mapping[str, Path]) -> None:
    try:
        collections = collections_of(Journal(path), stores)
        is_whole = collect_beside_others(collections, teacher.replica, teacher.replicas)
    except (StoreError, OSError):
        if not _all_whole(stores):  # else another replica has ended it, and removed the journal
            raise
        return
    if is_whole:
        shutil.rmtree(path, ignore_errors=True)
