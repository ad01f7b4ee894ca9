"""Token ids: one sequence from two tokenisers, roles that no text can forge, windows that leave nothing out."""
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protector.template import Limits, Template, Window, well_formed, windows

TEXTS = {
    "plain": "Yes, it is safe. Don't worry, we'll see; they've said I'd go.",
    "digits": "12345 007 3.14159 1,000,000 2024-01-31 ٣٤٥ ४२ ⅷ ½ ² x86_64",
    "scripts": "Привет мир. 你好,世界。こんにちは 안녕하세요 مرحبا بالعالم שלום नमस्ते สวัสดี Γειά Բարեւ გამარჯობა ሰላም",
    "marks": "e\u0301 n\u0303 Z\u0351\u036b\u0343 \u0915\u094d\u0937 \u0e01\u0e33 \ufdfa \u1e9e \u0130 \u00df",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 1️⃣ ❤️ \U0001f9d1\u200d\U0001f680",
    "spaces": "a  b   c\t\td \n\n e\r\nf\r\r\n  \n\t \u00a0\u2003\u3000g\u2028h\x0bi\x0c j   ",
    "only spaces": " \n\t  \n",
    "lines": "\r\n\r\nfirst\r\n\r\n\r\nsecond\n\n\n\nthird\r",
    "controls": "\x00a\x00\x00b\x01\x1b[31mred\x7f\x85\x1c\x1f\ufeff\ufffe\ufff9",
    "surrogates": "\ud800 lone \udc00 pair \ud83d\ude00 end \ud83d",
    "astral": "\U00010348 \U0001d49c \U000e0041 \U0010ffff \U0002f800",
    "code": "def f(x):\n\treturn {'a': [1, 2], \"b\": x**2}  # <b>&amp;</b> \\n %s {question} $x\n",
    "zero width": "b\u200bl\u200dea\u00adch \u202e abc \u2066 d",
    "long word": "a" * 5000,
    "one": "a", "punctuation": "!?...---''\"\"``~~^^||\\//", "newlines": "\n" * 100 + " " * 100 + "\t" * 50,
}


@pytest.fixture(scope="module")
def specials(vocabulary):
    """{string: id} of the base's 17 special tokens."""
    found = {token: i for i, token in enumerate(vocabulary["tokenizer.ggml.tokens"])
             if vocabulary["tokenizer.ggml.token_type"][i] == 3}
    assert len(found) == 17
    return found


@pytest.fixture(scope="module", params=["hf", "llama"])
def template(request):
    return Template(request.getfixturevalue(request.param + "_ids"))


@pytest.fixture(scope="module")
def both(hf_ids, llama_ids):
    return Template(hf_ids), Template(llama_ids)


def test_m01_a_tokeniser_that_reads_a_mark_in_a_text_is_refused():
    """An added token that isn't a special one is matched in texts, too."""
    class Naive:
        def special(self, name):
            return {"<|im_start|>": 1, "<|im_end|>": 2}.get(name)

        def encode(self, text):
            return [1 if part == "<|im_start|>" else 9 for part in re.split(r"(<\|im_start\|>)", text) if part]

    with pytest.raises(ValueError, match=r"^Template: tokenizer must read <\|im_start\|> in a text as text, got the mark itself"):
        Template(Naive())


@pytest.mark.parametrize("name", TEXTS)
def test_both_tokenisers_give_the_same_ids(both, name):
    hf, llama = (template.encode(TEXTS[name]) for template in both)
    assert hf == llama
    assert hf or not TEXTS[name]


def test_nothing_is_lost_in_ids(both):
    for name, text in TEXTS.items():
        for template in both:
            assert template.tokenizer.decode(template.encode(text)) == well_formed(text), name


def test_broken_bytes_read_the_same(both):
    # Single tokens can be parts of a character; what a rewrite made of them is shown and scored as one text.
    rng = random.Random(9)
    for _ in range(300):
        ids = [rng.choice((rng.randrange(17, 300), rng.randrange(17, 49152))) for _ in range(6)]
        hf, llama = (template.tokenizer.decode(ids) for template in both)
        assert hf == llama


def test_long_text_has_the_same_ids(both):
    rng = random.Random(5)
    text = " ".join(rng.choice(list(TEXTS.values())) if rng.random() < 0.02 else rng.choice(TEXTS["plain"].split())
                    for _ in range(20_000))[:100_000]
    hf, llama = (template.encode(text) for template in both)
    assert len(text) == 100_000 and len(hf) > 20_000 and hf == llama


characters = st.one_of(st.characters(), st.sampled_from(" \n\t\r0123456789<|>_'.,aeiou"), st.characters(max_codepoint=0x2FF))
words = st.one_of(st.text(characters, max_size=12), st.sampled_from(["<|im_end|>", "<|im_start|>", "user\n", "  ", "'s", "\r\n"]))


@settings(max_examples=300)
@given(st.lists(words, max_size=8))
def test_any_text_has_the_same_ids(hf_ids, llama_ids, parts):
    text = well_formed("".join(parts))
    ids = hf_ids.encode(text)
    assert ids == llama_ids.encode(text)
    assert not ids or min(ids) > 16  # ids 0 to 16 are the special ones


@settings(max_examples=200)
@given(st.lists(words, min_size=1, max_size=6))
def test_ids_can_be_cut_where_white_space_follows_a_word(hf_ids, llama_ids, parts):
    # stream.py feeds a growing text piece by piece and relies on this.
    text = well_formed("".join(parts))
    for tokenizer in (hf_ids, llama_ids):
        whole = tokenizer.encode(text)
        for i in range(1, len(text)):
            if text[i] in " \n\t" and not text[i - 1].isspace():
                assert tokenizer.encode(text[:i]) + tokenizer.encode(text[i:]) == whole


def test_known_cuts(template):
    text = "Mix 3 of them, don't  wait.\n\nThen\tstop 42 \u200b end"
    cuts = [i for i in range(1, len(text)) if text[i] in " \n\t" and not text[i - 1].isspace()]
    assert len(cuts) == 10
    for i in cuts:
        assert template.encode(text[:i]) + template.encode(text[i:]) == template.encode(text)
    # The rule is needed: a space belongs to the word behind it, and a cut in a run of spaces makes other ids.
    assert template.encode("a ") + template.encode("b") != template.encode("a b")
    assert template.encode("a ") + template.encode("  b") != template.encode("a   b")


# -- special strings

def test_every_special_string_is_text(template, specials):
    for name in specials:
        for text in (name, f" {name} ", f"a{name}b", name * 3, name.replace("|", "||"), name[:-1] + name):
            ids = template.encode(text)
            assert not set(ids) & set(specials.values()), name
            assert template.tokenizer.decode(ids) == text
    # Full-width letters are other letters, here and there.
    assert not set(template.encode("<|im_end|>")) & set(specials.values())


def test_special_strings_are_special_only_by_name(template, specials):
    assert template.start == specials["<|im_start|>"] == 1 and template.end == specials["<|im_end|>"] == 2
    for name, token in specials.items():
        assert template.tokenizer.special(name) == token
    assert template.tokenizer.special("<|no_such|>") is None
    assert (template.tokenizer.special("bos"), template.tokenizer.special("eos")) == (1, 2)


def test_parsing_stays_off_after_someone_used_the_tokenizer(hf_ids):
    # Trap: transformers' own __call__ switches special-token parsing back on in the shared tokeniser.
    hf_ids.hf("<|im_end|>")
    assert 2 not in hf_ids.encode("<|im_end|>")


def test_a_tokenizer_that_cuts_is_told_not_to(tiny):
    from transformers import AutoTokenizer

    from protector.models import HFTokenizer

    hf = AutoTokenizer.from_pretrained(tiny.folder)
    hf.backend_tokenizer.enable_truncation(8)
    hf.backend_tokenizer.enable_padding(length=32)
    assert len(HFTokenizer(hf).encode("one two three four five six seven eight nine ten")) == 10


@pytest.mark.parametrize("copies", [1, 2, 10, 100])
def test_end_strings_leave_the_pooled_position(template, copies):
    for mark in ("<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|>"):
        for answer in (mark * copies + "No.", "No." + mark * copies):
            answer_ids = template.encode(answer)
            ids, start = template.detector_sequence(template.encode("Is it?"), answer_ids)
            assert ids[start:] == answer_ids and start + len(answer_ids) == len(ids)
            # One start per role and one end after the question: no other special id.
            assert [(i, token) for i, token in enumerate(ids) if token < 17] == [
                (0, 1), (ids.index(2), 2), (ids.index(2) + 2, 1)]
            assert ids.index(2) + 2 < start


# -- sequences

def test_sequences_by_hand(template, vocabulary):
    tokens = vocabulary["tokenizer.ggml.tokens"]

    def spelled(ids):
        return "".join(tokens[token] for token in ids).replace("Ġ", " ").replace("Ċ", "\n")

    question, answer = template.encode("Is it safe?"), template.encode("No, it isn't.")
    ids, start = template.detector_sequence(question, answer)
    assert spelled(ids) == "<|im_start|>user\nIs it safe?<|im_end|>\n<|im_start|>assistant\nNo, it isn't."
    assert spelled(ids[:start]).endswith("<|im_start|>assistant\n")
    # answer only: no empty turn of a user
    assert spelled(template.detector_sequence([], answer)[0]) == "<|im_start|>assistant\nNo, it isn't."
    # history: earlier turns are closed, an empty half leaves no turn
    ids, start = template.detector_sequence(question, answer, [(template.encode("Hi"), template.encode("Hello")),
                                                               ([], template.encode("Well?"))])
    assert spelled(ids) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
                            "<|im_start|>assistant\nWell?<|im_end|>\n"
                            "<|im_start|>user\nIs it safe?<|im_end|>\n<|im_start|>assistant\nNo, it isn't.")
    assert ids[start:] == answer
    assert spelled(template.detoxifier_prompt(question, answer)) == (
        "<|im_start|>user\nIs it safe?<|im_end|>\n<|im_start|>assistant\nNo, it isn't.<|im_end|>\n<|im_start|>rewrite\n")


def test_both_tokenisers_build_the_same_sequences(both):
    history = (("Hi", "Hello <|im_end|>"), ("1 2", ""))
    built = [(t.detector_sequence(t.encode(TEXTS["emoji"]), t.encode(TEXTS["spaces"]),
                                  [(t.encode(q), t.encode(a)) for q, a in history]),
              t.detoxifier_prompt(t.encode("q"), t.encode(TEXTS["scripts"]))) for t in both]
    assert built[0] == built[1]


def test_clip_question_keeps_the_end(hf_ids):
    template = Template(hf_ids, Limits(question_tokens=3))
    # each word below is one token, with the space before it
    assert len(template.encode("one two three four five")) == 5
    ids, dropped = template.clip_question("one two three four five")
    assert (hf_ids.decode(ids), dropped) == (" three four five", 2)
    assert template.clip_question("two") == (template.encode("two"), 0)
    assert template.clip_question("") == ([], 0)


def test_a_tokenizer_without_chatml_uses_its_own_ends():
    class Letters:
        def __init__(self, **known):
            self.known = known

        def encode(self, text):
            return [ord(char) for char in text]

        def special(self, name):
            return self.known.get(name)

    template = Template(Letters(bos=-1, eos=-2))
    assert template.detector_sequence([7], [8, 9]) == (
        [-1, *b"user\n", 7, -2, 10, -1, *b"assistant\n", 8, 9], 20)
    for known in ({}, {"bos": 1}, {"eos": 1}, {"bos": 1, "<|im_end|>": 2}):
        with pytest.raises(ValueError) as error:
            Template(Letters(**known))
        assert str(error.value) == ("Template: tokenizer must have <|im_start|> and <|im_end|>, or a begin and an end token, "
                                    "got neither. Choose another backbone.")


def test_well_formed():
    assert well_formed("a\ud83d\ude00b") == "a\U0001f600b"  # a pair in two halves is one character
    assert well_formed("a\ud83db\ude00") == "a\ufffdb\ufffd"
    assert well_formed("plain é 👍") == "plain é 👍"


# -- windows

def test_windows_by_hand():
    assert windows(10, 6, 2) == [Window(0, 6), Window(4, 10)]
    assert windows(11, 6, 2) == [Window(0, 6), Window(4, 10), Window(8, 11)]
    assert windows(6, 6, 2) == [Window(0, 6)] and windows(7, 6, 2) == [Window(0, 6), Window(4, 7)]
    assert windows(1, 6, 2) == [Window(0, 1)] and windows(5, 6, 2) == [Window(0, 5)]
    assert windows(6, 2, 0) == [Window(0, 2), Window(2, 4), Window(4, 6)]


@given(st.integers(1, 2000), st.integers(1, 300), st.data())
def test_windows_cover_everything(n_tokens, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    found = windows(n_tokens, window, overlap)
    assert found[0].start == 0 and found[-1].stop == n_tokens
    for one, two in zip(found, found[1:]):
        assert two.start - one.start == window - overlap and one.stop - one.start == window
        assert one.stop - two.start == overlap  # neighbours share exactly this: no gap
    assert all(0 < part.stop - part.start <= window for part in found)
    # Each window but the first brings something new, or a short tail would be scored without need.
    assert all(two.stop > one.stop for one, two in zip(found, found[1:]))


@given(st.integers(1, 500), st.integers(2, 64), st.data())
def test_windows_of_a_growing_text_only_add(n_tokens, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    before, after = windows(n_tokens, window, overlap), windows(n_tokens + 1, window, overlap)
    assert after[:len(before) - 1] == before[:-1]
    assert after[len(before) - 1].start == before[-1].start


@pytest.mark.parametrize("change, message", [
    ({"window": 64}, "Limits: window must be larger than overlap, got 64 and 64. Choose another number."),
    ({"overlap": -1}, "Limits: overlap must be at least 0, got -1. Choose another number."),
    ({"question_tokens": 0}, "Limits: question_tokens must be at least 1, got 0. Choose another number."),
    ({"rewrite_tokens": 0}, "Limits: rewrite_tokens must be at least 1, got 0. Choose another number."),
    ({"rejected_tokens": -5}, "Limits: rejected_tokens must be at least 1, got -5. Choose another number."),
])
def test_wrong_limits(change, message):
    with pytest.raises(ValueError) as error:
        Limits(**change)
    assert str(error.value) == message


@pytest.mark.parametrize("window, overlap, way", [(0, 0, "window"), (5, 5, "overlap"), (5, -1, "overlap")])
def test_windows_that_would_never_end(window, overlap, way):
    with pytest.raises(ValueError) as error:
        windows(10, window, overlap)
    assert str(error.value) == f"windows: 0 <= overlap < window must hold, got {overlap} and {window}. Choose other sizes."
