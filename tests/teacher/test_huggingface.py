"""Models that transformers loads as teachers: their rows against transformers' own, in float64.

The models are tiny and random, their weights large enough for distributions with a head.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hugging_face_files import as_gguf, saved_model, trained_tokenizer

from megatron_pd.cli import main
from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.corpus_writer import CorpusWriter
from megatron_pd.data.tokenizer import open_tokenizer, tokenizer_config, tokenizer_fingerprint
from megatron_pd.store import LogitStore, StoreError, TeacherRows
from megatron_pd.store.admin.merge import even_ranges
from megatron_pd.teacher import dump as dump_module
from megatron_pd.teacher.huggingface.source import Source
from megatron_pd.teacher.huggingface.teacher import HuggingFaceTeacher

WINDOW, OVERLAP = 32, 10
TEXT = "\n".join(path.read_text() for path in sorted(Path(__file__).parents[2].glob("docs/*.md")))
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
ARCHITECTURES: dict[str, Callable[[int], Any]] = {
    "llama": lambda v: transformers.LlamaConfig(vocab_size=v, **COMMON),
    "qwen2": lambda v: transformers.Qwen2Config(vocab_size=v, tie_word_embeddings=True, **COMMON),
    "gpt2": lambda v: transformers.GPT2Config(vocab_size=v, **GPT2),
    "glm4": lambda v: transformers.Glm4Config(vocab_size=v, head_dim=8, **COMMON),
    "mixtral": lambda v: transformers.MixtralConfig(vocab_size=v, num_local_experts=4, **COMMON),
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained_tokenizer(folder, TEXT)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return saved_model(
        tmp_path_factory.mktemp("models") / "llama", tokenizer_folder, ARCHITECTURES["llama"](424)
    )


def written(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    with CorpusWriter(str(prefix), np.uint16) as writer:
        writer.append(
            np.concatenate([np.array(tokens, np.uint16) for tokens in documents]),
            np.array([len(tokens) for tokens in documents], np.int32),
        )
        writer.publish()
    return str(prefix)


def texts_as_tokens(tokenizer: Any, count: int = 12) -> list[list[int]]:
    """Documents shorter and longer than the window, each with its end."""
    rng = np.random.default_rng()
    lengths = [1, 30, 400, 900, *rng.integers(1, 300, count)]
    starts = rng.integers(0, len(TEXT) - 1000, len(lengths))
    texts = [TEXT[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    return [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    return written(tmp_path_factory.mktemp("corpus") / "corpus", texts_as_tokens(tokenizer))


def dump(model: Path | str, corpus: str, store: Path, *flags: object) -> None:
    arguments = ["--hf-model", model, "--data-path", corpus, "--dump-store", store]
    arguments += ["--seq-length", WINDOW, "--dump-overlap", OVERLAP, "--dump-codec", "exact"]
    sys.argv = ["megatron-pd", "dump", *map(str, [*arguments, *flags])]
    assert main() == 0


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def dense_logprobs(model: Any, tokens: np.ndarray, vocab_size: int) -> torch.Tensor:
    """float64 [n - 1, V] of a document's tokens but the last, window by window."""
    rows: list[torch.Tensor] = []
    kept = start = 0
    while kept < len(tokens) - 1:
        end = min(start + WINDOW, len(tokens) - 1)
        ids = torch.from_numpy(tokens[start:end].astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, kept - start :, :vocab_size]
        rows.append(logits.double().log_softmax(-1))
        kept, start = end, end - OVERLAP
    return torch.cat(rows) if rows else torch.zeros(0, vocab_size)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_those_of_transformers(
    tmp_path: Path, tokenizer_folder: Path, architecture: str
) -> None:
    """The model has 24 logits beyond the vocabulary: they are left out."""
    folder = saved_model(tmp_path / "model", tokenizer_folder, ARCHITECTURES[architecture](424))
    # The class of a Qwen2 folder's tokenizer cuts words otherwise than its tokenizer.json says.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    corpus = written(tmp_path / "corpus", texts_as_tokens(tokenizer))
    dump(folder, corpus, tmp_path / "store", "--dump-top-p", 0.9, "--dump-top-k", 30)
    store = LogitStore(tmp_path / "store")
    assert store.vocab_size == 400
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    checked = 0
    for document in range(store.num_documents):
        tokens = MegatronCorpus(corpus).tokens(document)
        dense = dense_logprobs(model, tokens, 400).numpy()
        rows = store.read(document)
        assert rows.counts[-1] == 0 and len(rows) == len(dense) + 1
        label = np.take_along_axis(dense, tokens[1:, None].astype(np.int64), 1)[:, 0]
        np.testing.assert_allclose(rows.statistics["label_logprob"][:-1], label, atol=1e-4)
        for row, logprobs in enumerate(dense):
            count = rows.counts[row]
            ids = rows.ids[row, :count]
            assert len(set(ids.tolist())) == count
            np.testing.assert_allclose(rows.logprobs[row, :count], logprobs[ids], atol=1e-4)
            # The smallest head with a mass of 0.9, or the top 30, up to ties.
            top = np.sort(logprobs)[::-1]
            np.testing.assert_allclose(logprobs[ids], top[:count], atol=1e-4)
            mass = np.exp(top).cumsum()
            assert count == 30 or mass[count - 1] > 0.9 - 1e-4
            assert count == 1 or mass[count - 2] < 0.9 + 1e-4
        checked += len(dense)
    assert checked > 500


def test_perplexity_is_that_of_transformers(tmp_path: Path, llama: Path, corpus: str) -> None:
    """Of every document that one window holds."""
    dump(llama, corpus, tmp_path / "store", "--seq-length", 64)
    store = LogitStore(tmp_path / "store")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for document in np.flatnonzero((store.document_lengths > 1) & (store.document_lengths <= 64)):
        ids = torch.from_numpy(MegatronCorpus(corpus).tokens(document).astype(np.int64))[None]
        with torch.no_grad():
            model.config.vocab_size = 400
            logits = model(input_ids=ids).logits[..., :400]
            loss = model.loss_function(logits=logits, labels=ids, vocab_size=400)
        found = -store.read(document).statistics["label_logprob"][:-1].mean()
        assert abs(np.exp(found) / np.exp(float(loss)) - 1) < 1e-4


def test_rows_do_not_depend_on_the_batch(tmp_path: Path, llama: Path, corpus: str) -> None:
    """Other batches are other matrix products, which round otherwise: no padding shows beyond."""
    stores = []
    for tokens in (1, 100, 100_000):
        path = tmp_path / f"{tokens}"
        dump(llama, corpus, path, "--batch-tokens", tokens, "--dump-statistics")
        stores.append(LogitStore(path))
    for document, (first, *others) in enumerate(zip(*map(all_rows, stores), strict=True)):
        for other in others:
            for name, values in first.statistics.items():
                np.testing.assert_allclose(other.statistics[name], values, atol=2e-5, rtol=1e-5)
            by_id = (dense_of(rows, 400) for rows in (first, other))
            np.testing.assert_allclose(*by_id, atol=2e-6, err_msg=f"document {document}")


def all_rows(store: LogitStore) -> list[TeacherRows]:
    return [store.read(document) for document in range(store.num_documents)]


def dense_of(rows: TeacherRows, vocab_size: int) -> np.ndarray:
    """Probabilities [n, V] of the entries that are no ties at the cut: those above the last."""
    dense = np.zeros((len(rows), vocab_size))
    row, column = np.nonzero(np.arange(rows.ids.shape[1]) < rows.counts[:, None] - 1)
    dense[row, rows.ids[row, column]] = np.exp(rows.logprobs[row, column].astype(np.float64))
    return dense


def test_draws_and_dtypes(tmp_path: Path, llama: Path, corpus: str) -> None:
    dump(llama, corpus, tmp_path / "draws", "--dump-sampled", 20, "--seed", 5)
    dump(llama, corpus, tmp_path / "again", "--dump-sampled", 20, "--seed", 5)
    dump(llama, corpus, tmp_path / "half", "--dtype", "bfloat16")
    dump(llama, corpus, tmp_path / "full")
    draws, again, half, full = (
        LogitStore(tmp_path / name) for name in ("draws", "again", "half", "full")
    )
    assert draws.draws == 20 and draws.metadata["seed"] == 5
    assert same_rows(draws, again)
    assert (half.metadata["precision"], full.metadata["precision"]) == ("bfloat16", "float32")
    differences = [
        np.abs(a.statistics["label_logprob"][:-1] - b.statistics["label_logprob"][:-1])
        for a, b in zip(all_rows(half), all_rows(full), strict=True)
    ]
    assert 1e-4 < np.concatenate(differences).mean() < 0.2


def same_rows(a: LogitStore, b: LogitStore) -> bool:
    return all(
        np.array_equal(x.ids, y.ids)
        and np.array_equal(x.logprobs, y.logprobs)
        and np.array_equal(x.statistics["label_logprob"], y.statistics["label_logprob"], True)
        for x, y in zip(all_rows(a), all_rows(b), strict=True)
    )


# --- going on, and side by side -------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A corpus in four shards, of which 100 tokens are durable at once."""
    monkeypatch.setattr(dump_module, "_GROUP_TOKENS", 100)
    monkeypatch.setattr(dump_module, "shards_of", lambda lengths: even_ranges(lengths, 4))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    return written(tmp_path / "many", texts_as_tokens(tokenizer, 60))


def forked(delay: float, rank: int, ranks: int, model: Path, corpus: str, store: Path) -> Any:
    """A process, as torchrun starts one, whose every batch takes `delay` seconds longer."""

    def job() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
        run = HuggingFaceTeacher.run

        def slow(self: Any, *rest: Any) -> Any:
            time.sleep(delay)
            return run(self, *rest)

        HuggingFaceTeacher.run = slow
        dump(model, corpus, store)

    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    return process


def test_a_killed_dump_goes_on_to_the_same_store(tmp_path: Path, llama: Path, many: str) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = forked(0.05, 0, 1, llama, many, killed)
    while not any(path.stat().st_size > 3000 for path in killed.glob("*.partial")):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(StoreError):
        LogitStore(killed)
    one_thread = forked(0, 0, 1, llama, many, killed), forked(0, 0, 1, llama, many, whole)
    for process in one_thread:
        process.join()
        assert process.exitcode == 0
    assert same_rows(LogitStore(killed), LogitStore(whole))
    assert contents(killed) == contents(whole)


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def test_two_processes_write_what_one_does(tmp_path: Path, llama: Path, many: str) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    processes = [forked(0.02, rank, 2, llama, many, together) for rank in range(2)]
    processes.append(forked(0, 0, 1, llama, many, alone))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert same_rows(LogitStore(together), LogitStore(alone))


def test_another_checkpoint_does_not_go_on_with_a_store(
    tmp_path: Path,
    llama: Path,
    tokenizer_folder: Path,
    many: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, left = HuggingFaceTeacher.run, 3

    def stopping(self: Any, *rest: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return run(self, *rest)

    monkeypatch.setattr(HuggingFaceTeacher, "run", stopping)
    with pytest.raises(SystemExit, match="130"):
        dump(llama, many, tmp_path / "store")
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(HuggingFaceTeacher, "run", run)
    retrained = saved_model(tmp_path / "retrained", tokenizer_folder, ARCHITECTURES["llama"](424))
    for model, flags, sentence in (
        (retrained, (), "was begun with fingerprint="),
        (llama, ("--dtype", "bfloat16"), "was begun with precision='float32', now precision="),
    ):
        with pytest.raises(SystemExit):
            dump(model, many, tmp_path / "store", *flags)
        assert sentence in capsys.readouterr().err
    moved = shutil.copytree(llama, tmp_path / "moved")
    dump(moved, many, tmp_path / "store")
    dump(llama, many, tmp_path / "whole")
    found, expected = (LogitStore(tmp_path / name) for name in ("store", "whole"))
    assert all(
        np.allclose(dense_of(a, 400), dense_of(b, 400), atol=2e-6)
        for a, b in zip(all_rows(found), all_rows(expected), strict=True)
    )


# --- tokenizers -----------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_student_s_tokenizer(
    tmp_path: Path, llama: Path, tokenizer_folder: Path, corpus: str
) -> None:
    dump(llama, corpus, tmp_path / "store")
    dump(llama, corpus, tmp_path / "named", "--tokenizer-model", tokenizer_folder)
    student = open_tokenizer(tokenizer_config("HuggingFaceTokenizer", str(tokenizer_folder)))
    for name in ("store", "named"):
        found = LogitStore(tmp_path / name)
        assert found.metadata["tokenizer"] == tokenizer_fingerprint(student)
        assert found.vocab_size == student.vocab_size


def test_a_corpus_of_another_tokenizer_is_refused(
    tmp_path: Path, llama: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = trained_tokenizer(tmp_path / "other", TEXT[::-1])
    theirs = written(tmp_path / "theirs", texts_as_tokens(other))
    random = written(tmp_path / "random", np.random.default_rng().integers(0, 400, (20, 50)))
    beyond = written(tmp_path / "beyond", [[5, 6, 400, 0]])
    for prefix, flags, sentence in (
        (theirs, (), "so it is another one"),
        (random, (), "so it is another one"),
        (corpus, ("--tokenizer-model", tmp_path / "other"), "--tokenizer-model gives"),
        (beyond, (), "document 0 has a token 400, the vocabulary of"),
    ):
        with pytest.raises(SystemExit):
            dump(llama, prefix, tmp_path / "store", *flags)
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "store").exists()
    dump(llama, random, tmp_path / "store", "--tokenizer-model", llama)  # ids of no text


def test_a_corpus_that_begins_documents_with_bos(
    tmp_path: Path, llama: Path, tokenizer_folder: Path
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained(folder)
    documents = [[5, *tokenizer(text).input_ids, 0] for text in TEXT.split(".")[:99]]
    prefix = written(tmp_path / "corpus", documents)
    dump(folder, prefix, tmp_path / "store")
    dump(folder, prefix, tmp_path / "named", "--tokenizer-model", folder)


def test_a_token_beyond_the_vocabulary_is_found_where_no_sample_looks(
    tmp_path: Path, llama: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [MegatronCorpus(corpus).tokens(number).tolist() for number in range(14)]
    longest = max(range(14), key=lambda number: len(documents[number]))
    documents[longest] = (documents[longest] * 3)[:700]
    documents[longest][600] = 411
    prefix = written(tmp_path / "late", documents)
    with pytest.raises(SystemExit):
        dump(llama, prefix, tmp_path / "store")
    assert f"document {longest}, offset 599 or the one after it" in capsys.readouterr().err


# --- refusals -------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def bad_index(folder: Path, index: str) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)


def huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])


def bidirectional(folder: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=424,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def with_nan(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (shutil.rmtree, "there is no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: cut(folder / "config.json"), "its configuration cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("[" * 99999), "cannot be loaded"),
        (lambda folder: edit_config(folder, hidden_size="x"), "cannot be loaded"),
        (lambda folder: edit_config(folder, num_hidden_layers=3), "missing keys, such as model."),
        (lambda folder: edit_config(folder, hidden_size=64), "don't fit its configuration"),
        (
            lambda folder: edit_config(folder, model_type="own", auto_map={"AutoConfig": "c.C"}),
            "needs Python code of its own, which is never run",
        ),
        (lambda folder: cut(folder / "model.safetensors"), "its model cannot be loaded"),
        (huge_header, "its model cannot be loaded"),
        (only_pickle, "only safetensors are read"),
        (lambda folder: bad_index(folder, "{"), "is no index of safetensors"),
        (lambda folder: bad_index(folder, '{"weight_map": {"a": "../a.safetensors"}}'), "names"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: cut(folder / "tokenizer.json"), "its tokenizer cannot be loaded"),
        (bidirectional, "its logits depend on later tokens"),
        (with_nan, "hold NaN or infinity"),
    ],
)
def test_what_can_not_be_a_teacher_is_refused_in_a_sentence(
    tmp_path: Path,
    llama: Path,
    corpus: str,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], Any],
    sentence: str,
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    spoil(folder)
    with pytest.raises(SystemExit, match="2"):
        dump(folder, corpus, tmp_path / "store")
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and sentence in lines[-1]
    assert "should not happen" not in lines[-1]


def test_fewer_logits_than_tokens_are_refused(
    tmp_path: Path, tokenizer_folder: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved_model(tmp_path / "model", tokenizer_folder, ARCHITECTURES["llama"](399))
    with pytest.raises(SystemExit):
        dump(folder, corpus, tmp_path / "store")
    assert "the model has 399 logits, the tokenizer 400 tokens" in capsys.readouterr().err


def test_weights_that_the_model_does_not_have_are_noted(
    tmp_path: Path, llama: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    edit_config(folder, num_hidden_layers=1)
    dump(folder, corpus, tmp_path / "store")
    assert "weights are in the files but not in the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--tensor-model-parallel-size", 2), "every process holds the whole model"),
        (("--micro-batch-size=4",), "--batch-tokens N"),
        (("--swiglu",), "--swiglu is no flag of a dump with --hf-model"),
        (("--batch-tokens", 0), "--batch-tokens is 0"),
        (("--dump-top-p", 2), "--dump-top-p"),
        (("--tokenizer-type", "HuggingFaceTokenizer"), "--tokenizer-type describes"),
        (("--data-path", "nowhere"), "nowhere.bin does not exist"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    tmp_path: Path,
    llama: Path,
    corpus: str,
    capsys: pytest.CaptureFixture[str],
    flags: Sequence[object],
    sentence: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        dump(llama, corpus, tmp_path / "store", *flags)
    assert sentence in capsys.readouterr().err


def test_windows_beyond_the_model_are_refused(
    llama: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.argv = f"megatron-pd dump --hf-model {llama} --data-path {corpus} --seq-length 65".split()
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "at most 64 (max_position_embeddings)" in capsys.readouterr().err


def test_help_is_of_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    sys.argv = "megatron-pd dump --hf-model x --help".split()
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    assert "--batch-tokens" in shown and "--dump-top-p" in shown
    assert "--tensor-model-parallel-size" not in shown


# --- GGUF -----------------------------------------------------------------------------------------


def test_a_gguf_file_gives_the_rows_of_its_folder(
    tmp_path: Path, llama: Path, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = as_gguf(llama, tmp_path / "tiny.gguf")
    dump(path, corpus, tmp_path / "gguf")
    dump(llama, corpus, tmp_path / "folder")
    found, expected = (LogitStore(tmp_path / name) for name in ("gguf", "folder"))
    assert found.vocab_size == 400 and found.metadata["precision"] == "float32"
    for a, b in zip(all_rows(found), all_rows(expected), strict=True):
        np.testing.assert_allclose(dense_of(a, 400), dense_of(b, 400), atol=1e-4)
        np.testing.assert_allclose(
            a.statistics["label_logprob"], b.statistics["label_logprob"], atol=1e-3
        )
    Source.of(str(path)).tokenizer().save_pretrained(tmp_path / "student")
    student = open_tokenizer(tokenizer_config("HuggingFaceTokenizer", str(tmp_path / "student")))
    assert found.metadata["tokenizer"] == tokenizer_fingerprint(student)
    data = path.read_bytes()
    random = np.random.default_rng()
    for size in (4, 60, 5000, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:size] if size % 2 == 0 else random.bytes(size))
        with pytest.raises(SystemExit, match="2"):
            dump(path, corpus, tmp_path / "cut")
        assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["gguf", "accelerate"])
def test_a_gguf_file_needs_its_libraries(
    library: str,
    tmp_path: Path,
    corpus: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == library else find(name)
    )
    (tmp_path / "model.gguf").touch()
    with pytest.raises(SystemExit, match="2"):
        dump(tmp_path / "model.gguf", corpus, tmp_path / "store")
    assert "pip install 'megatron-pd[gguf]'" in capsys.readouterr().err
