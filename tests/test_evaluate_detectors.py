"""Rows, halves, baselines and detector numbers on mild own cases."""
import gzip
import json
import math

import numpy as np
import pytest
from evaluate_fakes import FakeDetector

from protector.data import answer_digest
from protector.errors import DataError
from protector.evaluate import detectors, record, report, rows
from protector.evaluate.rows import Row

HARMFUL = "Go ahead, use bleach and vinegar in one bucket."
HARMLESS = "Vinegar alone lifts limescale well."


def sample(n=40):
    return [Row(f"How do I clean bathroom {i // 2}?", HARMFUL if i % 2 else HARMLESS + " Really." * (i % 5), i % 2, "own", f"model {i % 3}")
            for i in range(n)]


def test_every_number_of_a_perfect_detector():
    result = detectors.evaluate(FakeDetector(), sample(), sample(), draws=50, threshold=0.5)
    source = result["sources"]["own"]
    assert (source["n"], source["harmful"], source["questions"]) == (40, 20, 20)
    for name in ("auroc", "auprc", "f1", "recall_at_1%_fpr", "recall_at_5%_fpr"):
        assert source[name]["value"] == source[name]["low"] == source[name]["high"] == 1, name
    assert source["false_positives"]["k"] == 0 and source["recall"]["k"] == 20
    assert source["f1_always_harmful"]["value"] == pytest.approx(2 / 3) and source["auprc_always_harmful"]["value"] == 0.5
    assert source["best_f1"]["value"] == source["best_f1"]["low"] == 1
    words = result["bag_of_words"]["sources"]["own"]
    assert words.keys() == {"auroc", "auprc", "f1", "recall_at_5%_fpr"} and all(part["low"] <= part["value"] <= part["high"] for part in words.values())
    assert sum(source["histogram"]["harmful"]) == sum(source["histogram"]["harmless"]) == 20
    assert [(row["low"], row["share"], row["n"]) for row in source["reliability"] if row["low"] >= 0.5] == [(0.9, 1, 20)]
    assert sum(row["n"] for row in source["reliability"]) == 40 and source["ece"]["low"] <= source["ece"]["value"] <= source["ece"]["high"]
    assert result["published"]["rows"]["WildGuard, 7B"][2] == 84.4
    assert result["detector"]["model"] == "fake.gguf" and result["detector"]["thresholds"]["pair"] == 0.5


class SeesQuestions(FakeDetector):
    """Logit 3 where question or answer speaks of bleach."""

    def logits(self, sequences, deadline=None):
        return np.array([3.0 if "bleach" in self.tokenizer.decode(ids) else -3.0 for ids in sequences], np.float32)


def test_the_same_answers_without_their_question(monkeypatch):
    some = [Row(f"May I use bleach, {i}?" if i % 2 else f"May I, {i}?", "Go ahead.", i % 2, "asked") for i in range(30)]
    some += [Row("", "Mix bleach." if i % 2 else "Rinse it.", i % 2, "answers alone") for i in range(4)]
    monkeypatch.setattr(detectors, "ANSWER_ONLY", 20)
    guard = detectors.scoring_guard(SeesQuestions(), threshold=0.5)
    guard.thresholds = {"pair": 0.5, "answer": 0.01}
    monkeypatch.setattr(detectors, "scoring_guard", lambda *_, **__: guard)
    result = record.plain(detectors.evaluate(None, some, sample(), draws=20))
    alone = result["answer_only"]
    assert alone["sources"].keys() == {"asked"} and (alone["at_most"], alone["threshold"]) == (20, 0.01)
    part = alone["sources"]["asked"]
    # What told them apart stood in the questions; sigmoid(-3) = 0.047 is above the threshold for answers alone.
    assert (part["n"], part["questions"], part["auroc"], part["auroc_with_question"]) == (20, 20, {"value": 0.5, "low": 0.5, "high": 0.5}, 1)
    assert part["recall"]["rate"] == part["false_positives"]["rate"] == 1 and part["recall"]["n"] == part["harmful"]
    assert result["sources"]["asked"]["auroc"]["value"] == 1 and result["sources"]["asked"]["n"] == 30
    [table] = [table for table in report.detector_tables(result) if table["title"] == "Detector without the question"]
    assert table["rows"][0][:4] == ["asked", f"20 ({part['harmful']})", "0.500 [0.500, 0.500]", "1.000"] and "at most 20 of a source" in table["notes"][0]
    del result["answer_only"]  # of an older run
    assert len(report.detector_tables(result)) == 4


def test_kinds_of_harm_by_hand(tmp_path):
    some = [Row(f"q{i}", HARMFUL, 1, "own") for i in range(24)] + [Row("q", HARMLESS, 0, "own"), Row("q0", HARMFUL, 1, "few"), Row("unknown", HARMFUL, 1, "own")]
    path = tmp_path / "kinds.jsonl"
    path.write_text("".join(json.dumps({"answer_sha256": answer_digest(row.question, row.answer), "kind": "crime" if i < 16 else "lies"}) + "\n"
                            for i, row in enumerate(some[:25])))
    found = detectors.by_kind(some, [i % 4 == 0 for i in range(len(some))], path)
    assert {source: {kind: (rate["k"], rate["n"]) for kind, rate in kinds.items()} for source, kinds in found.items()} == {
        "own": {"crime": (4, 16), "lies": (2, 8)}, "few": {"crime": (0, 1)}}
    table, = report._by_kind(record.plain(found), "Guard: fake.")  # 25 and 1: the latter is too few for a column
    assert table["head"] == ["kind", "own"] and [row[0] for row in table["rows"]] == ["crime", "lies"] and table["rows"][0][1].startswith("25.0 % [")
    assert table["notes"][0] == "Guard: fake." and report._by_kind({}, "") == []


def test_the_kinds_of_harm_are_readable():
    kinds = [json.loads(line) for line in detectors.KINDS.read_text().splitlines()]
    assert len({row["answer_sha256"] for row in kinds}) == len(kinds) > 2000 and all(row.keys() == {"answer_sha256", "kind"} for row in kinds)
    assert len({row["kind"] for row in kinds}) == 9


def test_scores_are_those_of_guarding_whatever_the_batch():
    detector = FakeDetector()
    guard = detectors.scoring_guard(detector, threshold=0.5)
    scores, thresholds = detectors.score_rows(guard, sample(), batch=7)
    assert set(thresholds) == {0.5}
    assert scores.tolist() == [guard.score(row.question, row.answer) for row in sample()]
    assert scores[1] == pytest.approx(1 / (1 + math.exp(-3)))


def test_a_row_without_a_question_is_flagged_at_its_own_threshold():
    """Every answer scores 1 / (1 + e^3) = 0.047: above the pairs' threshold, below the bare answers'."""
    some = [Row(f"May I, {i}?" if i < 6 else "", f"Rinse it {i}.", i % 2, "mixed") for i in range(10)]
    guard = detectors.scoring_guard(SeesQuestions(), threshold=0.5)
    guard.thresholds = {"pair": 0.04, "answer": 0.2}
    scores, thresholds = detectors.score_rows(guard, some)
    assert thresholds.tolist() == [0.04] * 6 + [0.2] * 4
    found = detectors.measure(scores, [row.label for row in some], thresholds, draws=10)
    assert (found["recall"]["k"], found["recall"]["n"], found["false_positives"]["k"]) == (3, 5, 3)
    assert found["f1"]["value"] == pytest.approx(6 / 11) and found["f1"]["threshold"] is None


def test_a_source_of_one_class_has_a_rate_and_no_auroc():
    source = detectors.measure([0.1, 0.2, 0.7], [0, 0, 0], 0.5)
    assert math.isnan(source["auroc"]["value"]) and source["roc"] == []
    assert source["false_positives"]["k"] == 1 and source["false_positives"]["n"] == 3
    assert record.plain(source)["auroc"] == {"value": None, "low": None, "high": None}


def test_naive_bayes_by_hand():
    # Words: harmful {mix: 1}, harmless {rinse: 1}; vocabulary 2. p(mix|harmful) = 2/3, p(mix|harmless) = 1/3: logit log 2.
    words = detectors.BagOfWords([Row("", "mix", 1), Row("", "rinse", 0)])
    assert words.score("Mix!") == pytest.approx(2 / 3)
    assert words.score("mix mix") == pytest.approx(4 / 5)
    assert words.score("nothing known") == pytest.approx(0.5)
    with pytest.raises(ValueError, match="rows must hold both labels, got one"):
        detectors.BagOfWords([Row("", "mix", 1)])


def test_naive_bayes_equals_scikit_learn():
    feature = pytest.importorskip("sklearn.feature_extraction.text", reason="scikit-learn is not installed")
    from sklearn.naive_bayes import MultinomialNB

    train = rows.read("own")[:300]
    words = detectors.BagOfWords(train)
    vectorizer = feature.CountVectorizer(tokenizer=detectors._words, token_pattern=None, lowercase=False)
    model = MultinomialNB().fit(vectorizer.fit_transform([row.answer for row in train]), [row.label for row in train])
    answers = [row.answer for row in rows.read("own")[300:340]]
    known = [" ".join(word for word in detectors._words(answer) if word in words.weights) for answer in answers]
    theirs = model.predict_proba(vectorizer.transform(known))[:, 1]
    np.testing.assert_allclose([words.score(answer) for answer in answers], theirs, atol=1e-9)


def test_naive_bayes_ranks_what_its_scores_do_not():
    words = detectors.BagOfWords(sample())
    long, longer = (words.logit(" ".join([HARMFUL] * n)) for n in (20, 21))
    assert long < longer and words.score(" ".join([HARMFUL] * 20)) == words.score(" ".join([HARMFUL] * 21)) == 1


def test_halves_share_no_question_and_stay():
    some = [Row(f"Question {i}?", f"Answer {j}.", 0, "own", case=f"case {i // 2}" if i % 3 else "") for i in range(60) for j in range(3)]
    first, second = rows.halves(some)
    assert len(first) + len(second) == len(some) and min(len(first), len(second)) > 0.25 * len(some)
    assert not {row.group for row in first} & {row.group for row in second}
    assert set(rows.halves(some[:30])[0]) <= set(first)


def test_a_data_folder_and_its_gaps(tmp_path):
    line = {"question": "May I mix them?", "answer": HARMFUL, "label": 1, "source": "own", "model": "m", "case": "c1", "labeller": "human"}
    with gzip.open(tmp_path / "dev_pairs.jsonl.gz", "wt") as file:
        file.write(json.dumps(line) + "\n")
    inputs = rows.gather([tmp_path])
    assert inputs.pairs == [Row(line["question"], HARMFUL, 1, "own", "m", "c1", "human")] and set(rows.read("own")) <= set(inputs.seen)
    assert inputs.benign == inputs.judge == [] and inputs.train == rows.read("own") and inputs.files == ("dev_pairs.jsonl.gz",)
    with gzip.open(tmp_path / "train_pairs.jsonl.gz", "wt") as file:
        file.write(json.dumps(line) + "\n")
    inputs = rows.gather([tmp_path])
    # The judge shares no row with the detector, which learned from this project's own, too.
    assert inputs.train == inputs.pairs and set(inputs.seen) == {*inputs.train, *rows.read("own")}
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("train", "judge", "measure"):
        (parts / f"{name}.jsonl").write_text(json.dumps(line | {"question": name}) + "\n")
    split = rows.gather([parts])
    assert [row.question for row in split.pairs + split.judge] == ["measure", "judge"]
    assert [row.question for row in split.train] == ["train"] and not split.halve  # the word counts' rows: not this project's own as well
    assert set(split.seen) == {*split.train, *rows.read("own")}
    paper = tmp_path / "paper.jsonl"
    paper.write_text(json.dumps({"question": "q", "answer": "a", "h": 1}) + "\n")
    assert rows.read(paper)[0].label == 0  # the paper's h = 1 is harmless


def test_one_model_has_one_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": "q", "answer": "a", "label": 0, "model": f"openbmb{mark}MiniCPM-V-2_6"}) + "\n" for mark in ("--", "/")))
    assert {row.model for row in rows.read(path)} == {"openbmb/MiniCPM-V-2_6"}


def test_a_file_of_harmless_answers_is_a_source_of_its_own(tmp_path):
    def write(name, *labels, **columns):
        (tmp_path / name).write_text("".join(json.dumps({"question": f"q {i}", "answer": f"{name} {i}", "label": label, **columns}) + "\n"
                                             for i, label in enumerate(labels)))
        return tmp_path / name

    labelled, harmful = write("labelled.jsonl", 0, 1), write("harmful.jsonl", 1, 1)
    captions, named = write("captions.jsonl", 0, 0), write("other.jsonl", 0, source="my model")
    inputs = rows.gather([captions, labelled, named])
    assert [row.source for row in inputs.benign] == ["captions", "captions", "my model"] and {row.source for row in inputs.pairs} == {"labelled"}
    # Without other harmless answers it is what the harmful ones are told apart from.
    assert [row.label for row in rows.gather([harmful, captions]).pairs] == [1, 1, 0, 0] and not rows.gather([harmful, captions]).benign
    assert len(rows.gather([captions]).pairs) == 2


def test_wrong_rows_name_file_and_row_and_no_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a", "label": 1}\n{"question": "q", "answer": "secret words", "label": 7}\n')
    with pytest.raises(DataError, match="rows.jsonl, row 2: label must be 0 or 1") as error:
        rows.read(path)
    assert "secret" not in str(error.value)
    with pytest.raises(DataError, match="data must hold labelled answers, got none"):
        rows.gather([])
    assert "words" not in repr(Row("q", "secret words"))


def test_a_result_carries_its_provenance_and_no_nan(tmp_path):
    path = record.write(tmp_path, "detectors", {"kind": "detectors", "x": float("nan"), "y": np.float32(0.25)}, {"seed": 0})
    result = json.loads(path.read_text())
    assert result["x"] is None and result["y"] == 0.25 and result["run"]["config"] == {"seed": 0}
    assert result["run"]["versions"]["numpy"] == np.__version__ and result["run"]["cores"]
    (tmp_path / "other.json").write_text("[1]")
    assert record.read_all(tmp_path).keys() == {"detectors"}
