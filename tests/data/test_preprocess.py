import gzip
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import tokenizers
import transformers
import zstandard
from tokenizers import processors

from megatron_pd.cli import main
from megatron_pd.data import documents
from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.preprocess import preprocess
from megatron_pd.data.tokenizer import batch_encoder, largest_id, open_tokenizer, tokenizer_config
from megatron_pd.data.train_tokenizer import train_tokenizer
from megatron_pd.errors import UserError


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


def document_ids(prefix, document):
    """A copy: with the corpus goes the map that its arrays are of."""
    corpus = MegatronCorpus(str(prefix))
    return corpus.tokens(document).copy()


@pytest.fixture(scope="module")
def texts():
    words = ["def", "return", "    ", "\n", "\t", "x", "y1", "äöü", "(", ")", "=", "日本"]
    return ["".join(random.choices(words, k=random.randint(1, 400))) for _ in range(80)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([write_jsonl(folder / "t.jsonl", texts)], str(folder / "t.model"), 330)
    return tokenizer_config("SentencePieceTokenizer", str(folder / "t.model"))


def decode(config, ids):
    return sentencepiece.SentencePieceProcessor(model_file=config.tokenizer_model).decode(ids)


@pytest.mark.parametrize("workers", [1, 3])
def test_documents_come_back_in_order_and_whole(tmp_path, texts, tokenizer, workers):
    plain = tmp_path / "plain.txt"
    plain.write_text("one plain file\nis one document")
    paths = [write_jsonl(tmp_path / "a.jsonl", [*texts, "", texts[0]]), str(plain)]
    prefix = str(tmp_path / "out" / "corpus")
    summary = preprocess(paths, prefix, tokenizer, workers=workers)
    corpus = MegatronCorpus(prefix)
    assert summary.documents == len(corpus) == len(texts) + 2
    assert summary.empty_documents == 1
    assert summary.tokens == corpus.document_lengths.sum()
    for document, text in enumerate([*texts, texts[0], plain.read_text()]):
        ids = corpus.tokens(document).tolist()
        assert ids[-1] == 2  # </s>, the end of the document
        assert decode(tokenizer, ids[:-1]) == text
    assert not list(tmp_path.glob("out/*unfinished*"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2"),
        ('{"other": "x"}', "--json-key"),
        ('{"text": 5}', "line 2"),
    ],
)
def test_bad_lines_are_named(tmp_path, tokenizer, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match=message):
        preprocess([str(path)], str(tmp_path / "corpus"), tokenizer)
    assert not list(tmp_path.glob("corpus*"))


def test_input_without_text_is_named(tmp_path, tokenizer):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Grüße".encode("latin-1"))
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    for path, message in (
        (str(latin), "is not UTF-8 text"),
        (empty, "No text was found in .*empty"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess([path], str(tmp_path / "corpus"), tokenizer)
    assert not list(tmp_path.glob("corpus*"))


def test_blank_lines_are_no_documents(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n\n  \n{"text": "two"}\n')
    summary = preprocess([str(path)], str(tmp_path / "corpus"), tokenizer)
    assert (summary.documents, summary.empty_documents) == (2, 0)


def test_a_tokenizer_without_an_end_of_document_is_refused(tmp_path, texts):
    folder = str(tmp_path / "tokenizer")
    tokenizer = byte_level_bpe(texts, 300)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(UserError, match="no end-of-document token"):
        preprocess(
            [path], str(tmp_path / "corpus"), tokenizer_config("HuggingFaceTokenizer", folder)
        )


def test_missing_input_and_tokenizer(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"nothing\.jsonl does not exist"):
        preprocess([str(tmp_path / "nothing.jsonl")], str(tmp_path / "corpus"), tokenizer)
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    for type_, model, message in (
        ("SentencePieceTokenizer", "no.model", r"no\.model does not exist"),
        ("SentencePieceTokenizer", path, r"a\.jsonl cannot be opened as a SentencePieceTokenizer"),
        ("HuggingFaceTokenizer", str(tmp_path), "cannot be opened as a HuggingFaceTokenizer"),
    ):
        config = tokenizer_config(type_, model)
        with pytest.raises(UserError, match=message):
            preprocess([path], str(tmp_path / "corpus"), config)


def byte_level_bpe(texts, vocab_size, special=("<eos>",), **names):
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size, special_tokens=list(special), show_progress=False
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, **{"eos_token": "<eos>", **names}
    )


def saved(tokenizer, folder):
    tokenizer.save_pretrained(str(folder))
    return tokenizer_config("HuggingFaceTokenizer", str(folder))


def test_too_little_text_for_the_vocabulary(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["tiny"])
    with pytest.raises(UserError, match="--vocab-size"):
        train_tokenizer([path], str(tmp_path / "t.model"), 5000)


def test_tokenizer_learns_from_the_first_bytes_alone(tmp_path, texts):
    first, second = "".join(texts), "".join(reversed(texts)).replace("return", "yield")
    vocabularies = []
    for name, learned, limit in (
        ("a", [first], 1 << 20),
        ("b", [first, second], 100),
        ("c", [first, second], 1 << 20),
    ):
        path = write_jsonl(tmp_path / f"{name}.jsonl", learned)
        train_tokenizer([path], str(tmp_path / f"{name}.model"), 330, max_bytes=limit)
        vocabularies.append((tmp_path / f"{name}.vocab").read_text())
    assert vocabularies[0] == vocabularies[1] != vocabularies[2]


def test_a_tokenizer_is_a_model_file(tmp_path):
    with pytest.raises(UserError, match=r"t\.json: a sentencepiece model ends in \.model"):
        train_tokenizer([write_jsonl(tmp_path / "a.jsonl", ["x"])], str(tmp_path / "t.json"), 300)


# --- Hugging Face tokenizers ----------------------------------------------------------------------


def test_hugging_face_tokenizer(tmp_path, texts):
    config = saved(byte_level_bpe(texts, 300), tmp_path / "tokenizer")
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    preprocess([path], str(tmp_path / "corpus"), config, workers=2)
    corpus = MegatronCorpus(str(tmp_path / "corpus"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.tokenizer_model)
    for document, text in enumerate(texts):
        *ids, end = corpus.tokens(document).tolist()
        assert end == tokenizer.eos_token_id
        assert tokenizer.decode(ids) == text


def with_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )


def with_bos_and_eos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 0)]
    )


def with_two_eos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos> <eos>", special_tokens=[("<eos>", 0)]
    )


@pytest.mark.parametrize(
    ("post_processor", "bos"),
    [(None, []), (with_bos, [1]), (with_bos_and_eos, [1]), (with_two_eos, [])],
)
def test_one_end_a_document_and_the_bos_that_the_tokenizer_adds(
    tmp_path, texts, post_processor, bos
):
    tokenizer = byte_level_bpe(texts, 300, ["<eos>", "<bos>"], bos_token="<bos>")
    plain = [tokenizer(text).input_ids for text in texts]
    if post_processor:
        post_processor(tokenizer)
    config = saved(tokenizer, tmp_path / "tokenizer")
    awkward = ["", "<eos>", "x<eos>", "x<eos><eos>", "x<eos>y", "<eos>x"]
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, *awkward])
    summary = preprocess([path], str(tmp_path / "corpus"), config)
    x, y = tokenizer.convert_tokens_to_ids(["x", "y"])
    expected = [
        *([*bos, *ids, 0] for ids in plain),
        *([*bos, x, 0], [*bos, x, 0], [*bos, x, 0, y, 0], [*bos, 0, x, 0]),
    ]
    corpus = MegatronCorpus(str(tmp_path / "corpus"))
    assert [corpus.tokens(document).tolist() for document in range(len(corpus))] == expected
    assert (summary.empty_documents, summary.inner_ends) == (2, 2)


def numbered(texts, size=400, **ids):
    """A tokenizer of so many tokens, some of which have other ids than they would have."""
    tokenizer = byte_level_bpe(texts, 300, ["<eos>", "<far>"])
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"unused {number}": number for number in range(300, size)}
    for token, number in ids.items():
        vocabulary[token] = number
        for added in content["added_tokens"]:
            if added["content"] == token:
                added["id"] = number
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_tokenizer_with_holes_in_its_ids(tmp_path, texts):
    far = saved(numbered(texts, **{"<far>": 70_000}), tmp_path / "far")
    tokenizer = open_tokenizer(far)
    assert (tokenizer.vocab_size, largest_id(tokenizer)) == (400, 70_000)
    prefix = str(tmp_path / "corpus")
    preprocess([write_jsonl(tmp_path / "a.jsonl", ["x"])], prefix, far)
    before = Path(f"{prefix}.bin").read_bytes()
    assert document_ids(prefix, 0).dtype == np.int32
    path = write_jsonl(tmp_path / "b.jsonl", ["x", "y <far>"])
    with pytest.raises(
        UserError, match=r"b\.jsonl, .*gives a token 70000, but .* 400 tokens.* without holes"
    ):
        preprocess([path], prefix, far)
    assert Path(f"{prefix}.bin").read_bytes() == before
    assert not list(tmp_path.glob("*unfinished*"))
    near = saved(numbered(texts, **{"<far>": 400}), tmp_path / "near")
    with pytest.raises(UserError, match="gives a token 400, but"):
        preprocess([path], prefix, near)
    end = saved(numbered(texts, **{"<eos>": 70_000}), tmp_path / "end")
    with pytest.raises(UserError, match=r"ends documents with token 70000, but .* 400 tokens"):
        preprocess([path], prefix, end)


def test_a_vocabulary_beyond_uint16(tmp_path, texts):
    config = saved(
        numbered(texts, 70_000, **{"<far>": 69_999, "unused 69999": 1}), tmp_path / "tokenizer"
    )
    preprocess([write_jsonl(tmp_path / "a.jsonl", ["x<far>"])], str(tmp_path / "corpus"), config)
    assert document_ids(tmp_path / "corpus", 0)[1:].tolist() == [69_999, 0]


def test_batches_give_the_ids_of_single_texts(tmp_path, texts):
    tokenizer = byte_level_bpe(texts, 300, ["<eos>", "<bos>"], bos_token="<bos>")
    with_bos_and_eos(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    config = saved(tokenizer, tmp_path / "tokenizer")
    megatron = open_tokenizer(config)
    encode = batch_encoder(megatron)
    awkward = [*texts, "", " ", "<eos>", "<bos> x", "x" * 3000, "\0", "\ufffd"]
    assert encode(awkward) == [megatron.tokenize(text) for text in awkward]
    assert encode.__name__ == "at_once"


def test_a_tokenizer_that_does_more_than_its_backend_goes_text_by_text(tmp_path, texts):
    megatron = open_tokenizer(saved(byte_level_bpe(texts, 300), tmp_path / "tokenizer"))
    plain = megatron._tokenizer.text_to_ids
    megatron._tokenizer.text_to_ids = lambda text: plain(text.lower())
    assert batch_encoder(megatron)(["AB"]) == [plain("ab")] != [plain("AB")]


def test_a_tokenizer_that_fails_names_the_lines(tmp_path, tokenizer, monkeypatch):
    def fail(self, text):
        raise RuntimeError("no such piece")

    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    wrapper = type(open_tokenizer(tokenizer)._tokenizer)
    monkeypatch.setattr(wrapper, "text_to_ids", lambda self, text: fail(self, text) if text else [])
    monkeypatch.setattr(wrapper, "text_to_tokens", lambda self, text: [])
    with pytest.raises(UserError, match=r"a\.jsonl, lines 1 to 2: the tokenizer failed \(no such"):
        preprocess([path], str(tmp_path / "corpus"), tokenizer)


# --- formats and dirt -----------------------------------------------------------------------------


def test_every_format_gives_the_same_corpus(tmp_path, texts, tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 1000)
    lines = Path(write_jsonl(tmp_path / "a.jsonl", texts)).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.NDJSON.ZST").write_bytes(zstandard.compress(lines))
    (tmp_path / "part-00000").write_bytes(lines)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    plain = []
    for number, text in enumerate(texts):
        plain.append(str(tmp_path / f"{number}.txt"))
        Path(plain[-1]).write_text(text)
    inputs = [[str(path)] for path in tmp_path.iterdir() if path.suffix != ".txt"]
    found = set()
    for number, paths in enumerate([*inputs, plain]):
        prefix = tmp_path / f"corpus-{number}"
        summary = preprocess(paths, str(prefix), tokenizer, workers=random.choice([1, 2, 4]))
        assert summary.documents == len(texts)
        assert summary[2:] == (0, 0, None, 0)
        found.add((Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()))
    assert len(inputs) == 5
    assert len(found) == 1


def test_dirt_is_counted_and_its_first_place_named(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 40)
    lines = [
        *[b'{"text": "fine"}'] * 9,
        *(rb'{"text": "a\ud800"}', b'{"text": "b\xe4"}', b'{"text": null}', b""),
        *(b'{"text": "NUL \\u0000 is kept"}', b'{"text": ""}'),
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    prefix = str(tmp_path / "corpus")
    summary = preprocess([str(path)], prefix, tokenizer, workers=3)
    assert summary._replace(tokens=0) == (12, 0, 2, 2, f"{path}, line 10", 0)
    corpus = MegatronCorpus(prefix)
    found = [decode(tokenizer, corpus.tokens(i).tolist()[:-1]) for i in range(len(corpus))]
    assert found == [*["fine"] * 9, "a\ufffd", "b\ufffd", "NUL \0 is kept"]


# --- what is in the way ---------------------------------------------------------------------------


def test_outputs_that_cannot_be(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    copy = tmp_path / "corpus.bin"
    copy.write_bytes(b"")
    (tmp_path / "folder.idx").mkdir()
    os.link(path, tmp_path / "link.bin")
    for prefix, message in (
        (f"{tmp_path}/", "is a folder: add the name"),
        (f"{tmp_path}/folder", r"folder\.idx is a folder"),
        (f"{tmp_path}/link", r"would replace .*a\.jsonl, an input"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess([path], prefix, tokenizer)
    for prefix in (f"{path}/corpus", "/proc/none/corpus", "/sys/corpus"):
        with pytest.raises(OSError, match=prefix.rpartition("/")[0]) as error:
            preprocess([path], prefix, tokenizer)
        assert error.value.filename
    with pytest.raises(UserError, match="--workers 0: give 1 or more"):
        preprocess([path], str(tmp_path / "corpus"), tokenizer, workers=0)


def test_a_full_disk_leaves_the_earlier_corpus(tmp_path, texts, tokenizer):
    prefix = str(tmp_path / "corpus")
    preprocess([write_jsonl(tmp_path / "a.jsonl", ["x"])], prefix, tokenizer)
    before = Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
    path = write_jsonl(tmp_path / "b.jsonl", texts)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*corpus\.unfinished\.bin"):
            preprocess([path], prefix, tokenizer, workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()) == before
    assert not list(tmp_path.glob("*unfinished*"))


# --- the command ----------------------------------------------------------------------------------


class Command:
    """`megatron-pd` in a process group of its own, forked to save the imports."""

    def __init__(self, folder, *words):
        self._outputs = [folder / "stdout", folder / "stderr"]
        self._process = multiprocessing.get_context("fork").Process(
            target=self._run, args=([str(word) for word in words],)
        )
        self._process.start()
        self.pid = self._process.pid

    def _run(self, words):
        os.setsid()
        for descriptor, path in enumerate(self._outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = ["megatron-pd", *words]
        with os.fdopen(1, "w") as sys.stdout, os.fdopen(2, "w") as sys.stderr:
            sys.exit(main())

    def is_running(self):
        return self._process.is_alive()

    def result(self):
        """Exit status, standard output and error output."""
        self._process.join(60)
        return self._process.exitcode, *(path.read_text() for path in self._outputs)

    def end(self):
        self._process.kill()
        self._process.join()


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return list(map(int, path.read_text().split()))


@pytest.fixture
def running(tmp_path, texts, tokenizer):
    """A preprocess command whose two workers are busy for long, and an earlier corpus' bytes."""
    prefix = tmp_path / "corpus"
    preprocess([write_jsonl(tmp_path / "a.jsonl", ["x"])], str(prefix), tokenizer)
    path = tmp_path / "large.jsonl"
    path.write_bytes(Path(write_jsonl(path, texts)).read_bytes() * 1500)
    process = Command(
        tmp_path,
        *("preprocess", "--input", path, "--output-prefix", prefix, "--workers", 2),
        *("--tokenizer-model", tokenizer.tokenizer_model),
    )
    unfinished = Path(f"{prefix}.unfinished.bin")
    deadline = time.monotonic() + 120
    while not unfinished.exists() or not unfinished.stat().st_size or len(children(process)) < 2:
        assert process.is_running(), process.result()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    process.end()
    assert document_ids(prefix, 0)[-1] == 2
    assert not list(tmp_path.glob("*unfinished*"))


def test_a_killed_worker_ends_the_command(running):
    os.kill(children(running)[-1], signal.SIGKILL)
    status, out, errors = running.result()
    assert status == 1
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    assert "large.jsonl, line" in last
    assert "was killed by SIGKILL, as the system does when memory runs out" in last
    assert "Traceback" not in errors + out


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_leaves_nothing(running, stop, everyone):
    workers = children(running)
    (os.killpg if everyone else os.kill)(running.pid, stop)
    status, out, errors = running.result()
    assert status == 128 + stop
    assert errors.splitlines()[-1] == "stopped: no corpus was written, an earlier one stays."
    assert "Traceback" not in errors + out
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_the_command_says_what_became_of_the_documents(tmp_path, texts):
    config = saved(byte_level_bpe(texts, 300), tmp_path / "tokenizer")
    path = tmp_path / "part-00000.gz"
    lines = rb'{"body": "a\ud800"}' + b"\n" + b'{"body": ""}\n{"body": "x<eos>y"}\n'
    path.write_bytes(gzip.compress(lines))
    prefix = tmp_path / "new" / "corpus"
    process = Command(
        tmp_path,
        *("preprocess", "--input", path, "--json-key", "body", "--output-prefix", prefix),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", config.tokenizer_model),
    )
    status, out, errors = process.result()
    assert status == 0, errors
    assert "2 documents" in out
    assert "(1 empty documents left out)" in out
    assert "note: 1 documents had bytes that are not UTF-8, or lone surrogates; each" in errors
    assert f"The first: {path}, line 1." in errors
    assert "note: 1 end-of-document tokens lie inside documents" in errors


# --- train-tokenizer ------------------------------------------------------------------------------


def test_the_tokenizer_keeps_every_character_but_one(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer.tokenizer_model)
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    decoded = pieces.decode(pieces.encode(characters))
    assert [a for a, b in zip(characters, decoded, strict=True) if a != b] == ["\u2581"]
    for text in ("\u2581", " a\u2581 b", "\u2581\u2581"):
        assert pieces.decode(pieces.encode(text)) == text.replace("\u2581", " ")
    words = ["<s>", "</s>", "<unk>", "<0x41>", "\u2585", "\ufeff", "\0", "\r", "a", "é", "e\u0301"]
    for _ in range(500):
        text = "".join(random.choices([*words, " ", "\n", "\t", "ﬁ"], k=random.randint(1, 20)))
        assert pieces.decode(pieces.encode(text)) == text


def test_tokenizer_learns_the_same_from_every_format(tmp_path, texts):
    lines = Path(write_jsonl(tmp_path / "a.jsonl", texts)).read_bytes()
    (tmp_path / "part-00000.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    models = set()
    for path in list(tmp_path.iterdir()):
        train_tokenizer([str(path)], str(tmp_path / "t.model"), 330)
        models.add((tmp_path / "t.vocab").read_text())
    assert len(models) == 1


def test_vocabulary_file_is_as_sentencepiece_writes_it(tmp_path):
    lines = ["".join(random.choices("abc äß日", k=50)) for _ in range(200)]
    train_tokenizer([write_jsonl(tmp_path / "a.jsonl", lines)], str(tmp_path / "t.model"), 290)
    found = (tmp_path / "t.vocab").read_text(encoding="utf-8").split("\n")
    with pytest.MonkeyPatch.context() as patch:
        train = sentencepiece.SentencePieceTrainer.train

        def to_files(model_writer, **options):
            train(model_prefix=str(tmp_path / "theirs"), **options)
            model_writer.write((tmp_path / "theirs.model").read_bytes())

        patch.setattr(sentencepiece.SentencePieceTrainer, "train", to_files)
        train_tokenizer([str(tmp_path / "a.jsonl")], str(tmp_path / "t.model"), 290)
    assert (tmp_path / "theirs.vocab").read_text(encoding="utf-8").split("\n") == found
    assert len(found) == 290 + 2  # "\n" is a piece, and the end of the last line


def test_a_full_disk_leaves_the_earlier_tokenizer(tmp_path, texts):
    path, model = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "t.model"
    train_tokenizer([path], str(model), 300)
    before = model.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*t\.(vocab|model)\.unfinished"):
            train_tokenizer([path], str(model), 330)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert model.read_bytes() == before
    assert not list(tmp_path.glob("*unfinished*"))


def test_tokenizer_training_says_what_it_cannot_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{broken\n')
    model = str(tmp_path / "t.model")
    with pytest.raises(UserError, match=r"^[^ ]*a\.jsonl, line 2: expected a JSON object"):
        train_tokenizer([str(path)], model, 300)
    for name in ("t.model", "t.vocab"):
        (tmp_path / name).write_text('{"text": "x"}')
        with pytest.raises(UserError, match=r"would replace .*, an input"):
            train_tokenizer([str(path), str(tmp_path / name)], model, 300)
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.fixture
def training(tmp_path, texts):
    """A train-tokenizer command whose worker is busy for long, and an earlier model's name."""
    model = tmp_path / "t.model"
    train_tokenizer([write_jsonl(tmp_path / "a.jsonl", texts)], str(model), 300)
    before = model.read_bytes()
    path = tmp_path / "large.jsonl"
    path.write_bytes(Path(write_jsonl(path, texts)).read_bytes() * 1500)
    process = Command(
        tmp_path,
        *("train-tokenizer", "--input", path, "--output", model, "--vocab-size", 8000),
    )
    deadline = time.monotonic() + 60
    while not children(process):
        assert process.is_running(), process.result()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    process.end()
    assert model.read_bytes() == before
    assert not list(tmp_path.glob("*unfinished*"))


def test_stopping_and_killing_the_training_of_a_tokenizer(training):
    (worker,) = children(training)
    os.kill(training.pid, signal.SIGTERM)
    status, out, errors = training.result()
    assert status == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == "stopped: no tokenizer was written, an earlier one stays."
    assert "Traceback" not in errors + out
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_killed_training_of_a_tokenizer_is_an_error(training):
    os.kill(children(training)[0], signal.SIGKILL)
    status, out, errors = training.result()
    assert status == 1
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and "was killed by SIGKILL" in last
    assert "Traceback" not in errors + out
