"""A teacher for benchmarks: an interpolated 4-gram model of the standard library's sources.

It gives realistic rows at any vocabulary size in seconds and without a GPU: the vocabulary is a
byte-level BPE trained on the same text, the rows are those of held-out files.

    p_n(w | h) = max(count(h w) - D, 0) / count(h) + D · successors(h) / count(h) · p_{n-1}(w | h')

down to the unigram p_1(w) = (count(w) + 1/2) / (N + V / 2).

Left at that, rows would recur bit for bit wherever their three tokens of context do, which a
language model's never do, and a compressor that looks for repeats would live off them. So the
distribution is adapted to the document so far (unigram rescaling, Gildea and Hofmann 1999):

    p(w | h) ∝ p_4(w | h) · exp(a · topic(w) · topic(tokens so far)).
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_pd.store import TeacherRows

__all__ = ["NgramTeacher", "library_documents", "train_tokenizer"]

_ORDERS = (2, 3, 4)
_DISCOUNT = 0.75
_TOPICS = 16
_MEMORY = 0.98  # a token's weight in the topic halves every 34 tokens


def library_documents(limit: int | None = None) -> list[str]:
    """The standard library's .py files, its tests included, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if "site-packages" not in path.parts and "lib2to3" not in path.parts
    ]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths[:limit]]
    return [text for text in texts if text]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with up to `vocab_size` pieces.

    Dotted names are one word, else the library has too few different words for a wide vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[\w.]+| ?[^\w\s]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class NgramTeacher:
    """Next-token distributions of a 4-gram model trained on `documents` (1-D id arrays), adapted
    to the document so far with strength `adaptation` (0: not at all)."""

    def __init__(self, documents: list[np.ndarray], vocab_size: int, adaptation: float) -> None:
        self.vocab_size, self._adaptation = vocab_size, adaptation
        tokens = np.concatenate(documents)
        counts = np.bincount(tokens, minlength=vocab_size) + 0.5
        self.unigram = counts / counts.sum()
        self._cumulative = np.cumsum(self.unigram)
        self._common = np.argsort(-self.unigram, kind="stable")
        self._successors = [_Successors(documents, order, vocab_size) for order in _ORDERS]
        self._topics = _topic_vectors(documents, self.unigram)
        self._scratch = np.zeros(vocab_size)

    def rows(self, tokens: np.ndarray, top_p: float, top_k: int) -> TeacherRows:
        """The top-p-then-top-k rows of one document; the last one is empty."""
        out = TeacherRows.empty(len(tokens), top_k)
        for row, (ids, probs, _) in enumerate(self._distributions(tokens, 2 * top_k)):
            if len(ids) > top_k:
                best = np.argpartition(-probs, top_k - 1)[:top_k]
                ids, probs = ids[best], probs[best]
            order = np.argsort(-probs, kind="stable")
            ids, probs = ids[order], probs[order]
            count = min(int(np.searchsorted(np.cumsum(probs), top_p)) + 1, top_k)
            out.ids[row, :count] = ids[:count]
            out.logprobs[row, :count] = np.log(probs[:count])
            out.counts[row] = count
        return out

    def sampled_rows(self, tokens: np.ndarray, draws: int, rng: np.random.Generator) -> TeacherRows:
        """`draws` draws per row with replacement: ids and log(draws of the id / draws)."""
        out = TeacherRows.empty(len(tokens), draws)
        for row, (candidates, probs, rest) in enumerate(self._distributions(tokens, 2 * draws)):
            weights = np.append(probs, rest)
            times = rng.multinomial(draws, weights / weights.sum())
            others = rng.random(times[-1]) * self._cumulative[-1]
            drawn = np.repeat(candidates, times[:-1])
            drawn = np.append(drawn, np.searchsorted(self._cumulative, others))
            ids, counts = np.unique(drawn, return_counts=True)
            order = np.argsort(-counts, kind="stable")
            out.ids[row, : len(ids)] = ids[order]
            out.logprobs[row, : len(ids)] = np.log(counts[order] / draws)
            out.counts[row] = len(ids)
        return out

    def _distributions(
        self, tokens: np.ndarray, top: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        """For every token but the last: its most likely ids (at least `top` of the successors and
        of the most frequent ids), their probabilities, and what is left to the others."""
        state = np.zeros(self._topics.shape[1])
        for row in range(len(tokens) - 1):
            state = _MEMORY * state + self._topics[tokens[row]]
            levels, base = self._levels(tokens[: row + 1])
            ids = np.concatenate([ids for ids, _ in levels] + [self._common[:top]])
            self._scratch[ids] = base * self.unigram[ids]
            for successors, probs in levels:
                self._scratch[successors] += probs
            probs = self._scratch[ids]
            copies = (len(levels) + 1) * top  # an id may come once per level
            if copies < len(ids):
                ids = ids[np.argpartition(-probs, copies - 1)[:copies]]
            ids = np.unique(ids)
            probs = self._scratch[ids]
            rest = max(0.0, 1 - probs.sum())
            topic = state / max(1e-9, float(np.linalg.norm(state)))
            probs = probs * np.exp(self._adaptation * (self._topics[ids] @ topic))
            total = probs.sum() + rest
            yield ids, probs / total, rest / total

    def _levels(self, history: np.ndarray) -> tuple[list[tuple[np.ndarray, np.ndarray]], float]:
        """Discounted mass of the successors at each order, longest first, and what the unigram
        is left."""
        levels, weight = [], 1.0
        for order in reversed(self._successors):
            ids, counts = order.after(history)
            if len(ids):
                total = counts.sum()
                levels.append((ids, weight * (counts - _DISCOUNT) / total))
                weight *= _DISCOUNT * len(ids) / total
        return levels, weight


def _topic_vectors(documents: list[np.ndarray], unigram: np.ndarray) -> np.ndarray:
    """Vectors [vocab_size, _TOPICS]: ids that come in the same documents point the same way.

    Random indexing: every document has a random direction, an id the sum of its documents'. What
    all ids have in common, their mean, is taken off.
    """
    rng = np.random.default_rng(0)
    vectors = np.zeros((len(unigram), _TOPICS))
    for tokens in documents:
        vectors[np.unique(tokens)] += rng.normal(size=_TOPICS)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    vectors -= unigram @ vectors
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


class _Successors:
    """What followed every context of order - 1 tokens, and how often."""

    def __init__(self, documents: list[np.ndarray], order: int, vocab_size: int) -> None:
        self._order, self._vocab_size = order, vocab_size
        contexts = np.concatenate([self._keys(tokens[:-1]) for tokens in documents])
        following = np.concatenate([tokens[order - 1 :] for tokens in documents])
        order_ = np.lexsort((following, contexts))
        contexts, following = contexts[order_], following[order_]
        new = np.r_[True, (contexts[1:] != contexts[:-1]) | (following[1:] != following[:-1])]
        first = np.flatnonzero(new)
        self._ids = following[first]
        self._counts = np.diff(np.r_[first, len(contexts)]).astype(np.float64)
        pair_contexts = contexts[first]
        begin = np.flatnonzero(np.r_[True, pair_contexts[1:] != pair_contexts[:-1]])
        self._contexts = pair_contexts[begin]
        self._bounds = np.r_[begin, len(pair_contexts)]

    def after(self, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(history) < self._order - 1:
            return self._ids[:0], self._counts[:0]
        key = self._keys(history[1 - self._order :])[0]
        index = int(np.searchsorted(self._contexts, key))
        if index == len(self._contexts) or self._contexts[index] != key:
            return self._ids[:0], self._counts[:0]
        span = slice(self._bounds[index], self._bounds[index + 1])
        return self._ids[span], self._counts[span]

    def _keys(self, tokens: np.ndarray) -> np.ndarray:
        """One 64-bit key per run of order - 1 tokens."""
        n = len(tokens) - self._order + 2
        keys = np.zeros(max(n, 0), np.int64)
        for shift in range(self._order - 1):
            keys = keys * self._vocab_size + tokens[shift : shift + len(keys)]
        return keys
