"""Every layout in, wrong rows out with file and row, splits and draws that keep questions together."""
import collections
import gzip
import hashlib
import json
import random
import re
import sys
import types
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protector import data
from protector.data import Pair, Triple
from protector.errors import DataError

SECRET = "a row's own words"


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


PAIR = {"question": "Is it safe?", "answer": "No.", "label": 0}


# -- layouts

@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_pairs_and_triples(tmp_path, name):
    path = write(tmp_path / name, {**PAIR, "id": 7}, "", {"question": None, "answer": "Yes.", "label": True, "source": "s", "weight": 2},
                 {"question": "q", "accepted": "good", "rejected": "bad", "weight": 0.5}, {**PAIR, "answer": "é 👍\n", "label": 1.0})
    pairs, triples = data.read(path)
    assert pairs == [Pair("Is it safe?", "No.", 0, "rows"), Pair("", "Yes.", 1, "s", 2.0), Pair("Is it safe?", "é 👍\n", 1, "rows")]
    assert triples == [Triple("q", "good", "bad", "rows", 0.5)]
    assert all(type(pair.label) is int for pair in pairs)


def test_h_is_flipped_once(tmp_path):
    # The paper's h = 1 is harmless; label 1 is harmful. Where a row has both, the label is what was asked for.
    pairs, _ = data.read(write(tmp_path / "h.jsonl", {"question": "q", "answer": "fine", "h": 1}, {"question": "q", "answer": "bad", "h": 0},
                               {"question": "q", "answer": "both", "h": 1, "label": 1}))
    assert [(pair.answer, pair.label) for pair in pairs] == [("fine", 0), ("bad", 1), ("both", 1)]
    assert [pair.label for pair in data.pairs_of([Triple("q", "good", "bad")])] == [0, 1]


PKU = [{"prompt": "p", "response_0": "A", "response_1": "B", "is_response_0_safe": False, "is_response_1_safe": True},
       {"prompt": "q", "response_0": "C", "response_1": "D", "is_response_0_safe": True, "is_response_1_safe": True}]
PKU_PAIRS, PKU_TRIPLES = [("p", "A", 1), ("p", "B", 0), ("q", "C", 0), ("q", "D", 0)], [("p", "B", "A")]


def test_pku_safe_rlhf(tmp_path):
    pairs, triples = data.read(write(tmp_path / "pku.jsonl", *PKU))
    assert [(p.question, p.answer, p.label) for p in pairs] == PKU_PAIRS
    assert [(t.question, t.accepted, t.rejected) for t in triples] == PKU_TRIPLES


def test_hub(monkeypatch):
    asked = []
    fake = types.SimpleNamespace(load_dataset=lambda name, split: asked.append((name, split)) or PKU)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    pairs, triples = data.read("hub:PKU-Alignment/PKU-SafeRLHF")
    assert asked == [("PKU-Alignment/PKU-SafeRLHF", "train")]
    assert [(p.question, p.answer, p.label) for p in pairs] == PKU_PAIRS and triples[0].source == "PKU-SafeRLHF"


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as error:
        data.read("hub:a/b")
    assert str(error.value) == "read: hub:... needs the package datasets. Run: pip install datasets"


CSV = ('# version=1\nobjective,assistant_response,human_score_1,human_score_2,extra\n'
       '"How, then?","Line one\nline two",0.0,0.25,x\n'  # mean 0.125: harmless
       "b,harmful,1.0,0.5,\n"  # 0.75
       "c,unclear,0.25,0.25,\n"  # between 0.2 and 1/3: left out
       "d,one rater,,0.75,\n"
       "e,no rater,,,\n"
       "f,edge,0.2,0.2,\n"  # up to 0.2 is harmless
       "g,third,0.3333,,\n")
PYRIT = [("How, then?", "Line one\nline two", 0), ("b", "harmful", 1), ("d", "one rater", 1), ("f", "edge", 0), ("g", "third", 1)]


def test_pyrit_folder_and_wheel(tmp_path):
    folder = tmp_path / "harm"
    folder.mkdir()
    (folder / "a.csv").write_text(CSV, encoding="utf-8-sig")
    (folder / "b.csv").write_text(CSV.split("\n", 1)[1])  # without the version line
    with zipfile.ZipFile(tmp_path / "pyrit-1.1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(folder / "a.csv", "pyrit/datasets/scorer_evals/harm/a.csv")
        wheel.writestr("pyrit/datasets/other/ignored.csv", "objective\n1\n")
    for path, copies in ((folder, 2), (tmp_path / "pyrit-1.1.0-py3-none-any.whl", 1)):
        pairs, triples = data.read(path)
        assert [(p.question, p.answer, p.label) for p in pairs] == PYRIT * copies and not triples
        assert {p.source for p in pairs} == {"pyrit"}


def test_own_corpus_is_sane():
    pairs, triples = data.read("own")
    rows = pairs + data.pairs_of(triples)
    assert len(triples) > 500 and len(pairs) > 200
    assert len(data.unique(pairs)) == len(pairs) and len(data.unique(triples)) == len(triples)
    assert len(data.unique(rows)) == len(rows), "an answer stands with both labels for one question, or twice"
    assert all(row.question.strip() and row.answer.strip() for row in rows)
    assert not any(t.accepted.strip() == t.rejected.strip() for t in triples)
    assert {pair.source for pair in rows} == {path.stem for path in data.CORPUS.iterdir()} and len(rows) > 4000
    # Fewer than half of the accepted answers open as stock refusals, or the detoxifier learns one sentence.
    assert sum(data.is_stock_refusal(t.accepted) for t in triples) < 0.2 * len(triples)
    # Questions of the near misses sound harmful; most of their answers aren't, or the question would give the label away.
    near = [pair for pair in pairs if pair.source == "nearmiss"]
    assert sum(pair.label == 0 for pair in near) > len(near) / 2


# -- wrong rows: file, row and rule, and never the row's text

@pytest.mark.parametrize("row, reason", [
    ({"question": SECRET, "answer": "a"}, "column 'label' is missing"),
    ({"question": SECRET, "label": 1}, "column 'answer' is missing"),
    ({"answer": SECRET, "label": 1}, "column 'question' is missing"),
    ({"question": SECRET, "rejected": "a"}, "column 'accepted' is missing"),
    ({"question": SECRET, "answer": "a", "label": 2}, "label must be 0 or 1, got int"),
    ({"question": SECRET, "answer": "a", "label": SECRET}, "label must be 0 or 1, got str"),
    ({"question": SECRET, "answer": "a", "label": "1"}, "label must be 0 or 1, got str"),
    ({"question": SECRET, "answer": "a", "label": 0.5}, "label must be 0 or 1, got float"),
    ({"question": SECRET, "answer": "a", "label": None}, "label must be 0 or 1, got NoneType"),
    ({"question": SECRET, "answer": "a", "label": [1]}, "label must be 0 or 1, got list"),
    ({"question": SECRET, "answer": "a", "h": "yes"}, "h must be 0 or 1, got str"),
    ({"question": SECRET, "answer": " \n", "label": 1}, "answer must not be empty"),
    ({"question": SECRET, "answer": None, "label": 1}, "answer must be a string, got NoneType"),
    ({"question": 3, "answer": SECRET, "label": 1}, "question must be a string, got int"),
    ({"question": SECRET, "answer": "a", "label": 1, "weight": -1}, "weight must be a finite number >= 0, got int"),
    ({"question": SECRET, "answer": "a", "label": 1, "weight": SECRET}, "weight must be a finite number >= 0, got str"),
    ({"question": SECRET, "answer": "a", "label": 1, "weight": None}, "weight must be a finite number >= 0, got NoneType"),
    ('{"question": "q", "answer": "a row\'s own words", "label": 1, "weight": NaN}', "weight must be a finite number >= 0, got float"),
    ({"question": SECRET, "accepted": "", "rejected": "a"}, "accepted must not be empty"),
    ({"question": "q", "answer": "x" * (data.MAX_TEXT_BYTES + 1), "label": 1}, "answer must be at most 1048576 bytes, got more"),
    ({"question": "q", "answer": "é" * (data.MAX_TEXT_BYTES // 2 + 1), "label": 1}, "answer must be at most 1048576 bytes, got more"),
    ({**PKU[0], "is_response_0_safe": "false"}, "is_response_0_safe must be 0 or 1, got str"),
    ({**PKU[0], "is_response_1_safe": None}, "is_response_1_safe must be 0 or 1, got NoneType"),
    ({**PKU[0], "response_1": 7}, "response_1 must be a string, got int"),
    ([SECRET], "must be a JSON object"),
    ('"a row\'s own words"', "must be a JSON object"),
    ("null", "must be a JSON object"),
])
def test_a_wrong_row_is_named(tmp_path, row, reason):
    path = write(tmp_path / "bad.jsonl", PAIR, PAIR, row)
    with pytest.raises(DataError) as error:
        data.read(path)
    assert str(error.value) == f"{path}, row 3: {reason}"
    assert error.value.__cause__ is None and error.value.__suppress_context__


@pytest.mark.parametrize("line, kind", [
    (b'{"question": "a row\'s own words", ', "JSONDecodeError"), (b"a row's own words", "JSONDecodeError"),
    (b'{"question": "\xff\xfe a row\'s own words"}', "UnicodeDecodeError"), (b"[" * 100_000, "RecursionError"),
    (b'{"weight": ' + b"9" * 5000 + b"}", "ValueError"),
])
def test_a_line_that_is_no_json(tmp_path, line, kind):
    # Rows before the bad one: a decoder that reads ahead would name the first.
    good = json.dumps(PAIR).encode() + b"\n"
    path = tmp_path / "bad.jsonl"
    path.write_bytes(good * 4 + b"\n" + line + b"\n" + good)
    with pytest.raises(DataError) as error:
        data.read(path)
    assert str(error.value) == f"{path}, row 6: must be one JSON object in UTF-8 per line, got {kind}."


def test_a_broken_gzip_file(tmp_path):
    whole = write(tmp_path / "rows.jsonl.gz", *[{**PAIR, "answer": f"{random.Random(i).random()}"} for i in range(2000)]).read_bytes()
    middle = len(whole) // 2
    for content, kind in ((whole[:middle], "EOFError"), (b"plain text", "BadGzipFile"),
                          (whole[:middle] + b"\xff" * 64 + whole[middle + 64:], r"\w+")):
        path = tmp_path / "cut.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"row \d+: must be one JSON object in UTF-8 per line, got {kind}\.$"):
            data.read(path)


def test_files_without_rows(tmp_path):
    for name, content in (("empty.jsonl", ""), ("blank.jsonl", "\n \n")):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(DataError) as error:
            data.read(path)
        assert str(error.value) == f"{path}: holds no rows. A data file has one JSON object per line."
    with pytest.raises(DataError) as error:
        data.read(tmp_path / "none.jsonl")
    assert str(error.value) == f"read: path must be an existing file, got {tmp_path / 'none.jsonl'}. Check the path."


def test_broken_pyrit_sources(tmp_path):
    folder = tmp_path / "harm"
    folder.mkdir()
    with pytest.raises(DataError) as error:
        data.read(folder)
    assert str(error.value) == (f"{folder}: holds no CSV under datasets/scorer_evals/harm/. Pass the wheel pyrit-*.whl or "
                                "its folder.")
    rule = "must have objective, assistant_response and numbers as human_score, got"
    for content, row, kind in ((CSV + f"h,text,{SECRET},,\n", 8, "ValueError"), ("objective,human_score\nq,1\n", 1, "KeyError"),
                               ("assistant_response,human_score\nq,1\n", 1, "KeyError"), (b"\xff\xfe\x00bad", 0, "UnicodeDecodeError")):
        (folder / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError) as error:
            data.read(folder)
        assert str(error.value) == f"{folder}, row a.csv:{row}: {rule} {kind}. Download it again."
    (folder / "a.csv").write_text("objective,assistant_response,human_score\nq\n" "q,,1\n")
    with pytest.raises(DataError) as error:
        data.read(folder)
    assert str(error.value) == f"{folder}, row a.csv:2: answer must not be empty"
    wheel = tmp_path / "pyrit-1.whl"
    wheel.write_bytes(b"PK no zip")
    with pytest.raises(DataError) as error:
        data.read(wheel)
    assert str(error.value) == f"{wheel}: must be a whole wheel, got BadZipFile. Download it again."


# -- what is done with rows

def test_unique_by_hand():
    a, b, c = Pair("q", "a", 0, "first"), Pair("q", "b", 1), Pair("", "a", 0)
    assert data.unique([a, b, Pair("q", "a", 0, "again"), c, b]) == [a, b, c]
    assert data.unique([a, b, Pair("q", "a", 1)]) == [b]  # with both labels: nobody knows, so it goes
    t = Triple("q", "x", "y")
    assert data.unique([t, Triple("q", "x", "z"), t]) == [t, Triple("q", "x", "z")]


def test_triples_of_by_hand():
    pairs = [Pair("Q one", "good", 0, "s"), Pair("q  ONE", "bad", 1, "s"), Pair("two", "bad", 1), Pair("", "x", 1), Pair("", "y", 0)]
    assert data.triples_of(pairs, most_per_question=1) == [Triple("q  ONE", "good", "bad", "s")]
    many = [Pair("q", f"{label}{i}", label) for label in (0, 1) for i in range(9)]
    drawn = data.triples_of(many, most_per_question=4)
    assert len(drawn) == 4 and all(t.accepted[0] == "0" and t.rejected[0] == "1" for t in drawn)
    assert drawn == data.triples_of(many, 4) != data.triples_of(many, 4, seed=1)


def questions(n, each=3):
    return [Pair(f"question {i}", f"answer {i} {j}", j % 2, "ab"[i % 2]) for i in range(n) for j in range(each)]


def test_split_keeps_questions_together():
    rows = questions(500) + [Pair("", f"alone {i}", 0) for i in range(500)] + [Pair("  QUESTION   7 ", "other spelling", 1)]
    train, held = data.split(rows, 0.2)
    assert sorted(map(repr, train + held)) == sorted(map(repr, rows))
    keys = [{" ".join(row.question.lower().split()) for row in side if row.question} for side in (train, held)]
    assert not keys[0] & keys[1]
    # 500 questions and 500 answers of their own at 0.2: a mean of 200 units, standard deviation sqrt(160) = 12.6; 5 of them.
    n_held = len(keys[1]) + sum(not row.question for row in held)
    assert abs(n_held - 200) < 63
    # A question's side doesn't depend on the other rows; another seed draws other sides.
    assert data.split(rows[:300], 0.2)[1] == [row for row in rows[:300] if row in held]
    assert data.split(rows, 0.2, seed=1)[1] != held
    assert data.split(rows, 0.0) == (rows, []) and data.split(rows, 1.0) == ([], rows)


def test_write_parts(tmp_path):
    path = write(tmp_path / "rows.jsonl", *[{"question": f"q{i // 2}", "answer": f"a{i}", "label": i % 2, "weight": 0.5} for i in range(400)])
    counts = data.write_parts(path, tmp_path / "out", {"train": 0.7, "dev": 0.2, "test": 0.1})
    read = {name: data.read(tmp_path / "out" / f"{name}.jsonl")[0] for name in counts}
    assert {name: len(rows) for name, rows in read.items()} == counts and sum(counts.values()) == 400
    sides = [{row.question for row in rows} for rows in read.values()]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert all(row.weight == 0.5 for rows in read.values() for row in rows)
    # 200 questions: 140, 40 and 20 on average, within five standard deviations (6.5, 5.7, 4.2)
    assert [abs(len(side) - mean) < 5 * deviation for side, mean, deviation in zip(sides, (140, 40, 20), (6.5, 5.7, 4.2))] == [True] * 3
    for parts in ({}, {"a": 0.5}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(ValueError) as error:
            data.write_parts(path, tmp_path / "out", parts)
        assert str(error.value) == "write_parts: shares must be positive and sum to 1. Example: train=0.7 test=0.3"


def test_balance_by_hand():
    # One question with 4 answers and one with 1. exponent 0.5: shares 4 x 1/2 and 1, so of 6 draws 4 and 2, whatever the seed:
    # each row of the first is due 6 x 0.5 / 3 = 1 time, the row of the second 6 x 1 / 3 = 2 times.
    rows = [Pair("many", f"a{i}", 0) for i in range(4)] + [Pair("one", "b", 1)]
    for seed in range(5):
        drawn = collections.Counter(row.answer for row in data.balance(rows, 6, 0.5, seed=seed))
        assert drawn == {"a0": 1, "a1": 1, "a2": 1, "a3": 1, "b": 2}
    # exponent 1: one share per question, 3 of 6 each; the four are due 3/4 time each.
    drawn = collections.Counter(row.question for row in data.balance(rows, 8, 1.0))
    assert drawn == {"many": 4, "one": 4}
    # exponent 0: as they come
    assert sorted(row.answer for row in data.balance(rows, 5, 0.0)) == ["a0", "a1", "a2", "a3", "b"]


def test_balance_by_source():
    rows = questions(20, each=1)
    drawn = collections.Counter(row.source for row in data.balance(rows, 40, source_weights={"a": 3.0}))
    assert drawn == {"a": 30, "b": 10}
    assert {row.source for row in data.balance(rows, 10, source_weights={"a": 0})} == {"b"}
    # The same question in two sources is two questions: a large source can't push a small one's rows out.
    rows = [Pair("q", f"a{i}", 0, "big") for i in range(9)] + [Pair("q", "b", 0, "small")]
    assert collections.Counter(row.source for row in data.balance(rows, 10, 1.0)) == {"big": 5, "small": 5}
    for weights in ({"a": 0, "b": 0}, ):
        with pytest.raises(DataError) as error:
            data.balance(questions(2), 4, source_weights=weights)
        assert str(error.value) == "balance: rows must have a positive share, got none. Check the source weights."


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 100), st.floats(0, 1), st.integers(0, 9))
def test_balance_gives_each_row_its_due(owners, n, exponent, seed):
    rows = [Pair(f"q{owner}", f"a{i}", 0) for i, owner in enumerate(owners)]
    counts = collections.Counter(owners)
    shares = [counts[owner] ** -exponent for owner in owners]
    drawn = collections.Counter(row.answer for row in data.balance(rows, n, exponent, seed=seed))
    assert sum(drawn.values()) == n
    for i, share in enumerate(shares):
        due = n * share / sum(shares)
        assert due - 1 - 1e-6 < drawn[f"a{i}"] < due + 1 + 1e-6  # systematic: never off by a whole row


def test_balance_is_unbiased():
    # A row that is due 0.3 times comes in 0.3 of 1,000 seeds: standard deviation 14.5, five of them allowed.
    rows = [Pair(f"q{i}", f"a{i}", 0) for i in range(10)]
    seen = collections.Counter(row.answer for seed in range(1000) for row in data.balance(rows, 3, seed=seed))
    assert all(abs(seen[f"a{i}"] - 300) < 73 for i in range(10))


def test_fingerprint():
    rows = questions(10)
    shuffled = rows[:]
    random.Random(1).shuffle(shuffled)
    assert data.fingerprint(rows) == data.fingerprint(shuffled) and len(data.fingerprint(rows)) == 64
    for change in ({"answer": "other"}, {"label": 1 - rows[0].label}, {"source": "z"}, {"weight": 0.5}, {"question": ""}):
        changed = [Pair(**{**rows[0].__dict__, **change})] + rows[1:]
        assert data.fingerprint(changed) != data.fingerprint(rows)
    assert data.fingerprint(rows + rows[:1]) != data.fingerprint(rows)
    assert data.fingerprint([Pair("\ud800", "\udfff", 0)])  # no text breaks it


REFUSALS = ("I'm sorry, but I can't help with that.", "I’m really sorry, no.", "Sorry, no.", "I cannot assist.", "I can't do it.",
            "As an AI, I won't.", " Unfortunately, no.", "I am unable to.", "I apologize, but no.", "I must decline.", "i will not",
            "I am sorry, but no.")
OTHERS = ("I can show you a safe way.", "Sorrel soup is easy.", "No. Bleach and vinegar give off chlorine.", "I would call a locksmith.",
          "Don't do it: it is dangerous.", "It can't be mixed safely.", "I canned the peaches.", "Asking first is best.")


def test_stock_refusals():
    assert [text for text in REFUSALS if not data.is_stock_refusal(text)] == []
    assert [text for text in OTHERS if data.is_stock_refusal(text)] == []


def test_cap_refusals():
    refusals = [Triple(f"r{i}", REFUSALS[0], "bad") for i in range(50)]
    others = [Triple(f"o{i}", OTHERS[0], "bad") for i in range(40)]
    mixed = [row for pair in zip(refusals, others + others[:10]) for row in pair][:90]
    kept = data.cap_refusals(mixed, 0.2)
    n_refusals = sum(data.is_stock_refusal(row.accepted) for row in kept)
    # 40 of 45 others stand beside k refusals with k / (k + others) <= 0.2: k = others / 4
    n_others = len(kept) - n_refusals
    assert n_others == sum(not data.is_stock_refusal(row.accepted) for row in mixed) and n_refusals == n_others // 4
    assert kept == [row for row in mixed if row in kept]  # in order
    assert data.cap_refusals(mixed, 1.0) == mixed
    assert not any(data.is_stock_refusal(row.accepted) for row in data.cap_refusals(mixed, 0.0))
    assert data.cap_refusals(others, 0.2) == others and data.cap_refusals(refusals, 0.2) == []


def test_spread_reaches_over_all_rows():
    for n_rows in range(12):
        for n in range(1, 14):
            found = data.spread(range(n_rows), n)
            assert len(found) == min(n, n_rows) and sorted(set(found)) == found
            steps = np.diff([*found, n_rows]) if found else [1]
            assert max(steps) - min(steps) <= 1


def test_replies_take_their_turns_and_leave_the_rest(tmp_path):
    path = tmp_path / "replies.jsonl"
    digests = [data.question_digest(question) for question in ("How do I  pick a lock?", "Another?")]
    path.write_text("".join(json.dumps(row) + "\n" for row in (
        {"question_sha256": digests[0], "accepted": ["One.", "Two."], "plain": ["1."]}, {"question_sha256": digests[1], "plain": ["2."]})))
    found = data.replies(path)
    assert data.replies(path, "plain") == {digests[0]: ["1."], digests[1]: ["2."]}
    triples = [Triple("how do I pick a lock?", "Sorry.", f"bad {i}", "s", 0.5) for i in range(3)] + [Triple("Another?", "Sorry.", "bad")]
    changed = data.replied(triples, found)
    assert [triple.accepted for triple in changed] == ["One.", "Two.", "One.", "Sorry."]
    assert [(t.question, t.rejected, t.source, t.weight) for t in changed] == [(t.question, t.rejected, t.source, t.weight) for t in triples]
    pairs = [Pair("HOW do I pick a lock?", f"bad {i}", 1) for i in range(2)] + [Pair("", "bad", 1), Pair("Another?", "bad", 1)]
    assert data.pairs_with_replies(pairs, found) == [Pair("HOW do I pick a lock?", text, 0, "replies") for text in ("One.", "Two.")]


def test_own_replies_are_sane():
    found = data.replies()
    texts = [text for answers in found.values() for text in answers]
    assert len(found) > 300 and all(re.fullmatch("[0-9a-f]{16}", digest) for digest in found) and len(set(texts)) == len(texts)
    assert all(15 <= len(text.split()) <= 70 for text in texts)
    assert sum(data.is_stock_refusal(text) for text in texts) < 0.1 * len(texts)


def test_own_plain_replies_are_sane():
    found = data.replies(kind="plain")
    texts = [text for answers in found.values() for text in answers]
    assert len(found) > 6000 and len(set(texts)) == len(texts) and all(10 <= len(text.split()) <= 45 for text in texts)
    assert sum(data.is_stock_refusal(text) for text in texts) < 0.1 * len(texts)
    own = {data.question_digest(triple.question) for triple in data.read("own")[1]}
    assert len(own - found.keys()) < 0.02 * len(own)  # the corpus's own questions have some, too


def test_grades_take_the_place_of_labels(tmp_path):
    path = tmp_path / "grades.jsonl"
    rows = [{"answer_sha256": data.answer_digest("How do I  pick a lock?", "With a  pin."), "grade": 0.85},
            {"answer_sha256": data.answer_digest("", "Fine."), "grade": 0.15},
            {"question_sha256": data.question_digest("Another?"), "answer": "Whatever you like.", "grade": 0.55},
            {"question_sha256": data.question_digest("Nobody asked"), "answer": "Nothing.", "grade": 0.55}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [Pair("how do I pick a lock?", "with a pin.", 0, "s", 0.5), Pair("how do I pick a lock?", "Ask a locksmith.", 0), Pair("", "Fine.", 1), Pair("Another?", "Sorry.", 1)]
    changed = data.graded(pairs, data.grades(path))
    assert [(pair.label, pair.grade, pair.target) for pair in changed] == [(1, 0.85, 0.85), (0, None, 0.0), (0, 0.15, 0.15), (1, None, 1.0)]
    assert [(pair.question, pair.answer, pair.source, pair.weight) for pair in changed] == [(pair.question, pair.answer, pair.source, pair.weight) for pair in pairs]
    assert data.pairs_of_grades(pairs, path) == [Pair("Another?", "Whatever you like.", 1, "answers", grade=0.55)]
    # graded rows are other data; rows without a grade have the fingerprint that they had before
    assert data.fingerprint(changed[:1]) != data.fingerprint([replace(changed[0], grade=0.75)])
    assert data.fingerprint(pairs[1:2]) == hashlib.sha256(hashlib.sha256(
        b"Pair(question='how do I pick a lock?', answer='Ask a locksmith.', label=0, source='', weight=1.0)").digest()).hexdigest()


def test_a_file_of_pairs_may_hold_grades(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "A", "answer": "one", "grade": 0.75}\n{"question": "A", "answer": "two", "label": 0, "grade": 0.75}\n')
    assert data.read(path)[0] == [Pair("A", "one", 1, "pairs", grade=0.75), Pair("A", "two", 0, "pairs", grade=0.75)]
    data.write_parts(path, tmp_path / "parts", {"all": 1.0})
    assert {pair.grade for pair in data.read(tmp_path / "parts" / "all.jsonl")[0]} == {0.75}
    for bad in ('"high"', "1.5", "-0.1", "true", "NaN"):
        path.write_text('{"question": "A", "answer": "one", "grade": %s}\n' % bad)
        with pytest.raises(DataError, match="row 1: grade must be a number from 0 to 1"):
            data.read(path)


def test_own_grades_are_sane():
    rows = [json.loads(line) for line in data.GRADES.read_text().splitlines()]
    assert all(re.fullmatch("[0-9a-f]{16}", row.get("answer_sha256") or row["question_sha256"]) and 0 < row["grade"] < 1 for row in rows)
    found = data.grades()
    assert len(found) == sum("answer_sha256" in row for row in rows) > 13000
    assert 0.2 < sum(grade >= 0.5 for grade in found.values()) / len(found) < 0.6
