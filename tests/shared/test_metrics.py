"""Scores of histograms against scikit-learn, under noise, and with whatever noise leaves of a count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from shared.metrics import DRAWS, count, scores


def predictions(classes, records=3000, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, records)
    logits = random.normal(0, 1, (records, classes))
    logits[np.arange(records), labels] += random.uniform(0, 3, records)
    exponents = np.exp(logits)
    return exponents / exponents.sum(1, keepdims=True), labels


def values(counts, noise=0.0):
    return {score.name: score.value for score in scores(counts, noise)}


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_are_scikit_learns(classes):
    probabilities, labels = predictions(classes)
    predicted = probabilities.argmax(1)
    found = values(count(probabilities, labels, 2000))
    precision, recall, f1, _ = sk.precision_recall_fscore_support(labels, predicted, average="macro")
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted), abs=1e-12)
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((precision, recall, f1), abs=1e-12)
    if classes == 2:
        assert found["auc"] == pytest.approx(sk.roc_auc_score(labels, probabilities[:, 1]), abs=2e-4)
    else:
        assert "auc" not in found


def test_the_auc_of_coarse_bins_counts_ties_as_half():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.35, 0.65]])
    labels = np.array([0, 1, 0, 1, 1])
    counts = count(probabilities, labels, 1)
    assert values(counts)["auc"] == pytest.approx(sk.roc_auc_score(labels, probabilities.argmax(1)))


def test_a_label_that_is_never_predicted_counts_as_nothing_as_in_scikit_learn():
    probabilities, labels = np.array([[0.8, 0.1, 0.1]] * 4), np.array([0, 0, 1, 2])
    expected = sk.precision_recall_fscore_support(labels, [0] * 4, average="macro", zero_division=0)[:3]
    found = values(count(probabilities, labels, 5))
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(expected)


def test_calibration_is_the_gap_between_confidence_and_accuracy():
    probabilities = np.array([[0.25, 0.75]] * 100)
    labels = np.array([1] * 75 + [0] * 25)
    assert values(count(probabilities, labels, 1))["calibration_error"] == pytest.approx(0.0)
    assert values(count(probabilities, labels[::-1] * 0, 1))["calibration_error"] == pytest.approx(0.75)


@given(
    probabilities=hnp.arrays(np.float64, st.tuples(st.integers(0, 20), st.integers(2, 4)), elements=st.floats(0, 1)),
    bins=st.integers(1, 12),
)
def test_every_record_has_one_cell_and_adding_one_changes_the_counts_by_one(probabilities, bins):
    labels = np.arange(len(probabilities)) % probabilities.shape[1]
    counts = count(probabilities, labels, bins)
    assert counts.shape == (probabilities.shape[1], probabilities.shape[1], bins)
    assert counts.sum() == len(labels)
    for left_out in range(len(labels)):
        kept = np.arange(len(labels)) != left_out
        assert np.linalg.norm(counts - count(probabilities[kept], labels[kept], bins)) == 1


def test_a_probability_that_is_not_a_number_still_has_its_cell():
    probabilities = np.array([[np.nan, np.nan], [0.2, 0.8], [np.inf, 0.0]])
    assert count(probabilities, np.array([0, 1, 1]), 10).sum() == 3


def test_without_noise_there_is_no_interval_and_with_noise_it_is_around_the_score():
    counts = count(*predictions(2), 10)
    assert all(score.low is None and score.high is None for score in scores(counts))
    for score in scores(counts, 5.0):
        assert 0 <= score.low <= score.value <= score.high <= 1
        assert score.high - score.low > 0
    assert scores(counts, 5.0) == scores(counts, 5.0)


@pytest.mark.parametrize("classes", [2, 3])
def test_intervals_cover_the_score_without_noise_about_95_times_in_100(classes):
    counts = count(*predictions(classes, 2000), 10)
    true, noise, trials = values(counts), 4.0, 400
    random = np.random.default_rng(11)
    inside = dict.fromkeys(true, 0)
    for _ in range(trials):
        for score in scores(counts + random.normal(0, noise, counts.shape), noise):
            inside[score.name] += score.low <= true[score.name] <= score.high
    for name in ("accuracy", "f1", "precision", "recall", "auc"):
        if name in inside:  # at 95 %, below 0.91 or above 0.985 has a chance of 1 in 1,000
            assert 0.91 <= inside[name] / trials <= 0.985, name
    assert DRAWS >= 200


@given(
    counts=hnp.arrays(np.float64, st.tuples(st.just(3), st.just(3), st.integers(1, 4)), elements=st.floats(-1e6, 1e6)),
    noise=st.sampled_from([0.0, 0.5, 1e3]),
)
def test_negative_counts_break_nothing(counts, noise):
    for histogram in (counts, counts[:2, :2]):
        for score in scores(histogram, noise):
            assert 0 <= score.value <= 1
            assert noise == 0 or 0 <= score.low <= score.value <= score.high <= 1


def test_an_empty_histogram_scores_nothing():
    assert set(values(np.zeros((2, 2, 10))).values()) == {0.0}


def test_calibration_of_fine_bins_is_not_the_chance_of_few_records_in_each():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1.0, 4000)
    right = rng.random(4000) < confidence  # calibrated by construction
    probabilities = np.stack([1 - confidence, confidence], 1)
    fine = values(count(probabilities, right.astype(int), 1000))["calibration_error"]
    assert fine < 0.03  # 0.12 when every one of the 1,000 bins counts by itself
