"""The rows that a sample carries are those of its own tokens, whatever Megatron's shuffling."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_pd.data.corpus import MegatronCorpus, store_path_of
from megatron_pd.data.dataset import PDGPTDataset, PDGPTDatasetConfig
from megatron_pd.distill.targets import TeacherTargets
from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore, LogitStoreWriter, TeacherRows

VOCAB_SIZE, EOD, SEQUENCE_LENGTH = 500, 0, 32


class Tokenizer:
    vocab_size, eod, pad, eos = VOCAB_SIZE, EOD, -1, EOD
    unique_identifiers: ClassVar = {"class": "test"}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Documents of random tokens; row j of a document names the next token first, then 1 + it."""
    prefix = str(tmp_path_factory.mktemp("corpus") / "corpus")
    rng = np.random.default_rng()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    documents = [
        np.append(rng.integers(1, VOCAB_SIZE - 1, rng.integers(1, 90)), EOD) for _ in range(60)
    ]
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    corpus = MegatronCorpus(prefix)
    with LogitStoreWriter(
        store_path_of(prefix),
        vocab_size=VOCAB_SIZE,
        document_lengths=corpus.document_lengths,
        metadata={},
        codec="exact",
        statistics=["entropy"],
        corpus=corpus,
    ) as writer:
        for document, tokens in enumerate(documents):
            following = tokens[1:].astype(np.int32)
            counts = np.append(np.full(len(following), 2), 0).astype(np.int32)
            ids = np.full((len(tokens), 2), -1, np.int32)
            ids[:-1] = np.stack([following, following + 1], axis=1)
            logprobs = np.zeros((len(tokens), 2), np.float32)
            logprobs[:-1] = np.log([0.6, 0.3])
            entropy = np.append(tokens[:-1], np.nan).astype(np.float32)  # tells rows apart
            rows = TeacherRows(ids, logprobs, counts, {"entropy": entropy})
            writer.append(document, 0, rows)
    return prefix


def make_dataset(prefix, split=Split.train, columns=2, **options):
    config = PDGPTDatasetConfig(
        random_seed=int(np.random.default_rng().integers(1 << 30)),
        sequence_length=SEQUENCE_LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        stores={prefix: store_path_of(prefix)},
        teacher_columns=columns,
        **options,
    )
    low_level = GPTDataset.build_low_level_dataset(prefix, config)
    indices = np.arange(len(low_level), dtype=np.int32)
    return PDGPTDataset(low_level, prefix, indices, 150, split, config)


def test_row_s_is_the_teachers_distribution_of_label_s(prefix):
    dataset = make_dataset(prefix)
    for sample in (dataset[i] for i in range(len(dataset))):
        tokens, labels = sample["tokens"].numpy(), sample["labels"].numpy()
        taught = tokens != EOD  # a document ends with EOD; what follows has no teacher
        rows = TeacherTargets.from_batch(sample)
        counts = rows.counts.numpy()
        np.testing.assert_array_equal(counts, np.where(taught, 2, 0))
        ids = rows.ids.numpy()
        np.testing.assert_array_equal(ids[taught, 0], labels[taught])
        np.testing.assert_array_equal(ids[taught, 1], labels[taught] + 1)
        assert (ids[~taught] == -1).all()
        np.testing.assert_allclose(rows.logprobs.numpy()[taught, 0], np.log(0.6), 1e-6)


def test_fewer_columns_keep_the_top_entries(prefix):
    sample = make_dataset(prefix, columns=1)[0]
    rows = TeacherTargets.from_batch(sample)
    assert rows.ids.shape == (SEQUENCE_LENGTH, 1)
    taught = sample["tokens"] != EOD
    assert (rows.ids[taught, 0] == sample["labels"][taught]).all()
    assert (rows.counts[taught] == 1).all()


def test_rows_carry_the_statistic_that_is_asked_for(prefix):
    sample = make_dataset(prefix, teacher_statistic="entropy")[0]
    taught = sample["tokens"] != EOD
    expected = torch.where(taught, sample["tokens"].float(), 1.0)
    found = TeacherTargets.from_batch(sample)
    torch.testing.assert_close(found.entropy, expected)
    assert TeacherTargets.from_batch(make_dataset(prefix)[0]).entropy is None


def test_only_training_samples_carry_rows(prefix):
    assert TeacherTargets.from_batch(make_dataset(prefix, split=Split.valid)[0]) is None
    assert TeacherTargets.from_batch(make_dataset(prefix, columns=0)[0]) is None


def test_corpus_that_is_not_there():
    with pytest.raises(UserError, match=r"nowhere\.bin does not exist.*megatron-pd preprocess"):
        MegatronCorpus("nowhere")


def test_store_knows_its_corpus(prefix):
    LogitStore(store_path_of(prefix)).check_corpus(MegatronCorpus(prefix), full=True)
