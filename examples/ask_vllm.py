"""Asks a vLLM server for a teacher's log-probabilities of a corpus's documents.

    vllm serve MODEL --max-logprobs 50
    python examples/ask_vllm.py --url http://localhost:8000 --data-path /data/corpus \
        --top-k 50 --output answers.jsonl
    megatron-pd convert from-vllm answers.jsonl --corpus /data/corpus \
        --tokenizer-model MODEL --output /data/corpus.pd

A line of the output is an answer: {"document": …, "start": …, "top_k": …, "response": …}, the last
as the server gave it. Longer documents than --seq-length are asked for in windows that overlap. The
same command goes on after the answers that are there; a line that was cut short is dropped. A key
for the server is taken from VLLM_API_KEY.

The server must have the corpus's tokenizer: it is sent token ids, and never text.
"""

import argparse
import concurrent.futures
import fcntl
import http.client
import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.data.windows import windows_of
from megatron_pd.errors import UserError, if_stopped, reporting_errors, stop_on_sigterm

HEAD = re.compile(rb'\{"document": (\d+), "start": (\d+), "top_k": (\d+), ')
LONGEST_DEFAULT = 4096
LONGEST_WAIT = 60.0

Window = tuple[int, int, int]  # document, first token, tokens that have a row


def main() -> None:
    args = parsed()
    corpus = MegatronCorpus(args.data_path)
    server = Server(args)
    length = args.seq_length or min(server.longest, LONGEST_DEFAULT)
    if not 0 < length <= server.longest:
        raise UserError(
            f"--seq-length is {length}; {server.model} takes {server.longest} tokens, as a prompt "
            "has one more, and one is generated."
        )
    overlap = length // 4 if args.overlap is None else args.overlap
    if not 0 <= overlap < length:
        raise UserError(f"--overlap is {overlap}; it is at least 0 and less than {length}.")
    lengths = corpus.document_lengths
    windows = windows_of(np.arange(len(corpus)), lengths, length, overlap)
    with open(args.output, "a+b") as output:
        done = answered(output, args)
        with if_stopped("the same command goes on after the answers that are there"):
            ask_all(server, corpus, args, output, list(without(windows, done)))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--url", required=True, help="of the server, such as http://localhost:8000")
    parser.add_argument("--data-path", required=True, help="prefix of the .bin/.idx corpus")
    parser.add_argument("--output", required=True, help="file of answers, a line each")
    parser.add_argument("--top-k", type=int, default=20, help="entries of a row; default: 20")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument(
        "--seq-length", type=int, help=f"default: what fits, at most {LONGEST_DEFAULT:,}"
    )
    parser.add_argument("--overlap", type=int, help="default: a quarter of --seq-length")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at once; default: 32")
    parser.add_argument("--retries", type=int, default=8, help="of one request; default: 8")
    parser.add_argument(
        "--retry-seconds", type=float, default=1.0, help="before the first; then twice as long"
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of one request")
    args = parser.parse_args()
    for name in ("top_k", "concurrency"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give 1 or more.")
    return args


class Server:
    """`longest`: the most tokens that can have a row at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.stopped = threading.Event()  # ends what waits for another try
        served = self._call("/v1/models")["data"]
        names = [entry["id"] for entry in served]
        self.model = args.model or names[0]
        if self.model not in names:
            raise UserError(f"--model {self.model}: {args.url} serves {', '.join(names)}.")
        longest = served[names.index(self.model)].get("max_model_len")
        self.longest = (longest or LONGEST_DEFAULT + 2) - 2

    def ask(self, tokens: list[int]) -> Any:
        """The completion of a prompt, which has its prompt_logprobs."""
        response = self._call(
            "/v1/completions",
            {
                "model": self.model,
                "prompt": tokens,
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": self._args.top_k,
                "return_token_ids": True,
            },
        )
        if not response["choices"][0].get("prompt_logprobs"):
            raise UserError(f"{self._args.url} gives no prompt_logprobs: is it a vLLM server?")
        return response

    def _call(self, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self._args.url.rstrip("/") + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        if key := os.environ.get("VLLM_API_KEY"):
            request.add_header("Authorization", f"Bearer {key}")
        wait = self._args.retry_seconds
        for left in range(self._args.retries, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=self._args.timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {error.read(2000).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    sentence = f"{self._args.url}{path} refuses a request ({reason})."
                    raise UserError(sentence) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
            if self.stopped.wait(wait if left else 0):
                break
            if left:
                wait = min(2 * wait, LONGEST_WAIT)
        raise UserError(
            f"{self._args.url}{path} failed {self._args.retries + 1} times ({reason}). The same "
            "command goes on after the answers that are there."
        )


def answered(output: BinaryIO, args: argparse.Namespace) -> set[tuple[int, int]]:
    """(document, start) of every whole line; what follows the last of them is cut off."""
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sentence = f"--output {args.output}: another process writes it; give another file."
        raise UserError(sentence) from None
    done = set()
    output.seek(0)
    end = 0
    for line in output:
        head = HEAD.match(line)
        if line.endswith(b"\n"):
            if head is None or int(head[3]) != args.top_k:
                raise UserError(
                    f"--output {args.output} has a line that is no answer with --top-k "
                    f"{args.top_k}: give another file."
                )
            done.add((int(head[1]), int(head[2])))
            end += len(line)
    output.truncate(end)
    return done


def without(windows: Any, done: set[tuple[int, int]]) -> Iterator[Window]:
    for document, start, length in zip(
        windows.documents.tolist(), windows.starts.tolist(), windows.lengths.tolist(), strict=True
    ):
        if (document, start) not in done:
            yield document, start, length


def ask_all(
    server: Server,
    corpus: MegatronCorpus,
    args: argparse.Namespace,
    output: BinaryIO,
    windows: list[Window],
) -> None:
    def answer(window: Window) -> tuple[bytes, int]:
        document, start, length = window
        tokens = corpus.tokens(document, start, length + 1).tolist()
        line = {
            "document": document,
            "start": start,
            "top_k": args.top_k,
            "response": server.ask(tokens),
        }
        return json.dumps(line).encode() + b"\n", length

    left = iter(windows)
    waiting: set[concurrent.futures.Future[tuple[bytes, int]]] = set()
    pool = concurrent.futures.ThreadPoolExecutor(args.concurrency)
    total = sum(length for _, _, length in windows)
    try:
        with tqdm(
            total=total, unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty()
        ) as bar:
            while True:
                for window in left:
                    waiting.add(pool.submit(answer, window))
                    if len(waiting) == 2 * args.concurrency:
                        break
                if not waiting:
                    return
                ready, waiting = concurrent.futures.wait(
                    waiting, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in ready:
                    line, length = future.result()
                    output.write(line)
                    bar.update(length)
                output.flush()
    finally:
        server.stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    with reporting_errors():
        stop_on_sigterm()
        main()
