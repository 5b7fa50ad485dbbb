"""The C++ codec: csrc/logit_codec/bindings.cpp."""

from collections.abc import Buffer

import numpy as np

MIN_VALUE_BITS: int
MAX_VALUE_BITS: int

class CorruptError(ValueError): ...
class BadRowsError(ValueError): ...

def ragged(
    ids: np.ndarray, logprobs: np.ndarray, counts: np.ndarray, vocab_size: int, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Flat ids and log-probabilities of padded rows; BadRowsError where a row is wrong."""

def encode_exact(counts: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> bytes: ...
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
    def slice(self, stream: Buffer, rows: int, entries: int, first: int, count: int) -> bytes: ...

class Shard:
    def __init__(
        self,
        file: Buffer,
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
    ) -> None: ...
    def starts(self) -> np.ndarray: ...
    def document_rows(self, document: int) -> tuple[int, int]: ...
    def digest(self, document: int) -> int: ...
    def block(self, index: int) -> tuple[int, int]: ...
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
