"""The threshold's promise against SciPy's binomial, by hand and by drawing; and for which model it counts."""
import json
import math

import numpy as np
import pytest
from conftest import canaries_of
from guard_fakes import FakeDetector, real_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from protector import ModelError, Protector
from protector.calibrate import Calibration, as_dicts, calibrate, find, fit_platt, most_above, threshold


@pytest.mark.parametrize("fpr", [0.001, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_most_above_is_the_largest_k_by_the_binomial(fpr, confidence):
    for n in (1, 2, 7, 58, 59, 298, 299, 473, 1134, 20_000):
        allowed = np.flatnonzero(stats.binom.cdf(np.arange(n), n, fpr) <= 1 - confidence)
        assert most_above(n, fpr, confidence) == (allowed.max() if len(allowed) else -1)


def test_most_above_by_hand():
    assert [most_above(n, 0.01, 0.95) for n in (0, 298, 299, 473)] == [-1, -1, 0, 1]  # 0.99^298 = 0.0500 > 0.05 > 0.99^299
    assert 0.99 ** 298 > 0.05 > 0.99 ** 299


@pytest.mark.parametrize("fpr, confidence", [(0, 0.95), (1, 0.95), (0.01, 0), (0.01, 1), (math.nan, 0.95)])
def test_most_above_refuses_other_rates(fpr, confidence):
    with pytest.raises(ValueError, match="most_above: fpr and confidence must be between 0 and 1"):
        most_above(100, fpr, confidence)


def test_threshold_by_hand():
    scores = np.arange(1, 474) / 1000  # 0.001 .. 0.473: of 473 one may be above
    value, above = threshold(scores)
    assert value == np.nextafter(0.472, 1) and above == 1
    value, above = threshold([0.1] * 400 + [0.6] * 73)  # a tie isn't broken in the rate's favour
    assert value == np.nextafter(0.6, 1) and above == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 0.999), min_size=10, max_size=80), st.sampled_from([0.05, 0.2, 0.5]))
def test_no_more_than_k_are_above_and_one_step_lower_would_be_too_many(scores, fpr):
    k = most_above(len(scores), fpr, 0.9)
    if k < 0:
        with pytest.raises(ValueError, match="threshold: scores must be at least"):
            threshold(scores, fpr, 0.9)
        return
    value, above = threshold(scores, fpr, 0.9)
    assert above == sum(score >= value for score in scores) <= k
    assert sum(score >= np.nextafter(value, -1) for score in scores) > k


@pytest.mark.parametrize("draw", [lambda rng, n: rng.random(n), lambda rng, n: np.round(rng.random(n), 1) * 0.99])
def test_m64_the_bound_holds_as_often_as_it_says(draw):
    """Over draws of n harmless answers, the true rate is over the bound in at most 5 % of them (ties only lower it)."""
    rng, n, fpr = np.random.default_rng(0), 473, 0.01
    population = draw(rng, 200_000)
    too_high = [(population >= threshold(draw(rng, n), fpr, 0.95)[0]).mean() > fpr for _ in range(800)]
    # Beta(k + 1, n - k) says 4.9 %; 800 draws leave a standard error of 0.8 %.
    assert np.mean(too_high) < 0.05 + 3 * 0.008


def test_scores_that_allow_no_threshold():
    for scores in ([math.nan] * 300, [math.inf] * 300):
        with pytest.raises(ValueError, match="scores must be finite"):
            threshold(scores)
    with pytest.raises(ValueError, match="threshold: scores must be at least 299 for a rate of 0.01 at confidence 0.95, got 298."):
        threshold([0.1] * 298)
    # A threshold of 1 or more would flag nothing: that is no guard.
    for scores in ([1.0] * 300, [float(np.nextafter(1, 0))] * 300):
        with pytest.raises(ValueError, match="must leave all but 0 harmless answers below 1, got more that score so high"):
            threshold(scores)


def entry(detector, **changes):
    values = dict(threshold=0.7, fpr=0.01, confidence=0.95, n=300, above=0, input="pair", backend=detector.name,
                  quantisation=detector.quantisation, model_sha256=detector.model_sha256, data_sha256="1" * 64)
    return as_dicts([Calibration(**values | changes)])[0]


@pytest.fixture
def detector():
    return FakeDetector(real_tokenizer())


@pytest.mark.parametrize("entries", ['[1]', '[{"fpr": 0.01}]', "as text"])
def test_a_calibration_of_wrong_types_does_not_load(torch_detector, detector, tmp_path, entries):
    from protector import models

    torch_detector.save(tmp_path)
    wrong = json.dumps([entry(detector) | {"fpr": "0.01"}]) if entries == "as text" else entries
    (tmp_path / "calibration.json").write_text(wrong)
    with pytest.raises(ModelError, match="must be a JSON list of calibrations"):
        models.load(tmp_path)


def test_a_calibration_holds_on_every_source(detector):
    made = calibrate(detector, {"easy": [0.1] * 300, "hard": [0.6] * 300}, "pair", "1" * 64)
    assert made == Calibration(float(np.nextafter(0.6, 2)) + 1e-3, 0.01, 0.95, 600, 0, "pair", "fake", "F32", "0" * 64, "1" * 64)
    with pytest.raises(ValueError, match="must hold a source, got none"):
        calibrate(detector, {}, "pair", "1" * 64)
    with pytest.raises(ValueError, match="must leave all but 0 harmless answers below 0.999, got more that score so high"):
        calibrate(detector, {"saturated": [0.9995] * 300}, "pair", "1" * 64)  # regression: the threshold was cut to 1.0


@pytest.mark.parametrize("change", [{"model_sha256": "2" * 64}, {"backend": "torch"}, {"quantisation": "Q4_0"}, {"input": "answer"}, {"fpr": 0.02}])
def test_m64_a_calibration_of_another_model_is_refused(detector, change):
    detector.calibration = (entry(detector, **change),)
    assert find(detector, "pair") is None
    with pytest.raises(ModelError, match="find: fpr must have a calibration for fake, F32 and input pair, got none for 0.01"):
        find(detector, "pair", 0.01)
    with pytest.raises(ModelError):
        Protector(detector, False, fpr=0.01)
    assert Protector(detector, False).thresholds["pair"] == 0.5
    detector.calibration += (entry(detector),)
    assert find(detector, "pair", 0.01).threshold == 0.7


def test_the_guard_takes_a_threshold_for_each_kind_of_input(detector):
    detector.calibration = (entry(detector), entry(detector, input="answer", threshold=0.8), entry(detector, fpr=0.001, threshold=0.95))
    assert Protector(detector, False).thresholds == {"pair": 0.7, "answer": 0.8}
    # A rate that holds for pairs and not for answers is none.
    with pytest.raises(ModelError, match="fpr must have a calibration for fake, F32 and input answer, got none for 0.001"):
        Protector(detector, False, fpr=0.001)
    detector.calibration += (entry(detector, fpr=0.001, input="answer", threshold=0.96),)
    assert Protector(detector, False, fpr=0.001).thresholds == {"pair": 0.95, "answer": 0.96}
    assert Protector(detector, False, threshold=0.3).thresholds == {"pair": 0.3, "answer": 0.3}


def test_a_calibration_is_of_the_models_own_windows(detector):
    """More windows give a larger maximum, and with it more false positives."""
    detector.calibration = (entry(detector), entry(detector, input="answer"))
    assert Protector(detector, False, window=16).thresholds["pair"] == 0.5
    with pytest.raises(ValueError, match="fpr holds for the model's own windows"):
        Protector(detector, False, window=16, fpr=0.01)


@pytest.mark.parametrize("value", [math.nan, 1.0, 1.5, -0.1, math.inf])
def test_a_calibration_that_flags_nothing_is_an_error(detector, value):
    detector.calibration = (entry(detector, threshold=value),)
    with pytest.raises(ModelError, match="must have a threshold of 0 or more and below 1"):
        Protector(detector, False)


@pytest.mark.parametrize("true, shift", [(0.3, 0.0), (1.0, 0.7), (4.0, -2.0)])
def test_temperature_and_shift_are_the_minimum_of_the_cross_entropy(true, shift):
    rng = np.random.default_rng(1)
    z = rng.normal(size=2000) * 2
    labels = rng.random(2000) < 1 / (1 + np.exp(-z))
    logits = (z - shift) * true  # logits / true + shift = z

    def loss(parameters):
        z = logits / parameters[0] + parameters[1]
        return np.mean(np.logaddexp(0, z) - labels * z)

    best = optimize.minimize(loss, (true, shift), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12}).x
    assert fit_platt(logits, labels) == pytest.approx(best, rel=2e-3, abs=2e-3)


def test_weights_are_repeats():
    z, labels = np.array([3.0, -1.0, 0.5, -2.0]), np.array([1, 0, 0, 1])
    assert fit_platt(z, labels, [2, 1, 1, 1]) == pytest.approx(fit_platt([3.0, *z], [1, *labels]), rel=1e-9)


def test_a_folder_is_calibrated_for_pytorch(torch_detector, tmp_path, capsys, monkeypatch):
    """A threshold of the folder's own, which the guard then takes; a second rate stands beside it."""
    from protector import models
    from protector.__main__ import main
    from protector.guard import Protector

    monkeypatch.setattr("protector.canaries.CANARIES", [(c["question"], c["answer"], c["label"]) for c in canaries_of(torch_detector)])
    torch_detector.save(tmp_path / "detector")
    harmless = tmp_path / "harmless.jsonl"
    harmless.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": f"It is number {i}.", **({"label": 0} if i % 2 else {})}) + "\n" for i in range(60)))
    for fpr in ("0.05", "0.2"):
        assert main(["calibrate", str(harmless), "--detector", str(tmp_path / "detector"), "--fpr", fpr, "--threads", "1"]) == 0
    capsys.readouterr()
    detector = models.load(tmp_path / "detector")
    entries = [Calibration(**entry) for entry in detector.calibration]
    assert [(entry.fpr, entry.input, entry.backend, entry.quantisation) for entry in entries] == [
        (fpr, kind, "torch", "F32") for fpr in (0.05, 0.2) for kind in ("pair", "answer")]
    assert all(entry.model_sha256 == detector.model_sha256 and entry.n == 60 for entry in entries)
    guard = Protector(detector, detoxifier=False, fpr=0.05)
    assert guard.guard("What is 1?", "It is number 1.").threshold == entries[0].threshold
