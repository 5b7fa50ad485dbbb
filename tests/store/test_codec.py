"""What the codec stores is what the format's page says, for any rows that a store can hold."""

from __future__ import annotations

import os
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from independent_reader import EntropyModel, read_store

from megatron_pd.store import LogitStore, LogitStoreWriter, StoreError, TeacherRows
from megatron_pd.store.admin.verify import verify_store


def top_rows(rng: np.random.Generator, n: int, vocab_size: int, width: int) -> TeacherRows:
    """Rows from flat to so peaked that float32 has no more room, the last one empty."""
    rows = TeacherRows.empty(n, width)
    for row in range(n - 1):
        count = int(rng.integers(0, min(width, vocab_size) + 1))
        logits = rng.normal(0, 10 ** rng.uniform(-2, 1.5), vocab_size + 1)
        if rng.random() < 0.1:
            logits[:] = 0  # ties
        logprobs = (logits - np.logaddexp.reduce(logits))[:vocab_size]
        best = np.argsort(-logprobs, kind="stable")[:count]
        rows.ids[row, :count] = rng.permutation(vocab_size)[:count]
        rows.logprobs[row, :count] = np.maximum(logprobs[best], -200)
        rows.counts[row] = count
    return rows


def sampled_rows(rng: np.random.Generator, n: int, vocab_size: int, draws: int) -> TeacherRows:
    rows = TeacherRows.empty(n, draws)
    for row in range(n - 1):
        if rng.random() < 0.1:
            continue
        weights = rng.dirichlet(np.full(vocab_size, 10 ** rng.uniform(-3, 1)))
        times = rng.multinomial(draws, weights)
        ids = np.argsort(-times, kind="stable")[: np.count_nonzero(times)]
        rows.ids[row, : len(ids)] = ids
        rows.logprobs[row, : len(ids)] = np.log(times[ids] / draws)
        rows.counts[row] = len(ids)
    return rows


def bits_of(values: np.ndarray) -> np.ndarray:
    """float32 as whole numbers that count steps between neighbours."""
    return np.asarray(values, np.float32).view(np.int32).astype(np.int64)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([1, 2, 63, 64, 65, 1000, 70_000]),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    codec=st.sampled_from(["exact", "compact", "compact", "compact"]),
    value_bits=st.integers(8, 14),
    draws=st.sampled_from([0, 0, 1, 7, 50]),
    statistics=st.sets(st.sampled_from(["label_logprob", "entropy", "std"])),
)
def test_an_independent_reader_finds_the_rows(
    seed, vocab_size, lengths, codec, value_bits, draws, statistics
):
    rng = np.random.default_rng(seed)
    given_rows = []
    for n in lengths:
        rows = (
            sampled_rows(rng, n, vocab_size, draws) if draws else top_rows(rng, n, vocab_size, 20)
        )
        extra = {
            name: rng.normal(size=n).astype(np.float16).astype(np.float32) for name in statistics
        }
        given_rows.append(TeacherRows(rows.ids, rows.logprobs, rows.counts, extra))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        kind = "sampled" if draws else "top"
        with LogitStoreWriter(
            path,
            vocab_size=vocab_size,
            document_lengths=np.array(lengths),
            metadata={},
            codec=codec,
            value_bits=value_bits,
            statistics=statistics,
            kind=kind,
            draws=draws,
        ) as writer:
            for document in rng.permutation(len(lengths)).tolist():
                writer.append(document, 0, given_rows[document])
                if rng.random() < 0.3:
                    writer.flush()
        assert verify_store(path) == []
        store, independent = LogitStore(path), read_store(path)
        for document, rows in enumerate(given_rows):
            check_document(
                store.read(document), independent[document], rows, codec, value_bits, draws
            )


def check_document(
    found, independent, rows: TeacherRows, codec: str, value_bits: int, draws: int
) -> None:
    np.testing.assert_array_equal(found.counts, rows.counts)
    names = [name for name in ("label_logprob", "entropy", "std") if name in rows.statistics]
    for row, (ids, logprobs, statistics) in enumerate(independent):
        count = int(rows.counts[row])
        here = (found.ids[row, :count], found.logprobs[row, :count])
        np.testing.assert_array_equal(ids, here[0])
        # The last bit is the mathematical library's.
        assert np.abs(bits_of(np.array(logprobs)) - bits_of(here[1])).max(initial=0) <= 1
        assert statistics == [float(rows.statistics[name][row]) for name in names]
        assert statistics == [float(found.statistics[name][row]) for name in names]
        check_row(here, (rows.ids[row, :count], rows.logprobs[row, :count]), codec, value_bits)
        if not draws:
            assert ids[:1] == rows.ids[row, : min(count, 1)].tolist()  # also where it is tied


def check_row(found, given_row, codec: str, value_bits: int) -> None:
    """The same ids in the same order but for ties, and a distribution as near as is promised."""
    ids, logprobs = (np.asarray(part) for part in given_row)
    assert set(found[0].tolist()) == set(ids.tolist())
    assert (np.diff(found[1]) <= 0).all()
    if codec == "exact":
        np.testing.assert_array_equal(found[0], ids)
        np.testing.assert_array_equal(found[1], logprobs)
        return
    order = {id_: place for place, id_ in enumerate(found[0].tolist())}
    log_q = found[1].astype(np.float64)[[order[id_] for id_ in ids.tolist()]]
    log_p = logprobs.astype(np.float64)
    p, q = np.exp(log_p), np.exp(log_q)
    tail_p, tail_q = max(1 - p.sum(), 0.0), max(1 - q.sum(), 1e-9)
    kl = (p * (log_p - log_q)).sum() + (tail_p * np.log(tail_p / tail_q) if tail_p > 1e-7 else 0)
    assert q.sum() <= 1 + 1e-6
    steps = 75 * 2 ** (value_bits - 8)
    assert kl <= min(0.52 * (len(ids) + 1) / steps**2, 0.0069) + 2e-6


def test_widest_vocabulary(tmp_path, rng):
    """Ids of 24 bits, in both codecs."""
    vocab_size = 1 << 24
    rows = top_rows(rng, 20, 1000, 8)
    rows.ids[rows.ids >= 0] += vocab_size - 1000
    for codec in ("exact", "compact"):
        path = tmp_path / codec
        lengths = np.array([len(rows)])
        with LogitStoreWriter(
            path, vocab_size=vocab_size, document_lengths=lengths, metadata={}, codec=codec
        ) as writer:
            writer.append(0, 0, rows)
        found = LogitStore(path).read(0)
        for row, count in enumerate(rows.counts):
            given_row = rows.ids[row, :count], rows.logprobs[row, :count]
            check_row((found.ids[row, :count], found.logprobs[row, :count]), given_row, codec, 10)


def test_rows_of_several_kinds(tmp_path, rng):
    """Enough rows for classes of them."""
    rows_per_kind, kinds, width, vocab_size = 700, 4, 50, 3000
    n = rows_per_kind * kinds + 1
    rows = TeacherRows.empty(n, width)
    weights = 1 / np.arange(1, vocab_size + 1)
    rankings = [rng.permutation(vocab_size) for _ in range(kinds)]
    for row in range(n - 1):
        top = np.argsort(-np.log(weights) + np.log(rng.exponential(size=vocab_size)))[:width]
        rows.ids[row] = rankings[rng.integers(kinds)][top]
        rows.logprobs[row] = np.log(weights[top] / weights.sum())
        rows.logprobs[row] = -np.sort(-rows.logprobs[row])
        rows.counts[row] = width
    with LogitStoreWriter(
        tmp_path / "s", vocab_size=vocab_size, document_lengths=np.array([n]), metadata={}
    ) as writer:
        writer.append(0, 0, rows)
    store = LogitStore(tmp_path / "s")
    check_document(store.read(0), read_store(tmp_path / "s")[0], rows, "compact", 10, 0)
    data = next((tmp_path / "s").glob("*.shard")).read_bytes()
    model = EntropyModel(
        data[64 + 48 : 64 + 48 + int.from_bytes(data[64 + 12 : 64 + 16], "little")]
    )
    firsts = set(rows.ids[:-1, 0].tolist())
    classes = {
        model.class_of[min(model.id_of_ordinal.index(i), len(model.class_of) - 1)] for i in firsts
    }
    assert len(classes) == 2


def with_checksums(data: bytearray, offset: int) -> bytes:
    """A shard whose frame at `offset` was changed, its checksums made right again."""
    size = int.from_bytes(data[offset + 12 : offset + 16], "little")
    crc = zlib.crc32(data[offset + 48 : offset + 48 + size])
    data[offset + 40 : offset + 44] = crc.to_bytes(4, "little")
    data[offset + 44 : offset + 48] = zlib.crc32(data[offset : offset + 44]).to_bytes(4, "little")
    return bytes(data)


def test_damage_is_named_with_what_was_expected(tmp_path, rng):
    lengths = np.array([40])
    with LogitStoreWriter(
        tmp_path, vocab_size=50, document_lengths=lengths, metadata={}, codec="compact"
    ) as writer:
        writer.append(0, 0, top_rows(rng, 40, 50, 8))
    shard = next(tmp_path.glob("*.shard"))
    sound = shard.read_bytes()
    model_at = 64
    block_at = sound.index(b"PDBK\x02")
    elsewhere = int(rng.choice([0, 63, 65, block_at, len(sound) - 70, 2**40]))
    referencing = bytearray(sound)
    referencing[block_at + 24 : block_at + 32] = elsewhere.to_bytes(8, "little")
    zeros = bytearray(sound)
    zeros[model_at + 48 + 8 : block_at] = bytes(block_at - model_at - 56)
    for data, at, sentence in [
        (referencing, block_at, f"it references byte {elsewhere}, which holds no entropy model"),
        (zeros, model_at, "unary code exceeds its maximum"),
    ]:
        shard.write_bytes(with_checksums(data, at))
        with pytest.raises(StoreError, match=f"the block at byte {block_at}: .*{sentence}"):
            LogitStore(tmp_path).read(0)
        assert sentence in verify_store(tmp_path)[0]


def test_hostile_bytes_under_sanitizers(tmp_path):
    """100,000 mutated entropy models, blocks and shards: errors, no crash, no id out of range."""
    here = Path(__file__).parent
    codec = here.parents[1] / "csrc" / "logit_codec"
    program = tmp_path / "fuzz_codec"
    sources = [
        here / "fuzz_codec.cpp",
        *sorted(set(codec.rglob("*.cpp")) - {codec / "bindings.cpp"}),
    ]
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    flags = ("-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *sanitize, f"-I{codec}")
    compiler = os.environ.get("CXX", "g++").split()
    subprocess.run([*compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    seed = str(np.random.SeedSequence().entropy % 2**64)  # type: ignore[operator]
    print("seed", seed)
    done = subprocess.run([program, "100000", seed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    refused = int(done.stdout.split()[0])
    assert 50_000 < refused < 100_000  # most mutations show, some don't change what is read
