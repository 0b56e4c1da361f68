"""Scores of histograms against scikit-learn, under noise, and with whatever noise leaves of a count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from shared.metrics import DRAWS, LOWEST, count, label_cells, label_scores, scores, with_intervals


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
    micro = sk.precision_recall_fscore_support(labels, predicted, average="micro")[:3]
    assert micro == pytest.approx((found["accuracy"],) * 3)  # which is why it is not given again
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, predicted), abs=1e-12)
    if classes == 2:
        binned = bin_centres(probabilities, 2000)  # ties and all: exact
        assert found["auc"] == pytest.approx(sk.roc_auc_score(labels, binned), abs=1e-12)
        assert found["pr_auc"] == pytest.approx(sk.average_precision_score(labels, binned), abs=1e-12)
    else:
        assert not {"auc", "pr_auc"} & found.keys()


def bin_centres(probabilities, bins):
    """Probability of label 1 of two, rounded to the bins of the predicted label's."""
    predicted, sure = probabilities.argmax(1), probabilities.max(1)
    place = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    centre = 0.5 + (place + 0.5) / (2 * bins)
    return np.where(predicted == 1, centre, 1 - centre)


def several(records=2000, seed=0):
    """Probabilities and labels of which a record has any number, from frequent to rare."""
    random = np.random.default_rng(seed)
    labels = random.random((records, 4)) < np.array([0.6, 0.3, 0.1, 0.02])
    logits = random.normal(-0.5, 1.2, (records, 4)) + labels * 1.5
    return 1 / (1 + np.exp(-logits)), labels.astype(int)


def several_counts(probabilities, labels, bins):
    shape = (labels.shape[1], 2, bins)
    found = np.bincount(label_cells(probabilities, labels, shape).ravel(), minlength=np.prod(shape))
    return found.reshape(shape).astype(float)


@pytest.mark.parametrize("bins", [10, 400])
def test_scores_of_several_labels_are_scikit_learns(bins):
    probabilities, labels = several()
    found = {score.name: score.value for score in label_scores(several_counts(probabilities, labels, bins))}
    predicted = probabilities >= 0.5
    for average, end in (("macro", ""), ("micro", "_micro")):
        expected = sk.precision_recall_fscore_support(labels, predicted, average=average)[:3]
        given = tuple(found[name + end] for name in ("precision", "recall", "f1"))
        assert given == pytest.approx(expected, abs=1e-12), average
    binned = np.floor(probabilities * bins)
    assert found["auc"] == pytest.approx(sk.roc_auc_score(labels, binned, average="macro"), abs=1e-12)
    assert found["pr_auc"] == pytest.approx(sk.average_precision_score(labels, binned, average="macro"), abs=1e-12)


def test_a_label_that_no_record_has_is_left_out_of_the_means_over_curves():
    probabilities, labels = several()
    some = label_scores(several_counts(probabilities[:, :2], labels[:, :2], 20))
    labels[:, 2] = 0
    with_none = label_scores(several_counts(probabilities[:, :3], labels[:, :3], 20))
    for name in ("auc", "pr_auc"):
        first, second = ({score.name: score.value for score in each}[name] for each in (some, with_none))
        assert first == pytest.approx(second)


def test_calibration_of_several_labels_is_the_mean_of_each_ones():
    probabilities = np.tile([0.25, 0.75], (100, 1))
    labels = np.stack([np.arange(100) < 35, np.arange(100) < 70], axis=1).astype(int)
    found = {score.name: score.value for score in label_scores(several_counts(probabilities, labels, 2))}
    assert found["calibration_error"] == pytest.approx((0.10 + 0.05) / 2)


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
    for name in ("accuracy", "f1", "precision", "recall", "mcc", "auc", "pr_auc"):
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
            lowest = LOWEST.get(score.name, 0)
            assert lowest <= score.value <= 1
            assert noise == 0 or lowest <= score.low <= score.value <= score.high <= 1


def test_an_empty_histogram_scores_nothing():
    assert set(values(np.zeros((2, 2, 10))).values()) == {0.0}


def test_calibration_of_fine_bins_is_not_the_chance_of_few_records_in_each():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1.0, 4000)
    right = rng.random(4000) < confidence  # calibrated by construction
    probabilities = np.stack([1 - confidence, confidence], 1)
    fine = values(count(probabilities, right.astype(int), 1000))["calibration_error"]
    assert fine < 0.03  # 0.12 when every one of the 1,000 bins counts by itself


def test_intervals_of_several_labels_cover_the_score_without_noise():
    """Means over labels of which one has 40 records; under noise as large as this, the AUC's are 91 % intervals."""
    counts = several_counts(*several(), 10)
    true = {score.name: score.value for score in label_scores(counts)}
    noise, trials, random = 4.0, 300, np.random.default_rng(5)
    inside = dict.fromkeys(true, 0)
    for _ in range(trials):
        for score in label_scores(counts + random.normal(0, noise, counts.shape), noise):
            inside[score.name] += score.low <= true[score.name] <= score.high
    for name, covered in inside.items():  # at 91 %, below 0.86 has a chance of 1 in 500
        assert covered / trials >= 0.86, (name, covered / trials)


def test_many_draws_at_once_are_as_good_as_few(monkeypatch):
    counts = count(*predictions(3), 10)
    together = scores(counts, 5.0)
    monkeypatch.setattr("shared.metrics.VALUES", 1000)
    for one, other in zip(together, scores(counts, 5.0), strict=True):
        assert (one.low, one.high) == pytest.approx((other.low, other.high))


def test_at_a_bound_an_interval_reaches_as_far_to_the_free_side_as_without_it():
    def bounded(counts):
        return {"share": np.clip(counts.mean(-1), 0, 1)}

    at_bound, inside = (with_intervals(bounded, np.full(5, value), 0.1)[0] for value in (1.0, 0.5))
    assert 1 - at_bound.low == pytest.approx(0.5 - inside.low, rel=0.15)
