"""Megatron's cached logits, written by its own saver in its own sample order, become stores whose
every row is the one that the teacher gave for this token.

No token of the corpora is the same as another, so that a sample's tokens tell where they come from.
"""

from __future__ import annotations

import itertools
import shutil
import sys

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training.arguments import parse_args
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from megatron.training.distillation import logits_saver
from megatron.training.global_vars import set_args

from megatron_pd.cli import main
from megatron_pd.data.corpus import MegatronCorpus, store_path_of
from megatron_pd.data.dataset import dataset_fields
from megatron_pd.data.order import SampleSpan
from megatron_pd.store import LogitStore, LogitStoreWriter, TeacherRows
from megatron_pd.store.ragged import MAX_MASS
from megatron_pd.teacher.cached_logits.convert import _rows_of
from megatron_pd.teacher.cached_logits.tars import sample_rows

VOCAB, PADDED = 1500, 1536
SEQUENCE, MICRO_BATCH, MICRO_BATCHES, DP, CP = 32, 2, 2, 2, 2
BATCH = MICRO_BATCH * MICRO_BATCHES * DP
ITERATIONS, SAVED_AFTER = 12, (3, 7, 11)
TOP_P, TOP_K = 0.9, 12


class Run:
    """A teacher's run: its flags, its corpora, and the tars that Megatron's saver wrote."""

    def __init__(self, folder, monkeypatch) -> None:
        self.folder, self.tars = folder, folder / "tars"
        self.rng = np.random.default_rng()
        self.prefixes = [str(folder / name) for name in ("a", "b")]
        cuts = np.sort(self.rng.choice(np.arange(1, VOCAB - 1), 60, replace=False))
        documents = np.split(np.arange(VOCAB - 1), cuts)
        self.documents = {self.prefixes[0]: documents[:40], self.prefixes[1]: documents[40:]}
        for prefix, own in self.documents.items():
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
            for tokens in own:
                builder.add_document(tokens, [len(tokens)])
            builder.finalize(f"{prefix}.idx")
        # What follows a token is likely, some padding of the vocabulary is too. No two are equal.
        shares = (np.arange(PADDED) + 0.5) / PADDED
        logits = np.tile(np.log(shares / (1 - shares)), (VOCAB, 1)).astype(np.float32)
        logits = self.rng.permuted(logits, axis=1)
        logits[np.arange(VOCAB - 1), np.arange(1, VOCAB)] += 8
        self.logits = torch.from_numpy(logits)
        self.flags = {
            "--data-path": f"0.7 {self.prefixes[0]} 0.3 {self.prefixes[1]}",
            "--split": "90,10,0",
            "--seed": "77",
            "--seq-length": str(SEQUENCE),
            "--train-iters": str(ITERATIONS),
            "--global-batch-size": str(BATCH),
            "--tokenizer-type": "NullTokenizer",
            "--vocab-size": str(VOCAB),
            "--logits-save-dir": str(self.tars),
        }
        self.save(monkeypatch)

    def words(self, **changed) -> list[str]:
        flags = {**self.flags, **{f"--{k.replace('_', '-')}": v for k, v in changed.items()}}
        return [word for flag, value in flags.items() for word in (flag, *str(value).split())]

    def save(self, monkeypatch) -> None:
        """What `pretrain()` does about data and logits, for one rank after another."""
        monkeypatch.setattr(sys, "argv", ["teacher", *self.words()])
        args = parse_args()
        set_args(args)
        config = GPTDatasetConfig(**dataset_fields(args))
        sizes = [ITERATIONS * BATCH, 0, 0]
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
        dataset = builder.build()[0]
        state = logits_saver.parallel_state
        for name in ("tensor_model_parallel_rank", "tensor_model_parallel_src_rank"):
            monkeypatch.setattr(state, f"get_{name}", lambda: 0)
        monkeypatch.setattr(state, "get_tensor_model_parallel_world_size", lambda: 1)
        monkeypatch.setattr(state, "get_tensor_model_parallel_group", lambda: None)
        for dp, cp in itertools.product(range(DP), range(CP)):
            monkeypatch.setattr(state, "get_data_parallel_rank", lambda dp=dp: dp)
            monkeypatch.setattr(state, "get_context_parallel_rank", lambda cp=cp: cp)
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: CP)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, cp=cp: cp)
            saver = logits_saver.LogitsSaverHooks(str(self.tars), TOP_K, p=TOP_P)
            batches = iter(MegatronPretrainingSampler(len(dataset), 0, MICRO_BATCH, dp, DP))
            for iteration in range(ITERATIONS):
                args.curr_iteration = iteration
                saved = []
                for _ in range(MICRO_BATCHES):
                    tokens = torch.stack([dataset[i]["tokens"] for i in next(batches)])
                    mine = get_batch_on_this_cp_rank({"tokens": tokens}, is_hybrid_cp=False)
                    saved.append(saver._process_single_microbatch(self.logits[mine["tokens"].T]))
                saver._buffer_iteration(*map(list, zip(*saved, strict=True)))
                if iteration in SAVED_AFTER:
                    saver._write_batched_tar(*saver.take_pending_data())
        monkeypatch.undo()
        self.samples = [set(dataset[i]["tokens"].tolist()) for i in range(ITERATIONS * BATCH)]
        self.seen = set().union(*self.samples)

    def expected(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """Dense: what a token's row must hold."""
        logprobs = torch.log_softmax(self.logits[token].double(), -1).numpy()
        order = np.argsort(-logprobs)[:TOP_K]
        before = np.cumsum(np.exp(logprobs[order])) - np.exp(logprobs[order])
        kept = order[(before < TOP_P) & (order < VOCAB)]
        return kept, logprobs[kept]

    def check(self, stores: dict[str, LogitStore], seen: set[int]) -> None:
        for prefix, own in self.documents.items():
            store = stores[prefix]
            store.check_corpus(MegatronCorpus(prefix), full=True)
            for document, tokens in enumerate(own):
                rows = store.read(document)
                taught = [t in seen and j + 1 < len(tokens) for j, t in enumerate(tokens.tolist())]
                np.testing.assert_array_equal(rows.counts > 0, taught)
                for row in np.flatnonzero(taught):
                    ids, logprobs = self.expected(tokens[row])
                    assert rows.counts[row] == len(ids)
                    np.testing.assert_array_equal(rows.ids[row, : len(ids)], ids)
                    found = rows.logprobs[row, : len(ids)]
                    np.testing.assert_allclose(found, logprobs, rtol=6e-4, atol=1e-6)  # fp16's
                    np.testing.assert_array_equal(found, found.astype(np.float16))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Run(tmp_path_factory.mktemp("run"), monkeypatch)
    set_args(None)


def convert(run: Run, monkeypatch, *words, **changed) -> int:
    command = ["megatron-pd", "convert", "from-megatron", *run.words(**changed), *words]
    monkeypatch.setattr(sys, "argv", command)
    return main()


EXACT = ("--convert-codec", "exact", "--convert-workers", "2")


def stores(run: Run) -> dict[str, LogitStore]:
    return {prefix: LogitStore(store_path_of(prefix)) for prefix in run.prefixes}


def remove_stores(run: Run) -> None:
    for prefix in run.prefixes:
        shutil.rmtree(store_path_of(prefix))


def test_every_row_is_the_teachers(run, monkeypatch, capsys):
    assert convert(run, monkeypatch, *EXACT) == 0
    assert len(run.seen) > 1000
    run.check(stores(run), run.seen)
    assert not (run.folder / "a.pd.samples").exists()
    assert convert(run, monkeypatch, *EXACT) == 0  # nothing left to do
    with open(f"{run.prefixes[1]}.bin", "r+b") as file:
        there = file.read(1)
        file.seek(0)
        file.write(bytes([there[0] ^ 1]))
        file.flush()
        with pytest.raises(SystemExit):
            convert(run, monkeypatch, *EXACT)
        file.seek(0)
        file.write(there)
    assert "document 0 has other tokens" in capsys.readouterr().err
    metadata = LogitStore(store_path_of(run.prefixes[0])).metadata
    assert (metadata["top_k"], metadata["top_p"], metadata["run"]["seed"]) == (TOP_K, TOP_P, 77)
    remove_stores(run)


def test_interrupted_conversion_goes_on(run, monkeypatch):
    from megatron_pd.store.writer import LogitStoreWriter

    monkeypatch.setattr("megatron_pd.teacher.cached_logits.convert._FLUSH_ROWS", 64)
    append = LogitStoreWriter.append
    for stop_after in (run.rng.integers(1, 200), run.rng.integers(1, 60)):
        left = stop_after

        def stopping(self, *what):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            append(self, *what)

        monkeypatch.setattr(LogitStoreWriter, "append", stopping)
        with pytest.raises(SystemExit):
            convert(run, monkeypatch, "--convert-codec", "exact", "--convert-workers", "1")
    monkeypatch.setattr(LogitStoreWriter, "append", append)
    assert convert(run, monkeypatch, "--convert-codec", "exact", "--convert-workers", "1") == 0
    run.check(stores(run), run.seen)
    remove_stores(run)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"seed": 78}, "give the teacher run's --seed"),
        ({"seq_length": 16}, "--seq-length"),
        ({"train_iters": 13}, "--train-samples"),
        ({"global_batch_size": 16}, "--global-batch-size is 16"),
        ({"split": "50,50,0"}, "--split"),
        ({"logits_save_dir": "/nowhere"}, "no cp*_dp*__*.tar"),
        ({"rampup_batch_size": "4 4 100"}, "--rampup-batch-size"),
    ],
)
def test_other_settings_are_refused(run, monkeypatch, capsys, changed, sentence):
    with pytest.raises(SystemExit):
        convert(run, monkeypatch, *EXACT, **changed)
    assert sentence in capsys.readouterr().err
    assert not list(run.folder.glob("*.pd*"))


def test_other_blend_is_refused(run, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        convert(run, monkeypatch, *EXACT, data_path=run.prefixes[0])
    assert "give the teacher run's --data-path" in capsys.readouterr().err


def left_without(dp_rank: int, saved_after: tuple[int, ...]) -> list[int]:
    """Samples that are in other tars than the second of a data-parallel rank."""
    lost_iterations = range(saved_after[0] + 1, saved_after[1] + 1)
    return [
        sample
        for sample in range(ITERATIONS * BATCH)
        if sample // BATCH not in lost_iterations or sample // MICRO_BATCH % DP != dp_rank
    ]


def test_lost_tar_leaves_its_samples_without_teacher(run, monkeypatch, capsys):
    lost = run.tars / f"cp1_dp0__{SAVED_AFTER[1]}.tar"
    data = lost.read_bytes()
    lost.unlink()
    assert convert(run, monkeypatch, *EXACT) == 0
    assert "16 of 96 samples are not in the tars" in capsys.readouterr().err
    run.check(stores(run), set().union(*(run.samples[i] for i in left_without(0, SAVED_AFTER))))
    remove_stores(run)
    lost.write_bytes(data[: len(data) // 2])
    with pytest.raises(SystemExit):
        convert(run, monkeypatch, *EXACT)
    assert "cannot be read" in capsys.readouterr().err
    lost.write_bytes(data)
    assert convert(run, monkeypatch, *EXACT) == 0
    run.check(stores(run), run.seen)
    remove_stores(run)


def test_float16_does_not_make_a_distribution_too_heavy():
    """Equal entries that are all rounded up are taken back to mass 1; what is no rounding stays."""
    logprobs = np.full((1, 1, 200), -np.inf, np.float32)
    worst = max(range(2, 200), key=lambda n: n * np.exp(np.float64(np.float16(-np.log(n)))))
    logprobs[..., :worst] = np.float16(-np.log(worst))
    ids = np.arange(200).reshape(1, 1, 200)
    assert np.exp(logprobs.astype(np.float64)).sum() > MAX_MASS
    (rows,) = sample_rows(ids, logprobs, 200)
    assert rows.counts == [worst]
    np.testing.assert_allclose(np.exp(rows.logprobs[0, :worst]), 1 / worst, rtol=1e-6)
    (rows,) = sample_rows(ids, logprobs / 2, 200)
    np.testing.assert_array_equal(rows.logprobs[0, :worst], logprobs[0, 0, :worst] / 2)


def test_the_sample_that_begins_earliest_in_a_document_counts(tmp_path):
    """Samples 0 to 3 with rows whose id is their number; no tar had sample 1."""
    with LogitStoreWriter(
        tmp_path, vocab_size=4, document_lengths=np.full(4, 9), metadata={}, codec="exact"
    ) as writer:
        for sample in range(4):
            ids = np.full((8, 1), sample, np.int32)
            counts = np.full(8, sample != 1, np.int32)
            rows = TeacherRows(ids, np.full((8, 1), -0.5, np.float32), counts)
            writer.append(sample, 0, rows)
            writer.append(sample, 8, TeacherRows.empty(1))
    spans = [
        SampleSpan(offset=5, length=8, sample=0, position=0),
        SampleSpan(offset=1, length=3, sample=1, position=5),
        SampleSpan(offset=2, length=6, sample=2, position=2),
        SampleSpan(offset=14, length=6, sample=3, position=0),
    ]
    expected = [-1, -1, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, -1, 3, 3, 3, 3, 3, -1]
    for offset in (0, 1, 4, 8, 13, 19):
        parts = list(_rows_of(LogitStore(tmp_path), spans, 20, offset))
        rows = TeacherRows.concatenate(parts)
        found = [int(ids[0]) if n else -1 for ids, n in zip(rows.ids, rows.counts, strict=True)]
        assert found == expected[offset:]
