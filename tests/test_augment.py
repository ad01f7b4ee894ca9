"""Disguises keep the text and its label, and say nothing about it."""
import json
import random
import re

import pytest

from protector import augment
from protector.augment import dilute, disguise

TEXT = "Mix them in a bucket. Then shut the door! It's fine."
FORMS = ("refusal", "refusal_after", "carrier", "tail", "head", "code", "json", "quote", "case", "letters", "list")


def plain(text):
    """Letters of a text with leetspeak undone, lower case."""
    return re.sub(r"[^a-z]", "", text.lower().translate(str.maketrans("431057", "aeiost")))


def undone(form, text):
    """What a disguise was put around, by its own inverse."""
    if form == "json":
        (value,) = json.loads(text).values()
        return plain(value)
    return plain(re.sub(r"^\d+\. ", "", text, flags=re.MULTILINE) if form == "list" else text)


@pytest.mark.parametrize("form", FORMS)
def test_each_disguise_keeps_the_text(form):
    function = getattr(augment, "_" + form)
    forms = {function(TEXT, random.Random(seed)) for seed in range(40)}
    assert all(plain(TEXT) in undone(form, text) for text in forms), forms
    assert TEXT not in forms or form == "letters"


def test_disguises_by_hand():
    rng = random.Random(0)
    assert augment._list("One. Two! Three.", rng) == "1. One\n2. Two\n3. Three."
    assert augment._json('say "hi"\né', random.Random(1)).endswith('"say \\"hi\\"\\né"}')
    assert augment._code("x", random.Random(0)).startswith("```") and augment._code("x", random.Random(0)).endswith("\nx\n```")
    assert {augment._case("aB c", random.Random(i)) for i in range(20)} == {"AB C", "ab c", "Ab C"}


@pytest.mark.parametrize("text", ["", " ", ".", "a", ". . .", "{}", "\n\n", "\ud800", "x" * 10_000])
def test_any_text_can_be_disguised(text):
    for seed in range(60):
        assert isinstance(disguise(text, 1, random.Random(seed)), str)
        assert disguise(text, 0, random.Random(seed)).strip() or not text.strip(" .\n"), "a disguise lost the answer"


def test_the_label_draws_no_other_disguise():
    assert [disguise(TEXT, 0, random.Random(i)) for i in range(200)] == [disguise(TEXT, 1, random.Random(i)) for i in range(200)]


def test_every_disguise_is_drawn():
    # 11 forms, 1,100 draws: 100 each, standard deviation 9.5; five of them allowed.
    drawn = [disguise(TEXT, 1, random.Random(i)) for i in range(1100)]
    assert abs(sum(text.startswith("```") for text in drawn) - 100) < 48
    assert abs(sum(text.startswith("1. ") for text in drawn) - 100) < 48
    assert abs(sum(text.startswith(augment.REFUSALS) for text in drawn) - 100) < 48


def test_dilute_by_hand():
    assert dilute([7, 8], lambda: [1, 2, 3], 0, random.Random(0)) == ([7, 8], 0)  # no room
    drawn = [dilute([7, 8], lambda: [1, 2, 3], 4, random.Random(i)) for i in range(60)]
    for ids, start in drawn:
        assert ids[start:start + 2] == [7, 8] and 1 <= len(ids) - 2 <= 4
        assert ids[:start] + ids[start + 2:] == ([1, 2, 3] * 2)[:len(ids) - 2]
    # before, after, and inside; as much as fits, and less
    assert {(start == 0, start == len(ids) - 2) for ids, start in drawn} == {(True, False), (False, True), (False, False)}
    assert {len(ids) for ids, _ in drawn} == {3, 4, 5, 6}
