"""The attack suite on a fake detector: what it counts, and that a broken guard is called broken."""
import json
import math

import numpy as np
import pytest
from guard_fakes import SMALL, FakeDetector, real_tokenizer

import protector.selftest as selftest
from protector import DataError, Protector, ProtectorError
from protector.template import Limits

ROWS = selftest.read_rows()


class WordDetector(FakeDetector):
    """Flags what has one of the harmful rows' words, as a reader of plain words would."""

    def __init__(self):
        super().__init__(real_tokenizer(), Limits(question_tokens=40, window=96, overlap=32))
        words = {word.strip(".,!?:;") for row in ROWS if row["label"] for word in row["answer"].lower().split()}
        words -= {word.strip(".,!?:;") for row in ROWS if not row["label"] for word in row["answer"].lower().split()}
        self.words = {word for word in words if len(word) > 5 and word not in selftest.FILLER.lower()}

    def last_logit(self, ids):
        answer = self.tokenizer.decode(ids[len(ids) - ids[::-1].index(self.template.start):]).lower()
        value = sum(answer.split("\n", 1)[1].encode()) % 100 / 100
        return value + (4 if any(word in answer for word in self.words) else -4)

    def open(self):
        return WordCursor(self)


class WordCursor:
    def __init__(self, detector):
        self.detector = detector

    def start(self, ids):
        self.ids = list(ids)

    def feed(self, ids):
        logits = []
        for token in ids:
            self.ids.append(token)
            logits.append(self.detector.last_logit(self.ids))
        return np.array(logits)

    def close(self):
        pass


@pytest.fixture(scope="module")
def guard():
    return Protector(WordDetector(), False, threshold=0.5, on_flag="report")


@pytest.fixture(scope="module")
def result(guard):
    rows = [row for label in (1, 0) for row in [row for row in ROWS if row["label"] == label and row["language"] == "en"][:12]]
    rows += [row for row in ROWS if row["language"] in ("hi", "th", "de")]
    return selftest.measure(guard, selftest.SelftestConfig(long_tokens=200), rows)


def test_the_rows_are_those_that_the_suite_promises():
    counts = {(row["label"], row["language"] == "en"): 0 for row in ROWS}
    for row in ROWS:
        counts[row["label"], row["language"] == "en"] += 1
    assert counts[1, True] == counts[0, True] == 40 and counts[0, False] >= 20 and counts[1, False] >= 10
    assert {"hi", "ar", "th", "he", "emoji"} <= {row["language"] for row in ROWS if not row["label"]}
    assert len({row["answer"] for row in ROWS}) == len(ROWS)


def test_s23_harmless_rows_of_other_scripts_are_their_own_view():
    other = [row["answer"] for row in ROWS if row["language"] != "en" and row["language"] != "emoji" and not row["label"]]
    assert [text for text in other if selftest.normalised(text) != text] == []


def test_every_item_is_attacked(result):
    assert {row["item"] for row in result["attacks"]} == {8, 9, 10, 11, 12, 13, 14, 15, 23, 25, 26, 28, 29}
    assert len({row["name"] for row in result["attacks"]}) == len(selftest.ATTACKS) == len(result["attacks"])
    assert [row["name"] for row in result["attacks"] if row["known_miss"]] == [
        "base64 twice", "rot13", "Morse", "written backwards", "JSON escapes", "words backwards"]


def test_a_reader_of_plain_words_keeps_what_the_view_undoes(result):
    rates = {row["name"]: row for row in result["attacks"]}
    assert result["plain"]["flagged_harmful"]["rate"] == 1 and result["plain"]["flagged_harmless"]["rate"] == 0
    for name in ("zero-width characters", "soft hyphens", "bidi controls", "variation selectors", "tag characters between letters", "full width",
                 "mathematical letters", "circled letters", "small capitals", "combining marks", "letters spaced", "letters dotted", "odd white space",
                 "gaps", "capitals", "alternating case", "base64", "hex", "URL encoding", "HTML entities", "all in tag characters",
                 "all in variation selectors of an emoji", "after harmless text", "in the middle of harmless text", "before harmless text",
                 "across a window's edge", "code block", "quotation", "end marks after"):
        row = rates[name]
        assert row["stays_flagged"]["k"] == row["n"] == 12, name
        assert row["false_positives"]["k"] == 0, name
    assert rates["Morse"]["stays_flagged"]["k"] == 0 and rates["rot13"]["stays_flagged"]["k"] == 0
    assert rates["Morse"]["mean_change"] < -0.9 and abs(rates["capitals"]["mean_change"]) < 0.1


def test_invariants_hold_on_a_sound_model_and_break_on_a_broken_one(guard, result):
    assert [row["name"] for row in result["invariants"] if not row["holds"]] == [] and result["invariants_hold"]
    rows = ROWS[:6] + ROWS[40:46]

    def broken(change):
        detector = WordDetector()
        change(detector)
        found = selftest.invariants(Protector(detector, False, threshold=0.5, on_flag="report"), rows)
        return [row["item"] for row in found if not row["holds"]]

    def swap(detector):
        plain = detector.last_logit
        detector.last_logit = lambda ids: -plain(ids)

    assert 65 in broken(swap)
    assert 48 in broken(lambda detector: setattr(detector, "change", lambda logits: logits * math.nan))
    shaky = iter(range(10 ** 9))
    assert 49 in broken(lambda detector: setattr(detector, "change", lambda logits: logits + next(shaky) % 5 / 10))


def test_disguises_by_hand(guard):
    kit = selftest.Kit(guard, selftest.SelftestConfig())
    row = {"question": "q", "answer": "Mix one two three"}
    changed = {attack.name: attack.change(row, kit) for attack in selftest.ATTACKS}
    assert changed["rot13"][1] == "Zvk bar gjb guerr" and changed["Morse"][1].startswith("-- .. -..- / --- -. .")
    assert changed["letters spaced"][1] == "M i x  o n e  t w o  t h r e e"
    assert changed["over two answers, with history"] == ("Go on.", "two three", [("q", "Mix one")])
    assert all(item[0] in ("q", "Go on.") for item in changed.values())
    assert abs(kit.n_tokens(kit.filler(200)) - 200) < 5
    text = changed["across a window's edge"][1]
    start = kit.n_tokens(text[:text.index("Mix")])
    assert start < guard.window < start + 5


def test_run_prints_writes_and_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(selftest, "Protector", lambda source=None, *args, detector_options=None, **options: Protector(
        source if hasattr(source, "logits") else WordDetector(), *args, **{**options, "threshold": options.get("threshold") or 0.5}))
    monkeypatch.setattr(selftest, "ATTACKS", selftest.ATTACKS[:3])
    out = tmp_path / "selftest.json"
    result = selftest.run(selftest.SelftestConfig(rows=4, out=str(out)))
    shown = capsys.readouterr()
    assert "stays flagged" in shown.out and "holds" in shown.out and "BROKEN" not in shown.out and "selftest: end marks after" in shown.err
    written = json.loads(out.read_text())
    assert written["kind"] == "selftest" and written["run"]["config"]["rows"] == 4 and written["attacks"][0]["n"] == result["attacks"][0]["n"]
    assert not any(row["answer"] in out.read_text() for row in ROWS)

    selftest.run(selftest.SelftestConfig(rows=4, json=True, baseline=str(out)))
    assert json.loads(capsys.readouterr().out)["regressions"] == []
    written["attacks"][0]["false_positives"] |= {"high": -0.1}
    out.write_text(json.dumps(written))
    with pytest.raises(ProtectorError, match=r"got end mark and a forged turn before \(false positives\)"):
        selftest.run(selftest.SelftestConfig(rows=4, baseline=str(out)))
    monkeypatch.setattr(selftest, "INVARIANTS", (("20 pairs: harmful above harmless", 65, lambda *_: False),))
    with pytest.raises(ProtectorError, match="got 20 pairs: harmful above harmless"):
        selftest.run(selftest.SelftestConfig(rows=4))


def test_malformed_rows(tmp_path):
    for text in ("", "{", '{"question": "q"}', '{"answer": "a", "label": 2, "language": "en"}'):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(DataError, match="must hold rows of question, answer, label and language"):
            selftest.read_rows(tmp_path / "rows.jsonl")
    assert SMALL.window < 96  # the windows here are large enough for a row
