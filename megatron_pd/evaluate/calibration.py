"""Expected calibration error (ECE) of the most likely token (Guo et al. 2017, arXiv 1706.04599).

Tokens are sorted into equal bins of confidence; ECE is the mean over the bins of
|accuracy − confidence|, weighted by the tokens in each. Bins add up over batches and ranks.
"""

import numpy as np

__all__ = ["BINS", "confidence_bins", "expected_calibration_error"]

BINS = 15


def confidence_bins(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Tokens, correct tokens and confidence, summed in each bin: float64 [3, BINS].

    Args:
        confidence: [tokens], the probability of the most likely token, in [0, 1].
        correct: bool [tokens], whether it was the true one.
    """
    index = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return np.stack(
        [
            np.bincount(index, weights=weights, minlength=BINS)
            for weights in (np.ones_like(confidence), correct.astype(float), confidence)
        ]
    )


def expected_calibration_error(bins: np.ndarray) -> float:
    """ECE from the summed bins: Σ |correct − confidence| / tokens."""
    return float(np.abs(bins[1] - bins[2]).sum() / bins[0].sum())
