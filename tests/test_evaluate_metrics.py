"""Metrics by hand, by brute force and against scikit-learn."""
import math

import numpy as np
import pytest

from protector.evaluate import metrics, record, report


def draw(n, seed, levels=None):
    """Scores with real ties (levels) and labels that follow them loosely."""
    rng = np.random.default_rng(seed)
    scores = rng.random(n)
    labels = (rng.random(n) < 0.2 + 0.6 * scores).astype(int)
    return (np.round(scores * levels) / levels if levels else scores), labels


def test_auroc_by_hand_counts_a_tie_half():
    # harmful 0.4, 0.8 against harmless 0.1, 0.4: three pairs are right, one is a tie.
    assert metrics.auroc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1]) == 3.5 / 4
    assert metrics.auroc([0.5, 0.5], [0, 1]) == 0.5
    assert metrics.auroc([0.9, 0.1], [0, 1]) == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [None, 3, 11])
def test_auroc_equals_all_pairs(seed, levels):
    scores, labels = draw(129, seed, levels)
    difference = scores[labels == 1][:, None] - scores[labels == 0][None]
    assert metrics.auroc(scores, labels) == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean(), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 3, 11])
def test_equal_to_scikit_learn(levels):
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    for seed in range(5):
        scores, labels = draw(257, seed, levels)
        assert metrics.auroc(scores, labels) == pytest.approx(sklearn.roc_auc_score(labels, scores), abs=1e-12)
        assert metrics.auprc(scores, labels) == pytest.approx(sklearn.average_precision_score(labels, scores), abs=1e-12)
        assert metrics.f1_at(scores, labels, 0.4) == pytest.approx(sklearn.f1_score(labels, scores >= 0.4), abs=1e-12)
        ours, theirs = metrics.roc(scores, labels), sklearn.roc_curve(labels, scores, drop_intermediate=False)
        for mine, other in zip(ours, theirs):
            np.testing.assert_allclose(mine, other, atol=1e-12)


def test_auprc_by_hand():
    # 0.8 harmful (1/1), 0.4 harmless, 0.35 harmful (2/3): 1/2 * 1 + 1/2 * 2/3.
    assert metrics.auprc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == pytest.approx(5 / 6)
    assert metrics.auprc([0.5] * 10, [1] * 3 + [0] * 7) == pytest.approx(0.3)  # one tie: the share of harmful


def test_f1_by_hand():
    assert metrics.f1_at([0.1, 0.6, 0.9], [0, 0, 1], 0.5) == pytest.approx(2 / 3)
    assert metrics.f1_at([0.1, 0.2], [1, 1], 0.5) == 0
    assert metrics.best_f1([0.1, 0.6, 0.9], [0, 0, 1]) == (1.0, 0.9)


@pytest.mark.parametrize("seed", range(5))
def test_best_f1_is_the_largest_of_all(seed):
    scores, labels = draw(91, seed, 7)
    value, threshold = metrics.best_f1(scores, labels)
    assert value == pytest.approx(max(metrics.f1_at(scores, labels, t) for t in np.unique(scores)))
    assert value == pytest.approx(metrics.f1_at(scores, labels, threshold))


def test_recall_at_fpr_never_breaks_a_tie_for_the_detector():
    scores, labels = [0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0]
    assert metrics.recall_at_fpr(scores, labels, 0.01) == 0.5
    assert metrics.recall_at_fpr(scores, labels, 0.5) == 1.0
    assert metrics.recall_at_fpr([0.5, 0.5], [1, 0], 0.05) == 0.0


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.2])
def test_recall_at_fpr_equals_brute_force(fpr):
    for seed in range(5):
        scores, labels = draw(200, seed, 13)
        best = 0.0
        for threshold in [*np.unique(scores), 2.0]:
            flags = scores >= threshold
            if flags[labels == 0].mean() <= fpr + 1e-12:
                best = max(best, flags[labels == 1].mean())
        assert metrics.recall_at_fpr(scores, labels, fpr) == pytest.approx(best)


def test_one_in_twenty_is_five_percent():
    # 0.05 * 20 is 1.0000000000000002 or 0.99..., by platform; one false alarm of 20 must be allowed.
    scores = np.r_[0.9, np.zeros(19), 0.5]
    assert metrics.recall_at_fpr(scores, np.r_[np.zeros(20), 1], 0.05) == 1.0


def test_one_group_is_one_draw():
    """Regression: all of one question's answers counted as independent, for there was no spread between groups."""
    one = metrics.rate([1] * 50 + [0] * 50, ["q"] * 100)
    assert (one["low"], one["high"]) == metrics.wilson(0.5, 1) and one["n"] == 100
    change = metrics.paired_change([1] * 100, [0] * 40 + [1] * 60, ["q"] * 100)
    assert change["value"] == -0.4 and change["high"] > 0


def test_a_number_of_one_group_has_no_interval():
    """Regression: however often the one question is drawn, its answers are the same, and a width of 0 read as certainty."""
    for values, groups in (([1.0, 3.0, 5.0], list("qqq")), ([3.0], None), ([3.0], ["q"])):
        found = metrics.number(np.mean, values, groups=groups)
        assert found["value"] == 3 and math.isnan(found["low"]) and math.isnan(found["high"])
        assert report.number(record.plain(found), 0) == "3"
    assert metrics.number(np.mean, [3.0, 3.0], groups=["q", "r"]) == {"value": 3, "low": 3, "high": 3}  # two that are alike have one


def test_before_and_after_are_of_the_same_rows():
    """Regression: replay's "after" left out what had no verdict and "before" didn't, so 60 unjudged rewrites read as 60 % less harm."""
    found = metrics.before_after([True] * 60 + [False] * 40, [None] * 60 + [False] * 40)
    assert all((found[side]["rate"], found[side]["n"], found[side]["missing"]) == (0, 40, 60) for side in ("before", "after"))
    assert found["change"]["value"] == 0
    assert metrics.before_after([True, True], [False, None])["change"]["value"] == -1


def test_reliability_counts_questions():
    scores, labels = [0.25] * 40, [0, 1] * 20
    rows, alone = (metrics.reliability(scores, labels, groups=groups)[1][0] for groups in ([i // 10 for i in range(40)], None))
    assert rows["share"] == alone["share"] == 0.5 and rows["interval"] == alone["interval"] == metrics.wilson(20, 40)  # groups that are alike tell no less
    halves = metrics.reliability(scores, [0] * 20 + [1] * 20, groups=[i // 10 for i in range(40)])[1][0]["interval"]
    assert halves[1] - halves[0] > 1.5 * (alone["interval"][1] - alone["interval"][0])


def test_reliability_by_hand():
    # Bin [0.2, 0.3): mean 0.25, one of two harmful, off by 0.25. Bin [0.9, 1]: mean 0.95, all harmful, off by 0.05.
    error, bins = metrics.reliability([0.21, 0.29, 0.95, 0.95], [0, 1, 1, 1])
    assert error == pytest.approx(0.5 * 0.25 + 0.5 * 0.05)
    assert bins == [{"low": 0.2, "high": 0.3, "score": pytest.approx(0.25), "share": 0.5, "n": 2, "interval": metrics.wilson(1, 2)},
                    {"low": 0.9, "high": 1.0, "score": pytest.approx(0.95), "share": 1.0, "n": 2, "interval": metrics.wilson(2, 2)}]
    assert metrics.reliability([1.0, 0.0], [1, 0])[0] == 0


def test_calibrated_scores_have_a_small_error():
    rng = np.random.default_rng(0)
    scores = rng.random(20000)
    labels = (rng.random(20000) < scores).astype(int)
    # A bin's mean label has a standard error of at most sqrt(0.25 / 2000) = 0.0112.
    assert metrics.reliability(scores, labels)[0] < 0.0112
    assert metrics.reliability(scores ** 3, labels)[0] > 0.1


def test_bootstrap_is_seeded_and_covers():
    scores, labels = draw(300, 1)
    first = metrics.bootstrap(metrics.auroc, scores, labels, draws=200, seed=3)
    assert first == metrics.bootstrap(metrics.auroc, scores, labels, draws=200, seed=3)
    assert first != metrics.bootstrap(metrics.auroc, scores, labels, draws=200, seed=4)
    assert first[0] < metrics.auroc(scores, labels) < first[1]


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(0).normal(size=400)
    low, high = metrics.bootstrap(np.mean, values, draws=4000)
    # 1.96 s / 20; the percentiles of 4,000 draws are off by some 3 % of that.
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.06)


def test_bootstrap_draws_groups_together():
    # 10 questions with 20 identical answers each: only 10 independent rows, so the interval must be about sqrt(20) wider.
    values = np.repeat(np.random.default_rng(0).normal(size=10), 20)
    alone = metrics.bootstrap(np.mean, values, draws=1000)
    together = metrics.bootstrap(np.mean, values, groups=np.repeat(np.arange(10), 20), draws=1000)
    assert (together[1] - together[0]) / (alone[1] - alone[0]) == pytest.approx(math.sqrt(20), rel=0.15)


def test_wilson_by_hand():
    # p = 0, z^2 = 3.8415: high = (z^2 / 200 + z * z / 200) / (1 + z^2 / 100) = 0.038415 / 1.038415.
    assert metrics.wilson(0, 100) == (0.0, pytest.approx(0.036993, abs=1e-5))
    assert metrics.wilson(100, 100) == (pytest.approx(1 - 0.036993, abs=1e-5), 1.0)
    assert all(math.isnan(value) for value in metrics.wilson(0, 0))


def test_wilson_covers_a_rare_event():
    # Over binomial draws the true rate lies inside about 95 % of the intervals.
    rng = np.random.default_rng(0)
    inside = [low <= 0.03 <= high for low, high in (metrics.wilson(int(k), 500) for k in rng.binomial(500, 0.03, 2000))]
    assert 0.93 < np.mean(inside) < 0.975


def test_rate_counts_a_missing_one_neither_way():
    assert metrics.rate([True, None, False]) == {"rate": 0.5, "low": pytest.approx(0.0945, abs=1e-3),
                                                 "high": pytest.approx(0.9055, abs=1e-3), "k": 1, "n": 2, "missing": 1}
    assert metrics.rate([None])["rate"] is None


def test_answers_to_one_question_are_one_draw():
    flags, questions = [1, 0, 0, 1, 0, 0, 0, 1, 0, 0], list("abcdefghij")
    alone = metrics.rate(flags)
    assert metrics.rate(flags, questions) == pytest.approx(alone)  # a question each: nothing to share
    five_times = metrics.rate(flags * 5, questions * 5)
    assert (five_times["k"], five_times["n"]) == (15, 50) and five_times["rate"] == alone["rate"]
    # Repeats say nothing new; without the groups the interval would be less than half as wide.
    assert five_times["high"] - five_times["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.05)
    assert metrics.rate(flags * 5)["high"] - metrics.rate(flags * 5)["low"] < 0.6 * (alone["high"] - alone["low"])
    assert metrics.rate([0] * 50, questions * 5)["high"] == pytest.approx(metrics.wilson(0, 10)[1])
    assert metrics.rate([None, 1, 1], ["a", "b", "b"])["low"] == pytest.approx(metrics.wilson(1, 1)[0])


def test_groups_whose_shares_are_alike_tell_as_much_as_rows():
    # Whether the sums are 0 to the last bit or not.
    for flags, n in (([1, 0], 4), ([1, 0, 0], 6)):
        assert metrics.rate(flags * 2, ["a"] * len(flags) + ["b"] * len(flags))["low"] == pytest.approx(metrics.wilson(2, n)[0])


def test_a_paired_change_by_hand():
    # b = 1 / 6, c = 2 / 6, d = -1 / 6, half = 1.96 sqrt((3/6 - 1/36) / 6) = 0.5497
    assert metrics.paired_change([1, 1, 0, 0], [0, 1, 0, 0]) == {"value": -0.25, "low": pytest.approx(-0.7164, abs=1e-3), "high": pytest.approx(0.3831, abs=1e-3)}
    nothing = metrics.paired_change([1, 0] * 23, [1, 0] * 23)
    assert nothing["value"] == 0 and nothing["low"] == -nothing["high"] == pytest.approx(-0.0571, abs=1e-3)  # 1.96 sqrt(2 / 48 / 48)
    assert metrics.paired_change([1, None, 0], [0, 1, None])["value"] == -1 and metrics.paired_change([None], [1])["value"] is None
    # Ten answers to each question say no more than one.
    flags = [1, 0, 0, 1, 0, 1, 0, 0, 1, 0], [0] * 10
    alone, ten = metrics.paired_change(*flags), metrics.paired_change(*(side * 10 for side in flags), list("abcdefghij") * 10)
    assert ten["high"] - ten["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.07)
    rng, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        before = rng.random(80) < 0.2
        after = np.where(rng.random(80) < 0.1, False, before)  # true change: -.02
        found = metrics.paired_change(before, after)
        inside += found["low"] <= -0.02 <= found["high"]
    assert inside > 930


def test_undefined_is_nan_not_a_number_that_looks_good():
    for value in (metrics.auroc([0.1, 0.2], [0, 0]), metrics.auprc([0.1], [0]), metrics.f1_at([0.1], [0], 0.5),
                  metrics.best_f1([0.1], [0])[0], metrics.recall_at_fpr([0.1], [1], 0.1), metrics.auroc([], [])):
        assert math.isnan(value)


def test_wrong_input():
    with pytest.raises(ValueError, match="scores must be finite, got NaN or Inf"):
        metrics.auroc([0.1, math.nan], [0, 1])
    with pytest.raises(ValueError, match=r"must be \(n,\) of one size, got \(2,\) and \(1,\)"):
        metrics.auprc([0.1, 0.2], [1])
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        metrics.f1_at([0.1], [2], 0.5)
    with pytest.raises(ValueError, match=r"scores must be in \[0, 1\]. Pass scores, not logits."):
        metrics.reliability([1.5], [1])
    with pytest.raises(ValueError, match="k must be between 0 and n, got 3 of 2"):
        metrics.wilson(3, 2)
    with pytest.raises(ValueError, match="columns and groups must have one length"):
        metrics.bootstrap(np.mean, [1, 2], groups=[1])
