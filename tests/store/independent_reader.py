"""A reader of finished shards in plain Python, written from docs/store-format.md alone.

It shares no code with the package, so that a store which both read alike is one that the page
describes. It checks what it needs to get along and is slow.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import math
import struct
import zlib
from pathlib import Path

Row = tuple[list[int], list[float], list[float]]
"""ids, log-probabilities and statistics (those present, in bit order)."""


def read_store(path: Path) -> list[list[Row]]:
    """The rows of every document of a finished store."""
    body, _, crc = (path / "store.json").read_bytes().rpartition(b"\n#crc32 ")
    assert int(crc, 16) == zlib.crc32(body)
    manifest = json.loads(body)
    assert manifest["version"] == 1
    for codec in manifest["codecs"]:
        known = (("exact", 1), ("compact", 1))
        assert (codec["name"], codec["version"]) == known[codec["number"]]
    documents: list[list[Row]] = []
    for shard in sorted(path.glob("*.shard")):
        assert int(shard.name[:12]) == len(documents)
        documents += read_shard(shard.read_bytes())
    assert len(documents) == manifest["documents"]
    return documents


def read_shard(data: bytes) -> list[list[Row]]:
    assert data[:8] == b"PDLOGITS" and zlib.crc32(data[:60]) == u32(data, 60)
    documents, rows = struct.unpack_from("<QQ", data, 32)
    vocab_size, draws, value_bits, bound = struct.unpack_from("<IIBB", data, 48)
    footer = data[-64:]
    assert footer[:8] == b"PDLOGEND" and zlib.crc32(footer[:60]) == u32(footer, 60)
    file_bytes, index_at, index_bytes, blocks, _ = struct.unpack_from("<QQQQQ", footer, 8)
    assert file_bytes == len(data)
    index = data[index_at : index_at + index_bytes]
    for page in range(0, index_bytes, 4096):
        crc = u32(data, index_at + index_bytes + page // 1024)
        assert zlib.crc32(index[page : page + 4096]) == crc
    words = struct.unpack(f"<{index_bytes // 8}Q", index)
    starts = words[: documents + 1]
    places = words[documents + 1 + (documents if bound else 0) :]
    assert len(places) == 2 * blocks
    all_rows: list[Row] = []
    for first_row, offset in zip(places[::2], places[1::2], strict=True):
        assert first_row == len(all_rows)
        all_rows += read_block(data, offset, vocab_size, draws, value_bits)
    assert len(all_rows) == rows
    return [all_rows[a:b] for a, b in itertools.pairwise(starts)]


def u32(data: bytes, at: int) -> int:
    return struct.unpack_from("<I", data, at)[0]


def frame(data: bytes, offset: int) -> tuple[tuple, bytes]:
    """Type, codec, statistics, rows, row, model's offset, entries, digests; and the payload."""
    header = data[offset : offset + 48]
    assert header[:4] == b"PDBK" and zlib.crc32(header[:44]) == u32(header, 44)
    kind, codec, statistics, rows, size, row, model, entries, _, digests, crc = struct.unpack(
        "<BBBxIIQQIHHI", header[4:44]
    )
    payload = data[offset + 48 : offset + 48 + size]
    assert zlib.crc32(payload) == crc
    return (kind, codec, statistics, rows, row, model, entries, digests), payload


def read_block(data: bytes, offset: int, vocab_size: int, draws: int, bits: int) -> list[Row]:
    header, payload = frame(data, offset)
    kind, codec, statistics, rows, _, model, entries, digests = header
    assert kind == 2
    at, present = 8 * digests, statistics.bit_count()
    form, size = ("f", 4) if codec == 0 else ("e", 2)
    values = struct.unpack_from(f"<{present * rows}{form}", payload, at)
    stream = payload[at + present * rows * size :]
    decoded = exact(stream, rows) if codec == 0 else compact(stream, rows, data, model, draws, bits)
    assert sum(len(ids) for ids, _ in decoded) == entries
    return [(*row, list(values[i::rows])) for i, row in enumerate(decoded)]


def exact(stream: bytes, rows: int) -> list[tuple[list[int], list[float]]]:
    counts = struct.unpack_from(f"<{rows}i", stream)
    entries, out, at = sum(counts), [], 0
    ids_at, values_at = 4 * rows, 4 * rows + 3 * entries
    for count in counts:
        ids = [
            int.from_bytes(stream[ids_at + 3 * i : ids_at + 3 * i + 3], "little")
            for i in range(at, at + count)
        ]
        out.append((ids, list(struct.unpack_from(f"<{count}f", stream, values_at + 4 * at))))
        at += count
    return out


class EntropyModel:
    def __init__(self, payload: bytes) -> None:
        vocab_size, seen = struct.unpack_from("<II", payload)
        bits = Bits(payload[8:])
        self.id_of_ordinal = read_list(bits, seen, vocab_size)
        known = set(self.id_of_ordinal)
        self.id_of_ordinal += [id_ for id_ in range(vocab_size) if id_ not in known]
        self.class_of: list[int] = []
        self.class_ordinals: list[list[int]] = []
        if classes := bits.get(8):
            common = min(seen, 2048)
            width = (classes - 1).bit_length()
            self.class_of = [bits.get(width) for _ in range(common + 1)]
            self.class_ordinals = [read_list(bits, common, common) for _ in range(classes)]
        self.models = [read_model(bits) for _ in range(314)]
        bits.finish()

    def ids(self, ordinals: list[int]) -> list[int]:
        """Ids of a row."""
        if ordinals and self.class_of:
            here = self.class_ordinals[self.class_of[min(ordinals[0], len(self.class_of) - 1)]]
            ordinals = ordinals[:1] + [here[r] if r < len(here) else r for r in ordinals[1:]]
        return [self.id_of_ordinal[ordinal] for ordinal in ordinals]


def read_list(bits: Bits, n: int, total: int) -> list[int]:
    found: list[int] = []
    for first, last in ordinal_ranges(n):
        mean = total * 177 // 256 // (last - first)
        low_bits = mean.bit_length() - 1 if mean else 0
        following = 0
        for _ in range(first, last):
            following += (bits.unary() << low_bits) + bits.get(low_bits)
            found.append(following)
            following += 1
    return found


def read_model(bits: Bits) -> tuple[list[int], list[int], list[int]]:
    frequency = [0] * 256
    symbol = -1
    for _ in range(bits.gamma() - 1):
        symbol += bits.gamma()
        frequency[symbol] = bits.gamma()
    frequency[255] = 2048 - sum(frequency)
    slots = [s for s in range(256) for _ in range(frequency[s])]
    assert frequency[255] > 0 and len(slots) == 2048
    return slots, [sum(frequency[:s]) for s in range(256)], frequency


def first_of(symbol: int) -> tuple[int, int]:
    """Smallest number of a symbol, and its raw bits."""
    if symbol < 64:
        return symbol, 0
    raw = 3 + (symbol - 64) // 8
    return (8 + (symbol - 64) % 8) << raw, raw


def ordinal_ranges(seen: int):
    symbol = 0
    while first_of(symbol)[0] < seen:
        yield first_of(symbol)[0], min(first_of(symbol + 1)[0], seen)
        symbol += 1


class Bits:
    def __init__(self, data: bytes) -> None:
        self.number, self.length, self.at = int.from_bytes(data, "little"), 8 * len(data), 0

    def get(self, bits: int) -> int:
        self.at += bits
        return self.number >> (self.at - bits) & ((1 << bits) - 1)

    def unary(self) -> int:
        zeros = 0
        while not self.get(1):
            zeros += 1
        return zeros

    def gamma(self) -> int:
        width = self.unary()
        return 1 << width | self.get(width)

    def finish(self) -> None:
        assert self.length - 8 < self.at <= self.length or self.at == self.length == 0
        assert self.number >> self.at == 0


class SymbolStream:
    """The symbol stream of a block: numbers, one after another."""

    def __init__(self, stream: bytes, model: EntropyModel) -> None:
        size = u32(stream, 0)
        self.states = list(struct.unpack_from("<II", stream, 4))
        self.words = list(struct.unpack_from(f"<{(size - 8) // 2}H", stream, 12))[::-1]
        self.bits, self.model = Bits(stream[4 + size :]), model

    def get(self, state: int, context: int) -> int:
        slots, starts, frequency = self.model.models[context]
        x = self.states[state]
        symbol = slots[x % 2048]
        x = frequency[symbol] * (x // 2048) + x % 2048 - starts[symbol]
        if x < 65536:
            x = 65536 * x + self.words.pop()
        self.states[state] = x
        if symbol == 255:
            symbol = self.bits.get(8)
        first, raw = first_of(symbol)
        return first + self.bits.get(raw)

    def finish(self) -> None:
        assert self.states == [65536, 65536] and not self.words
        self.bits.finish()


def compact(
    stream: bytes, rows: int, data: bytes, model_at: int, draws: int, value_bits: int
) -> list[tuple[list[int], list[float]]]:
    header, payload = frame(data, model_at)
    assert header[0] == 1
    symbols, out, count = SymbolStream(stream, EntropyModel(payload)), [], 0
    for _ in range(rows):
        if draws:
            ordinals, logprobs = sampled_row(symbols, draws)
        else:
            ordinals, logprobs = top_row(symbols, count, value_bits)
        count = len(ordinals)
        out.append((symbols.model.ids(ordinals), logprobs))
    symbols.finish()
    return out


@functools.cache
class Quantizer:
    def __init__(self, value_bits: int) -> None:
        self.octaves = 23 - value_bits
        self.max_code = 75 * 2 ** (value_bits - 8) + 8 * self.octaves - 8
        self.squares = [self.root(code) ** 2 for code in range(self.max_code + 1)]

    def root(self, code: int) -> int:
        octave = min(code // 8, self.octaves)
        return (8 + code - 8 * octave) << octave

    def kind(self, code: int) -> int:
        root = self.root(code)
        octave = root.bit_length() - 1
        return 2 * (octave - 3) + (root >> (octave - 1) & 1)

    def likely_tail(self, codes: list[int]) -> int:
        rest = self.squares[-1] - sum(self.squares[code] for code in codes)
        return max(bisect.bisect_right(self.squares, rest) - 1, 0)


def top_row(
    symbols: SymbolStream, count_before: int, value_bits: int
) -> tuple[list[int], list[float]]:
    quantizer = Quantizer(value_bits)
    count = symbols.get(1, 32 + min(count_before.bit_length(), 7))
    if count == 0:
        return [], []
    ordinals: list[int] = []
    codes: list[int] = []
    for i in range(count):
        if i == 0:
            codes.append(quantizer.max_code - symbols.get(1, 40 + min(count.bit_length(), 7)))
        else:
            context = 86 + 38 * place(i) + quantizer.kind(codes[-1])
            codes.append(codes[-1] - symbols.get(1, context))
        ordinals.append(next_ordinal(symbols, ordinals, codes))
    likely = quantizer.likely_tail(codes)
    coded = symbols.get(1, 48 + quantizer.kind(likely))
    tail = likely - (coded + 1) // 2 if coded % 2 else likely + coded // 2
    log_total = math.log(sum(quantizer.squares[code] for code in [*codes, tail]))
    return ordinals, [2 * math.log(quantizer.root(code)) - log_total for code in codes]


def place(i: int) -> int:
    return min(i.bit_length() - 1, 5)


def next_ordinal(symbols: SymbolStream, ordinals: list[int], values: list[int]) -> int:
    """The ordinal of a row's last value, from the ordinals before."""
    i = len(ordinals)
    if i == 0:
        return symbols.get(0, 0)
    if i > 1 and values[-1] == values[-2]:
        return ordinals[-1] + 1 + symbols.get(0, 7 + ordinals[-1].bit_length())
    return symbols.get(0, 1 + place(i))


def sampled_row(symbols: SymbolStream, draws: int) -> tuple[list[int], list[float]]:
    left = last = draws
    ordinals: list[int] = []
    times: list[int] = []
    while left:
        i = len(ordinals)
        context = 86 + 38 * place(i) + min(last, 37) if i else 40
        last = min(last, left) - symbols.get(1, context)
        if last == 0:
            break
        times.append(last)
        ordinals.append(next_ordinal(symbols, ordinals, times))
        left -= last
    return ordinals, [math.log(n / draws) for n in times]
