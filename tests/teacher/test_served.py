"""vLLM's answers become the rows of its model; the server here is a bigram table behind HTTP.

What it answers has the fields and shapes of vLLM's completions with prompt_logprobs, and of a
RequestOutput of LLM.generate. No vLLM runs in these tests.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

from megatron_pd.cli import main
from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.corpus_writer import CorpusWriter
from megatron_pd.data.tokenizer import open_tokenizer, tokenizer_config, tokenizer_fingerprint
from megatron_pd.errors import UserError
from megatron_pd.store import LogitStore, LogitStoreWriter
from megatron_pd.teacher import served

VOCAB_SIZE, TOP_K = 40, 6
SCRIPT = Path(__file__).parents[2] / "examples" / "ask_vllm.py"


class Model:
    """log p(next | token), and what vLLM would answer."""

    def __init__(self) -> None:
        table = np.random.default_rng().normal(size=(VOCAB_SIZE, VOCAB_SIZE)) * 2
        self.logprobs = (table - np.log(np.exp(table).sum(1, keepdims=True))).astype(np.float32)

    def prompt_logprobs(self, tokens: Sequence[int], top_k: int) -> list[Any]:
        answer: list[Any] = [None]
        for token, label in itertools.pairwise(tokens):
            row = self.logprobs[token]
            top = np.argsort(-row, kind="stable")[:top_k].tolist()
            ranks = {label: int((row >= row[label]).sum())}  # vLLM has the token itself first
            ranks |= {token: rank for rank, token in enumerate(top, 1)}
            answer.append(
                {
                    str(token): {"logprob": float(row[token]), "rank": rank, "decoded_token": "x"}
                    for token, rank in ranks.items()
                }
            )
        return answer

    def completion(self, tokens: Sequence[int], top_k: int) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": "x",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [3],
            "prompt_logprobs": self.prompt_logprobs(tokens, top_k),
            "prompt_token_ids": list(tokens),
        }
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1}
        return {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 1764115200,
            "model": "a/teacher",
            "choices": [choice],
            "system_fingerprint": None,
            "usage": {**usage, "total_tokens": len(tokens) + 1},
        }

    def request_output(self, tokens: Sequence[int], top_k: int) -> dict[str, Any]:
        return {
            "request_id": "7",
            "prompt": None,
            "prompt_token_ids": list(tokens),
            "prompt_logprobs": self.prompt_logprobs(tokens, top_k),
            "outputs": [{"index": 0, "text": "x", "token_ids": [3], "logprobs": None}],
            "finished": True,
        }


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> MegatronCorpus:
    rng = np.random.default_rng()
    lengths = np.array([1, 2, 50, 33, *rng.integers(1, 60, 20)], np.int32)
    prefix = str(tmp_path_factory.mktemp("corpus") / "corpus")
    with CorpusWriter(prefix, np.uint16) as writer:
        writer.append(rng.integers(0, VOCAB_SIZE, lengths.sum()).astype(np.uint16), lengths)
        writer.publish()
    return MegatronCorpus(prefix)


def line(model: Model, corpus: MegatronCorpus, document: int, **changes: Any) -> dict[str, Any]:
    """The answer to a whole document."""
    tokens = corpus.tokens(document).tolist()
    response = model.completion(tokens, TOP_K)
    return {"document": document, "start": 0, "top_k": TOP_K, "response": response, **changes}


def convert(corpus: MegatronCorpus, files: Sequence[Path], store: Path, *flags: object) -> None:
    arguments = [*files, "--corpus", corpus.prefix, "--output", store, "--codec", "exact", *flags]
    if "--tokenizer-model" not in flags:
        arguments += ["--vocab-size", VOCAB_SIZE]
    sys.argv = ["megatron-pd", "convert", "from-vllm", *map(str, arguments)]
    assert main() == 0


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(fields) + "\n" for fields in lines))
    return path


def check(
    store: LogitStore,
    model: Model,
    corpus: MegatronCorpus,
    top_k: int = TOP_K,
    top_p: float = 1.0,
    without: Sequence[tuple[int, int]] = (),
) -> None:
    """Every row is the model's top k, cut to the top p, but those of (document, offset)."""
    store.check_corpus(corpus, full=True)
    for document in range(store.num_documents):
        tokens, rows = corpus.tokens(document), store.read(document)
        assert len(rows) == len(tokens) and rows.counts[-1] == 0
        for offset, (token, label) in enumerate(itertools.pairwise(tokens)):
            row = model.logprobs[token]
            top = np.argsort(-row, kind="stable")[:top_k]
            before = np.cumsum(np.exp(row[top].astype(np.float64))) - np.exp(row[top])
            expected = top[before < top_p]
            if (document, offset) in without:
                expected = expected[:0]
            else:
                assert rows.statistics["label_logprob"][offset] == row[label]
            count = rows.counts[offset]
            assert rows.ids[offset, :count].tolist() == expected.tolist()
            assert rows.logprobs[offset, :count].tolist() == row[expected].tolist()


# --- the conversion -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_in_any_order_and_form_become_the_model_s_rows(
    tmp_path: Path,
    model: Model,
    corpus: MegatronCorpus,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    monkeypatch.setattr(served, "shards_of", lambda lengths: [range(5), range(5, len(lengths))])
    answers = [line(model, corpus, document) for document in range(len(corpus))]
    np.random.default_rng().shuffle(answers)
    first = write(tmp_path / "a.jsonl", answers[:9])
    outputs = [
        {**model.request_output(corpus.tokens(answer["document"]).tolist(), TOP_K), **answer}
        for answer in answers[9:]
    ]
    for output in outputs:  # as a script of one's own writes LLM.generate's
        del output["response"], output["start"]
        output["model"] = "a/teacher"
    second = write(tmp_path / "b.jsonl", outputs)
    with second.open("a") as file:
        file.write("\n")
    convert(corpus, [first, second], tmp_path / "store", "--workers", workers)
    store = LogitStore(tmp_path / "store")
    check(store, model, corpus)
    wanted = {"teacher": "a/teacher", "top_k": TOP_K, "source": "prompt_logprobs of vLLM"}
    assert wanted.items() <= store.metadata.items()
    convert(corpus, [first, second], tmp_path / "cut", "--top-p", 0.7, "--top-k", 4)
    check(LogitStore(tmp_path / "cut"), model, corpus, top_k=4, top_p=0.7)


def test_windows_overlap_and_what_no_answer_has_is_without_teacher(
    tmp_path: Path, model: Model, corpus: MegatronCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = corpus.tokens(2).tolist()
    answers = [line(model, corpus, document) for document in range(4, len(corpus))]
    for start, stop in ((30, 45), (0, 20), (15, 25), (17, 20)):
        response = model.completion(tokens[start:stop], TOP_K)
        answers.append(line(model, corpus, 2, start=start, response=response))
    # Another row of a token that two answers have: the one that begins first counts.
    for position in answers[-1]["response"]["choices"][0]["prompt_logprobs"][1:]:
        for entry in position.values():
            entry["logprob"] -= 1
    missing = [(2, offset) for offset in (24, 25, 26, 27, 28, 29, 44, 45, 46, 47, 48)]
    missing += [(number, offset) for number in (1, 3) for offset in range(60)]
    convert(corpus, [write(tmp_path / "a.jsonl", answers)], tmp_path / "store")
    check(LogitStore(tmp_path / "store"), model, corpus, without=missing)
    count = 11 + 1 + 32
    assert f"note: {count} tokens are in no answer" in capsys.readouterr().err


def test_an_interrupted_conversion_goes_on(
    tmp_path: Path, model: Model, corpus: MegatronCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_FLUSH_ROWS", 20)
    answers = [line(model, corpus, document) for document in range(len(corpus))]
    file = write(tmp_path / "a.jsonl", answers)
    append, left = LogitStoreWriter.append, 17

    def stopping(self: Any, *what: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        append(self, *what)

    monkeypatch.setattr(LogitStoreWriter, "append", stopping)
    with pytest.raises(SystemExit, match="130"):
        convert(corpus, [file], tmp_path / "store")
    monkeypatch.setattr(LogitStoreWriter, "append", append)
    rows_of, converted = served._rows, []

    def counting(place: Any, *what: Any) -> Any:
        converted.append(place.document)
        return rows_of(place, *what)

    monkeypatch.setattr(served, "_rows", counting)
    convert(corpus, [file], tmp_path / "store")
    check(LogitStore(tmp_path / "store"), model, corpus)
    assert 0 < len(converted) < len(corpus)
    convert(corpus, [file], tmp_path / "store")  # nothing left to do


def test_probability_0_is_no_entry(tmp_path: Path, model: Model, corpus: MegatronCorpus) -> None:
    answer = line(model, corpus, 3)
    positions = answer["response"]["choices"][0]["prompt_logprobs"]
    label = str(corpus.tokens(3)[1])
    for token, entry in positions[1].items():
        entry["logprob"] = 0.0 if token == label else -9999.0
    file = write(tmp_path / "a.jsonl", [answer])
    convert(corpus, [file], tmp_path / "store")
    rows = LogitStore(tmp_path / "store").read(3)
    assert rows.counts[0] == 1 and rows.ids[0, 0] == int(label)


def logprobs_of(answer: dict[str, Any]) -> list[Any]:
    return answer["response"]["choices"][0]["prompt_logprobs"]


def set_label(answer: dict[str, Any], corpus: MegatronCorpus, value: Any) -> None:
    logprobs_of(answer)[8][str(corpus.tokens(2)[8])]["logprob"] = value


def other_tokens(answer: dict[str, Any], corpus: MegatronCorpus) -> None:
    answer["response"]["choices"][0]["prompt_token_ids"][9] += 1


def other_label(answer: dict[str, Any], corpus: MegatronCorpus) -> None:
    del answer["response"]["choices"][0]["prompt_token_ids"]
    del logprobs_of(answer)[9][str(corpus.tokens(2)[9])]


def fewer(answer: dict[str, Any], corpus: MegatronCorpus) -> None:
    label = str(corpus.tokens(2)[5])
    logprobs_of(answer)[5] = {label: logprobs_of(answer)[5][label]}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (other_tokens, "document 2, offset 9: the prompt has other tokens than"),
        (other_label, "document 2, offset 8: the token that follows is not in its"),
        (fewer, "document 2, offset 4: fewer than the 6 entries"),
        (lambda a, c: set_label(a, c, float("nan")), "offset 7: a log-probability is"),
        (lambda a, c: set_label(a, c, -9999.0), "--logprobs-mode raw_logprobs"),
        (lambda a, c: set_label(a, c, 3.0), "offset 7: a log-probability is above 0"),
        (lambda a, c: set_label(a, c, 0.0), "mass"),
        (lambda a, c: set_label(a, c, "x"), "not as vLLM writes them"),
        (lambda a, c: logprobs_of(a).append({}), "document 2 has 50 tokens"),
        (lambda a, c: logprobs_of(a).insert(5, None), "document 2 has 50 tokens"),
        (lambda a, c: logprobs_of(a).__setitem__(5, None), "not as vLLM writes them"),
        (lambda a, c: a["response"]["choices"][0].pop("prompt_logprobs"), "no prompt_logprobs"),
        (lambda a, c: a["response"]["choices"].append({}), "2 choices"),
        (lambda a, c: a.update(response=[1]), "no answer of vLLM"),
        (lambda a, c: a.update(document=24), "document 24; "),
        (lambda a, c: a.update(document="2"), "\"document\" is '2'"),
        (lambda a, c: a.update(start=-1), '"start" is -1'),
        (lambda a, c: a.pop("top_k"), '"top_k" is None'),
        (lambda a, c: a.update(top_k=5), "top_k is 5, in the first document's answer 6"),
        (lambda a, c: a["response"].update(model="another"), "model is 'another'"),
    ],
)
def test_what_is_no_answer_about_the_corpus_is_refused(
    tmp_path: Path,
    model: Model,
    corpus: MegatronCorpus,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[dict[str, Any], MegatronCorpus], Any],
    sentence: str,
) -> None:
    answer = line(model, corpus, 2)
    spoil(answer, corpus)
    file = write(tmp_path / "a.jsonl", [line(model, corpus, 1), answer])
    with pytest.raises(SystemExit):
        convert(corpus, [file], tmp_path / "store")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and sentence in error and "should not" not in error


@pytest.mark.parametrize("text", ["", "\n", '{"document": 1, "start"', "[" * 100_000, "[1]\n"])
def test_what_is_no_json_is_refused(
    tmp_path: Path, corpus: MegatronCorpus, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        convert(corpus, [tmp_path / "a.jsonl"], tmp_path / "store")
    assert str(tmp_path / "a.jsonl") in capsys.readouterr().err


def test_the_tokenizer_is_in_the_manifest(
    tmp_path: Path, model: Model, corpus: MegatronCorpus
) -> None:
    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    folder = str(tmp_path / "tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w0").save_pretrained(
        folder
    )
    answers = [line(model, corpus, document) for document in range(len(corpus))]
    file = write(tmp_path / "a.jsonl", answers)
    convert(corpus, [file], tmp_path / "store", "--tokenizer-model", folder)
    student = open_tokenizer(tokenizer_config("HuggingFaceTokenizer", folder))
    store = LogitStore(tmp_path / "store")
    assert store.metadata["tokenizer"] == tokenizer_fingerprint(student)
    assert store.vocab_size == VOCAB_SIZE
    check(store, model, corpus)


# --- asking ---------------------------------------------------------------------------------------


class FakeServer(ThreadingHTTPServer):
    """Answers as vLLM's server; every third request fails in one way or another."""

    daemon_threads = True

    def __init__(self, model: Model) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.lock = threading.Lock()
        self.requests = self.at_once = self.most_at_once = 0
        self.prompts: list[tuple[int, ...]] = []
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.reply(200, {"data": [{"id": "a/teacher", "max_model_len": 34}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests += 1
            number = self.server.requests
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            time.sleep(self.server.delay)
            self.answer(body, number)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def answer(self, body: dict[str, Any], number: int) -> None:
        if body["prompt_logprobs"] > 20:
            self.reply(400, {"error": {"message": "Requested prompt logprobs of 21, max is 20"}})
        elif number % 3 == 0:
            self.fail(number // 3 % 3)
        else:
            with self.server.lock:
                self.server.prompts.append(tuple(body["prompt"]))
            assert len(body["prompt"]) + body["max_tokens"] <= 34
            self.reply(200, self.server.model.completion(body["prompt"], body["prompt_logprobs"]))

    def fail(self, how: int) -> None:
        if how == 0:
            self.reply(503, {"error": "busy"})
        elif how == 1:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        self.close_connection = True

    def reply(self, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def server(model: Model) -> Iterator[FakeServer]:
    server = FakeServer(model)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def command(server: FakeServer, corpus: MegatronCorpus, output: Path) -> list[str]:
    arguments = [SCRIPT, "--url", server.url, "--data-path", corpus.prefix, "--output", output]
    arguments += ["--retry-seconds", 0.01, "--top-k", TOP_K, "--concurrency", 4]
    return [str(argument) for argument in arguments]


def asking(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )


def test_the_script_asks_for_every_document_and_goes_on_after_a_kill(
    tmp_path: Path, model: Model, corpus: MegatronCorpus, server: FakeServer
) -> None:
    output = tmp_path / "answers.jsonl"
    server.delay = 0.05
    killed = asking(command(server, corpus, output))
    while not output.exists() or output.read_bytes().count(b"\n") < 5:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    while server.at_once:  # what it had asked for
        time.sleep(0.01)
    server.delay = 0
    whole = output.read_bytes().rpartition(b"\n")[0] + b"\n"
    output.write_bytes(whole + b'{"document": 3, "start": 0, "top_k": 6, "respon')
    server.prompts.clear()
    again = asking(command(server, corpus, output))
    assert again.communicate()[1] == "" and again.returncode == 0
    assert output.read_bytes().startswith(whole)
    windows = sum(-(-max(length - 33, 0) // 24) + 1 for length in corpus.document_lengths.tolist())
    windows -= int((corpus.document_lengths == 1).sum())
    assert output.read_bytes().count(b"\n") == windows
    assert len(server.prompts) == windows - whole.count(b"\n")
    assert 1 < server.most_at_once <= 4
    convert(corpus, [output], tmp_path / "store")
    check(LogitStore(tmp_path / "store"), model, corpus)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--top-k", 21), "refuses a request (400: "),
        (("--model", "b"), "--model b: http://127.0.0.1"),
        (("--seq-length", 33), "--seq-length is 33; a/teacher takes 32 tokens"),
        (("--retries", 0), "failed 1 times"),
        (("--concurrency", 0), "--concurrency is 0"),
        (("--overlap", 32), "--overlap is 32"),
        (("--data-path", "nowhere"), "nowhere.bin does not exist"),
    ],
)
def test_the_script_says_what_the_server_does_not_take(
    tmp_path: Path,
    corpus: MegatronCorpus,
    server: FakeServer,
    flags: Sequence[object],
    sentence: str,
) -> None:
    sys.argv = command(server, corpus, tmp_path / "answers.jsonl") + [str(flag) for flag in flags]
    with pytest.raises(UserError) as refused:
        runpy.run_path(str(SCRIPT))["main"]()
    assert sentence in str(refused.value)


def test_the_script_leaves_another_file_alone(
    tmp_path: Path, model: Model, corpus: MegatronCorpus, server: FakeServer
) -> None:
    output = tmp_path / "answers.jsonl"
    sys.argv = command(server, corpus, output)
    for text in ("notes\n", json.dumps(line(model, corpus, 3, top_k=9)) + "\n"):
        output.write_text(text)
        with pytest.raises(UserError, match="no answer with --top-k 6"):
            runpy.run_path(str(SCRIPT))["main"]()
        assert output.read_text() == text
