import numpy as np
import pytest

from megatron_pd.evaluate.calibration import confidence_bins, expected_calibration_error


def test_perfectly_calibrated_and_always_wrong():
    assert expected_calibration_error(confidence_bins(np.ones(4), np.ones(4, bool))) == 0
    assert expected_calibration_error(confidence_bins(np.ones(4), np.zeros(4, bool))) == 1


def test_bins_weigh_by_their_tokens():
    # Bin of 0.7: 2 tokens, half right, |0.5 − 0.7| = 0.2. Bin of 0.1: 1 token, right, 0.9.
    bins = confidence_bins(np.array([0.7, 0.7, 0.1]), np.array([True, False, True]))
    assert expected_calibration_error(bins) == pytest.approx((2 * 0.2 + 0.9) / 3)


def test_bins_of_parts_add_up():
    rng = np.random.default_rng()
    confidence, correct = rng.random(1000), rng.random(1000) < 0.5
    parts = sum(confidence_bins(confidence[i::7], correct[i::7]) for i in range(7))
    np.testing.assert_allclose(parts, confidence_bins(confidence, correct))
