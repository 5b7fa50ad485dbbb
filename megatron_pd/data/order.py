"""In which samples of a training run the tokens of a corpus are: GPTDataset's order, inverted.

Megatron lays the documents that its epochs visit end to end, cuts this stream into samples of
`sequence_length` tokens, shuffles the samples, and may blend several corpora. Here the same arrays
are read backwards: document → its visits in the stream → the samples there → the run's samples.
"""

from typing import NamedTuple

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset

__all__ = ["CorpusOrder", "SampleSpan", "corpus_orders"]


class SampleSpan(NamedTuple):
    """Tokens [offset, offset + length) of a document, from `position` on in a sample of the run."""

    offset: int
    length: int
    sample: int
    position: int


class CorpusOrder:
    """The samples of a run that one GPTDataset gives it.

    Args:
        run_samples: the run's numbers of these samples, int64 [n], in the order of consumption.
        dataset_samples: the dataset's own indices of them, int64 [n].
    """

    def __init__(
        self, dataset: GPTDataset, run_samples: np.ndarray, dataset_samples: np.ndarray
    ) -> None:
        self._length = dataset.config.sequence_length
        documents = np.asarray(dataset.document_index)
        lengths = dataset.dataset.sequence_lengths[documents].astype(np.int64)
        self._visit_starts = np.concatenate([[0], np.cumsum(lengths)])
        self._visits = np.argsort(documents, kind="stable")
        self._visited = documents[self._visits]
        begins = np.asarray(dataset.sample_index[:-1])
        self._sample_starts = self._visit_starts[begins[:, 0]] + begins[:, 1]
        self._run_samples = np.full(len(begins), -1, np.int64)
        self._run_samples[dataset.shuffle_index[dataset_samples]] = run_samples

    def spans(self, document: int) -> list[SampleSpan]:
        """Every span of a document that the run consumes, some tokens perhaps in several."""
        first, last = np.searchsorted(self._visited, [document, document + 1])
        spans = []
        for visit in self._visits[first:last]:
            start, end = map(int, self._visit_starts[visit : visit + 2])
            sample = max(0, int(np.searchsorted(self._sample_starts, start, "right")) - 1)
            while sample < len(self._sample_starts) and self._sample_starts[sample] < end:
                sample_start = int(self._sample_starts[sample])
                begin, stop = max(start, sample_start), min(end, sample_start + self._length)
                run_sample = int(self._run_samples[sample])
                if begin < stop and run_sample >= 0:
                    spans.append(
                        SampleSpan(begin - start, stop - begin, run_sample, begin - sample_start)
                    )
                sample += 1
        return spans


def corpus_orders(
    dataset: GPTDataset | BlendedDataset, samples: int
) -> list[tuple[str, CorpusOrder]]:
    """(prefix, order) for every corpus that the first `samples` samples of a run come from.

    Args:
        dataset: the run's training dataset, as Megatron's builder made it.
    """
    if isinstance(dataset, GPTDataset):
        numbers = np.arange(min(samples, len(dataset)))
        return [(str(dataset.dataset_path), CorpusOrder(dataset, numbers, numbers))]
    orders = []
    chosen = np.asarray(dataset.dataset_index[:samples])
    for number, part in enumerate(dataset.datasets):
        run_samples = np.flatnonzero(chosen == number)
        dataset_samples = np.asarray(dataset.dataset_sample_index)[run_samples]
        orders.append((str(part.dataset_path), CorpusOrder(part, run_samples, dataset_samples)))
    return orders
