"""The C++ codec: csrc/logit_codec/bindings.cpp."""

from collections.abc import Buffer, Callable, Mapping

import numpy as np

MIN_VALUE_BITS: int
MAX_VALUE_BITS: int
NATIVE_CODECS: tuple[int, int]
"""Numbers of the codecs that are decoded here: exact, compact."""

type Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""counts int32 [n], ids int32 and logprobs float32 [sum of counts]."""

class CorruptError(ValueError): ...
class BadRowsError(ValueError): ...

def ragged(
    ids: np.ndarray, logprobs: np.ndarray, counts: np.ndarray, vocab_size: int, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Flat ids and log-probabilities of padded rows; BadRowsError where a row is wrong."""

def encode_exact(counts: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> bytes: ...
def decode_exact(stream: Buffer, rows: int, entries: int, vocab_size: int) -> Rows: ...
def train(
    vocab_size: int,
    draws: int,
    value_bits: int,
    id_counts: np.ndarray,
    counts: np.ndarray,
    ids: np.ndarray,
    logprobs: np.ndarray,
) -> bytes:
    """Payload of the entropy model; id_counts uint64 [vocab_size], the rest a sample of rows."""

class CompactCoder:
    def __init__(self, payload: Buffer, vocab_size: int, draws: int, value_bits: int) -> None: ...
    def encode(self, counts: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> bytes: ...
    def decode(self, stream: Buffer, rows: int, entries: int) -> Rows: ...
    def slice(self, stream: Buffer, rows: int, entries: int, first: int, stop: int) -> bytes: ...

class Shard:
    def __init__(
        self,
        path: str,
        *,
        rows: int,
        documents: int,
        blocks: int,
        index_offset: int,
        index_bytes: int,
        bound: bool,
        vocab_size: int,
        draws: int,
        value_bits: int,
        codecs: Mapping[int, tuple[int, Callable[[int, bytes | None], Callable[..., Rows]]]],
    ) -> None:
        """codecs: of other numbers, the bytes of a statistic's value and what makes the decoder
        `decode(block offset, stream, rows, entries)` from (block offset, model)."""

    def starts(self) -> np.ndarray: ...
    def document_rows(self, document: int) -> tuple[int, int]: ...
    def digests(self, first: int, stop: int) -> np.ndarray: ...
    def block_rows(self) -> np.ndarray:
        """First row of every block."""

    def block_header(self, index: int) -> bytes: ...
    def block_payload(self, index: int) -> bytes: ...
    def block_model(self, index: int) -> bytes: ...
    def max_count(self, begin: int, end: int) -> int: ...
    def check_block(self, index: int) -> None: ...
    def check_index(self) -> None: ...
    def check_frames(self) -> None: ...
    def read(
        self,
        begin: int,
        end: int,
        ids: np.ndarray,
        logprobs: np.ndarray,
        counts: np.ndarray,
        first: int,
        statistics: np.ndarray | None = None,
    ) -> None: ...
