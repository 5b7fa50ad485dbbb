"""Whether a corpus has the ids of a teacher's tokenizer.

A corpus doesn't tell its tokenizer. But ids that are turned to text and back by the tokenizer that
made them are the same, and by another one they are not.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_pd.data.corpus import MegatronCorpus
from megatron_pd.errors import UserError

__all__ = ["check_ids"]

_DOCUMENTS = 64
_TOKENS = 512
_BROKEN_TOKENS = 8  # the last of a cut document, whose word or character may be cut too
_LEAST_SHARE = 0.98  # a cut of a document may fall amid what the tokenizer sees as a whole


def check_ids(corpus: MegatronCorpus, tokenizer: Any, given: Any | None, source: str) -> None:
    """Compares the ids of sampled documents with those of the teacher's tokenizer, pair by pair.

    Args:
        tokenizer: the teacher's, of transformers.
        given: Megatron's, said to be the corpus's; then the ids that it gives for the documents'
            text are compared, whatever those of the corpus are.
    Raises:
        UserError: under 98% of them are the same, or an id is beyond the vocabulary.
    """
    vocab_size = len(tokenizer) if given is None else given.vocab_size
    same = total = 0
    for document, ids in _samples(corpus):
        if max(ids) >= vocab_size:
            raise UserError(
                f"{corpus.prefix}: document {document} has a token {max(ids)}, the vocabulary of "
                f"{source} ends at {vocab_size - 1}: the corpus was made with another tokenizer."
            )
        whole = len(ids) < _TOKENS
        ids = _without_ends(ids, tokenizer)
        if given is None:
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            expected = ids if whole else ids[:-_BROKEN_TOKENS]
        else:
            text = given.detokenize(ids)
            expected = _without_ends(given.tokenize(text), tokenizer)
        found = tokenizer(text, add_special_tokens=False).input_ids
        common = Counter(itertools.pairwise(expected)) & Counter(itertools.pairwise(found))
        same += common.total()
        total += max(len(expected) - 1, 0)
    if same < _LEAST_SHARE * total:
        whose = "--tokenizer-model gives" if given is not None else f"{corpus.prefix} has"
        raise UserError(
            f"{source}: its tokenizer gives {same / total:.1%} of the ids that {whose} for the "
            "same text, so it is another one. Tokenize the corpus with the teacher's (megatron-pd "
            "preprocess --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER)"
            + (
                ", or name the corpus's by --tokenizer-model if its ids are no text's."
                if given is None
                else "."
            )
        )


def _without_ends(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Without BOS and EOS, which are of a document, not of its text."""
    first = 1 if ids and ids[0] == tokenizer.bos_token_id else 0
    last = len(ids) - (len(ids) > first and ids[-1] == tokenizer.eos_token_id)
    return list(ids[first:last])


def _samples(corpus: MegatronCorpus) -> Iterator[tuple[int, Sequence[int]]]:
    """(document, the first tokens of it), of documents all over the corpus."""
    lengths = corpus.document_lengths
    filled = np.flatnonzero(lengths)
    if len(filled):
        chosen = np.unique(np.linspace(0, len(filled) - 1, _DOCUMENTS, dtype=np.int64))
        for document in filled[chosen].tolist():
            length = min(_TOKENS, int(lengths[document]))
            yield document, corpus.tokens(document, 0, length).tolist()
