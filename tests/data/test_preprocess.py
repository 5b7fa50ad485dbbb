import json
import multiprocessing
import random
import signal

import pytest
import tokenizers
import transformers

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.preprocess import _start_worker, preprocess
from megatron_pd.data.tokenizer import tokenizer_config
from megatron_pd.data.train_tokenizer import train_tokenizer
from megatron_pd.errors import UserError


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


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
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=config.tokenizer_model).decode(ids)


def test_a_waiting_worker_dies_by_sigterm(tokenizer):
    """The command's own handler for SIGTERM is not its workers': the pool ends them so."""

    def wait_for_work(ready):
        _start_worker(tokenizer)
        ready.set()
        signal.pause()

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        context = multiprocessing.get_context("fork")
        ready = context.Event()
        worker = context.Process(target=wait_for_work, args=(ready,))
        worker.start()
        assert ready.wait(60)
        worker.terminate()
        worker.join(60)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert worker.exitcode == -signal.SIGTERM


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


def test_hugging_face_tokenizer(tmp_path, texts):
    folder = str(tmp_path / "tokenizer")
    byte_level_bpe(texts, 300).save_pretrained(folder)
    config = tokenizer_config("HuggingFaceTokenizer", folder)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    preprocess([path], str(tmp_path / "corpus"), config, workers=2)
    corpus = MegatronCorpus(str(tmp_path / "corpus"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for document, text in enumerate(texts):
        *ids, end = corpus.tokens(document).tolist()
        assert end == tokenizer.eos_token_id
        assert tokenizer.decode(ids) == text


def byte_level_bpe(texts, vocab_size):
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, special_tokens=["<eos>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<eos>"
    )


def test_too_little_text_for_the_vocabulary(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["tiny"])
    with pytest.raises(UserError, match="--vocab-size"):
        train_tokenizer([path], str(tmp_path / "t.model"), 5000)


def test_tokenizer_learns_from_the_first_bytes_alone(tmp_path, texts):
    first, second = "".join(texts), "".join(reversed(texts)).replace("return", "yield")
    vocabularies = []
    for name, documents, limit in (
        ("a", [first], 1 << 20),
        ("b", [first, second], 100),
        ("c", [first, second], 1 << 20),
    ):
        path = write_jsonl(tmp_path / f"{name}.jsonl", documents)
        train_tokenizer([path], str(tmp_path / f"{name}.model"), 330, max_bytes=limit)
        vocabularies.append((tmp_path / f"{name}.vocab").read_text())
    assert vocabularies[0] == vocabularies[1] != vocabularies[2]


def test_a_tokenizer_is_a_model_file(tmp_path):
    with pytest.raises(UserError, match=r"t\.json: a sentencepiece model ends in \.model"):
        train_tokenizer([write_jsonl(tmp_path / "a.jsonl", ["x"])], str(tmp_path / "t.json"), 300)
