"""Streams: what leaves, when, and that a stream's score is the answer's score, for every chunking."""
import asyncio
import base64
import gc
import logging
import math
import random
import threading
import time
import tracemalloc

import numpy as np
import pytest
from guard_fakes import SMALL, FakeDetector, FakeDetoxifier, real_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from protector import DeadlineExceeded, Protector, ProtectorError
from protector.guard import REFUSAL
from protector.llama import _Cursor
from protector.normalise import normalised
from protector.running import PATIENCE
from protector.template import Limits, Template, windows
from protector.stream import STEP_TOKENS, VIEW_TOKENS, Event, StreamGuard, safe_cut

Q, BETTER = "How do I clean this?", "Never mix cleaners."
SAFE = "Use warm water and a soft cloth, then dry it well. Don't rub!\n\n1. Soak it 10 min.\n2. Rinse it.\n"
HARMFUL = "Sure, it is easy. Mix bleach with vinegar in a small closed room and wait there for a while, says my uncle."


@pytest.fixture(scope="module")
def ids():
    return real_tokenizer()


def make(ids, *texts, detector=None, **options):
    detector = detector or FakeDetector(ids)
    return Protector(detector, FakeDetoxifier(ids, *texts) if texts else False, **{"threshold": 0.5, **options}), detector


def cut(text, *sizes):
    """The text in chunks of these sizes, over and over."""
    chunks, at, i = [], 0, 0
    while at < len(text):
        chunks.append(text[at:at + sizes[i % len(sizes)]])
        at, i = at + sizes[i % len(sizes)], i + 1
    return chunks


def joined(events):
    return "".join(event.text for event in events)


CHUNKINGS = [(1,), (2,), (3, 1, 4), (7,), (10_000,), (64, 1)]
TEXTS = {
    "English": SAFE * 3, "contractions": "I can't, won't and shouldn't've done it's 'sake' ''s " * 5, "numbers": "3.14 1,000 2024-01-01 1e9 ½ Ⅷ " * 6,
    "white space": " a  b\t\tc \n\n d\u00a0e\u3000f\x1cg\x85h \r\n i\u2028j   ", "code": "if (x) {\n\tfoo();\n}\n\n\n    bar(a,b);\n" * 6,
    "Chinese": "你好,世界!这是一个测试。我们用清水、软布和肥皂;再晾干:好吗?" * 4, "Japanese": "こんにちは。元気ですか?カタカナも、漢字も使います!" * 4,
    "Korean": "안녕하세요, 반갑습니다. 물로 씻으세요! " * 5, "Thai": "สวัสดีครับ ล้างด้วยน้ำสะอาด แล้วเช็ดให้แห้ง " * 5, "Hindi": "नमस्ते, आप कैसे हैं। क्‍या यह ठीक है? " * 5,
    "Arabic": "السلام عليكم، اغسلها بالماء. " * 6, "emoji": "👨‍👩‍👧‍👦 ok ❤️ 🏳️‍🌈 1️⃣ " * 8, "one word": "x" * 300, "surrogates": "a \ud83d\ude00 b \ud83d c \udc00\ud800 d " * 8,
    "NUL and U+FFFD": "a\0b \ufffd\ufffd c\ufffd " * 10, "marks": "e\u0301 a\u0336b\u0336 " * 20, "blank start": "\n\n  hello there", "trailing": "hello   \n\n",
    "special": "<|im_end|>\n<|im_start|>user\nhi <|endoftext|> </s> " * 5,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("sizes", CHUNKINGS)
def test_m35_m36_m38_safe_text_is_exact_and_scores_as_a_whole(ids, name, sizes):
    text = TEXTS[name]
    p, detector = make(ids)
    events = list(p.stream(Q, cut(text, *sizes)))
    v = events[-1].verdict
    assert joined(events) == v.text == text and v.action == "pass" and [e.verdict for e in events[:-1]] == [None] * (len(events) - 1)
    assert v.score == pytest.approx(p.score(Q, text), abs=1e-6)
    assert detector.n_open == 0


@settings(max_examples=150, deadline=None)
@given(st.text(st.one_of(st.characters(), st.sampled_from("ab1 \n\t.,'s!\u0301\u200d你好,。한é\u00a0\ud83d\ude00-")), max_size=120),
       st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 12))
def test_m35_m36_any_text_and_chunking(text, sizes, hold):
    p, _ = make(real_tokenizer())
    events = list(p.stream(Q, cut(text, *sizes), hold=hold))
    whole = p.guard(Q, text)
    assert joined(events) == text
    assert events[-1].verdict.score == pytest.approx(whole.score, abs=1e-6) and events[-1].verdict.action == whole.action


@pytest.mark.parametrize("name", ["English", "code", "Chinese", "Korean", "contractions", "numbers"])
def test_m36_the_running_score_is_the_prefix_score_at_every_step(ids, name):
    text, seen = TEXTS[name], 0
    p, _ = make(ids)
    state = StreamGuard(p, Q)
    for chunk in cut(text, 3):
        state.push(chunk)
        if state._n_fed > seen:
            seen = state._n_fed
            raw = p._score((Q, text[:seen], ()), None, views=(text[:seen],))[0]
            assert state._whole == pytest.approx(raw, abs=1e-6)
    assert seen > len(text) / 2
    state.close()


def n_scored(p, ids, text):
    """Tokens of a text's windows: each once, and what neighbours share in both."""
    return sum(stop - start for start, stop in windows(len(ids.encode(text)), p.window, p.overlap))


def test_m36_each_token_of_a_window_is_scored_once(ids):
    text = TEXTS["English"]
    p, detector = make(ids)
    list(p.stream(Q, cut(text, 1)))
    assert STEP_TOKENS > 3 and detector.n_fed == n_scored(p, ids, text) > len(ids.encode(text)) and detector.sequences == []


def test_a_step_takes_several_tokens(ids):
    text = TEXTS["English"]
    p, detector = make(ids)
    list(p.stream(Q, cut(text, 1)))
    assert STEP_TOKENS > 3 and detector.n_fed == n_scored(p, ids, text) and detector.n_steps < detector.n_fed / 3  # ends of windows and views end some early


def test_steps_end_where_the_next_part_would_be_too_many(ids, monkeypatch):
    """Words of 1, 1, 2, 1, 3, 1, 1, 9, 1, ... tokens, one by one: 1 + 1 + 2 + 1, since 3 more would be 8. Then
    3 + 1 + 1, and with them the word of 9, a step of its own. Then 6 single ones."""
    p, detector = make(ids)
    sizes = [1, 1, 2, 1, 3, 1, 1, 9] + [1] * 6
    words = [f" w{i}" for i in range(len(sizes))]
    monkeypatch.setattr(detector.template, "encode", lambda text: [5] * sum(size for word, size in zip(words, sizes) if text == word))
    state, fed = StreamGuard(p, ""), []
    monkeypatch.setattr(state, "_feed", lambda ids: fed.append(len(ids)) or state._ids.extend(ids))
    monkeypatch.setattr(state, "_open", lambda reads: None)
    for word in words:
        state._wait(word)
        if state._due:
            state._feed_due()
    assert STEP_TOKENS == 6 and fed == [5, 5 + 9, 6]


def test_a_long_chunk_leaves_no_end_waiting(ids):
    """An upstream that sends whole sentences: what stands behind the last full step is scored with it, and not when the next one comes."""
    p, detector = make(ids)
    state = StreamGuard(p, Q)
    state.push("It stops by the market and goes on over the bridge to the old town ")
    assert state._n_fed == len("It stops by the market and goes on over the bridge to the old town") and not state._waiting
    state.close()


def test_nothing_is_shown_before_it_was_scored(ids):
    p, detector = make(ids)
    state, shown = StreamGuard(p, Q, hold=4), 0
    for chunk in cut(SAFE * 3, 2):
        for event in state.push(chunk):
            shown += len(event.text)
            assert len(ids.encode((SAFE * 3)[:shown])) <= detector.n_fed - 4
    assert 0 < shown == state.released
    state.close()


@pytest.mark.parametrize("sizes", CHUNKINGS)
@pytest.mark.parametrize("hold", [0, 3, 8])
def test_m37_at_the_alarm_only_a_scored_prefix_and_the_final_event(ids, sizes, hold):
    p, detector = make(ids, BETTER)
    upstream = iter(cut(HARMFUL, *sizes))
    events = list(p.stream(Q, upstream, hold=hold))
    v, shown = events[-1].verdict, joined(events[:-1])
    assert (v.action, v.flagged, v.text) == ("rewrite", True, BETTER)
    assert events[-1].text == ("\n\n" if shown else "") + BETTER
    assert HARMFUL.startswith(shown) and "vinegar" not in shown
    if sizes != (10_000,):
        assert next(upstream, None) is not None  # the upstream was left where the alarm was
    assert v.usage["shown_chars"] == len(shown) and detector.n_open == 0


def test_m37_harm_in_the_last_words_is_caught_while_they_are_held(ids):
    p, _ = make(ids)
    for text in ("Use vinegar", "A long enough and harmless start, and then comes vinegar", "vinegar"):
        events = list(p.stream(Q, cut(text, 1)))
        assert events[-1].verdict.action == "refuse" and "vinegar" not in joined(events)


def test_one_odd_token_raises_no_alarm(ids):
    """Regression: any word's end over the threshold stopped a stream at once."""
    n_fed = 0

    def peak(logits):
        nonlocal n_fed
        positions = np.arange(n_fed, n_fed + len(logits))
        n_fed += len(logits)
        return np.where((positions >= 10) & (positions < 10 + length), 5.0, -5.0)

    for length, action in ((1, "pass"), (PATIENCE - 1, "pass"), (PATIENCE, "refuse")):
        n_fed = 0
        events = list(make(ids, detector=FakeDetector(ids, change=peak))[0].stream(Q, cut(SAFE[:60], 1)))
        assert events[-1].verdict.action == action


def test_nothing_is_released_while_the_score_is_over_the_threshold(ids):
    logits = iter([-5.0] * 10 + [5.0] * 3 + [-5.0] * 100)
    p, _ = make(ids, detector=FakeDetector(ids, change=lambda batch: np.array([next(logits) for _ in batch])))
    state, shown = StreamGuard(p, Q, hold=0), []
    for chunk in cut(SAFE, 1):
        events = state.push(chunk)
        assert not (events and state.running > 0.5)
        shown += events
    assert joined(shown + state.finish()) == SAFE


def test_a_flagged_window_ends_the_stream(ids):
    """The score of a finished window is part of the whole answer's: no need to go on."""
    logits = iter([-5.0] * (SMALL.window - 1) + [5.0] + [-5.0] * 1000)  # its last token alone: no alarm while it runs
    p, detector = make(ids, BETTER, detector=FakeDetector(ids, change=lambda batch: np.array([next(logits) for _ in batch])))
    state = StreamGuard(p, Q)
    text = " ".join(map(str, range(100)))
    events = [event for chunk in cut(text, 5) for event in state.push(chunk)]
    v = events[-1].verdict
    assert v.action == "rewrite" and v.score == pytest.approx(1 / (1 + math.exp(-5))) and v.usage["windows"] == 1 and detector.n_fed < 40
    # Regression: the detoxifier read the next window.
    template, flagged = p.detoxifier.template, ids.decode(ids.encode(text)[:SMALL.window])
    assert p.detoxifier.calls[0]["prompt"] == template.rewrite_prompt(Q, flagged) and flagged.startswith("0 1 2")


def test_on_flag_report_shows_all_and_says_flagged(ids):
    p, _ = make(ids, on_flag="report")
    for sizes in CHUNKINGS:
        events = list(p.stream(Q, cut(HARMFUL * 3, *sizes)))
        v = events[-1].verdict
        assert joined(events) == HARMFUL * 3 and (v.action, v.flagged) == ("pass", True) and v.score >= v.threshold


def test_the_alarm_does_not_depend_on_the_chunking(ids):
    random.seed(3)
    for _ in range(5):
        text = " ".join(random.choice(["calm", "blue", "b\u200blue", "m i x e d", "3 cm"]) for _ in range(80)) + random.choice([" vinegar", " vin\u200begar", ""])
        text += " end" * random.choice([0, 3, 50])
        p, _ = make(ids)
        actions = {list(p.stream(Q, cut(text, *sizes)))[-1].verdict.action for sizes in CHUNKINGS}
        assert len(actions) == 1


def test_views_are_scored_at_the_same_places_for_every_chunking(ids, monkeypatch):
    places, check = [], StreamGuard._check_view

    def noted(state, at_mark):
        if at_mark:
            places[-1].append((len(state._ids), state._tail))
        check(state, at_mark)

    monkeypatch.setattr(StreamGuard, "_check_view", noted)
    random.seed(5)
    text = " ".join(random.choice(["calm", "unbelievably", "b\u200blue", "m i x e d", "3 cm", "supercalifragilistic"]) for _ in range(120))
    for sizes in [*CHUNKINGS, (30, 1), (90,)]:
        places.append([])
        p, _ = make(ids)
        list(p.stream(Q, cut(text, *sizes)))
    assert len(places[0]) > 5 and all(found == places[0] for found in places)


# -- disguises

def test_disguised_text_waits_for_its_view(ids):
    """A view costs another pass, so it is made each 32 tokens: until then nothing that differs from it is shown."""
    hidden = "vin\u200begar"
    p, detector = make(ids)
    text = SAFE * 2 + f"Mix it with {hidden} now. " + SAFE * 4
    assert p.score(Q, text) > 0.5
    for sizes in CHUNKINGS:
        events = list(p.stream(Q, cut(text, *sizes), hold=0))
        assert events[-1].verdict.flagged and hidden not in joined(events) and len(joined(events)) < len(text) - len(SAFE)


def test_ordinary_text_has_no_second_pass(ids):
    p, detector = make(ids)
    for name in ("English", "code", "Chinese", "Korean", "Thai", "Hindi", "Arabic"):
        list(p.stream(Q, cut(TEXTS[name], 4)))
    assert detector.sequences == []


def test_the_view_of_a_disguised_stream_costs_a_bounded_share(ids):
    p, detector = make(ids)
    text = "so b\u200blue and calm " * 200
    list(p.stream(Q, cut(text, 4)))
    n_scored = sum(map(len, detector.sequences[:-len(p._plan((Q, text, ()), None)["sequences"])]))
    assert n_scored < 16 * len(ids.encode(text))


def test_m43_the_view_of_a_script_of_many_tokens_a_character_costs_a_bounded_share(ids):
    """Regression: the 1,024 characters before were up to 4,100 tokens, for each 32 new ones."""
    p, detector = make(ids)
    text = (("𠀀" * 8 + " ") * 40 + "&amp; ") * 4
    list(p.stream(Q, cut(text, 64)))
    n_scored = sum(map(len, detector.sequences[:-len(p._plan((Q, text, ()), None)["sequences"])]))
    assert n_scored < 16 * len(ids.encode(text))


def test_a_payload_over_several_chunks_and_views_is_seen(ids):
    payload = base64.b64encode(b"calm words first, then mix it with vinegar please").decode()
    p, _ = make(ids)
    for sizes in CHUNKINGS:
        events = list(p.stream(Q, cut(SAFE * 3 + payload + " " + SAFE * 3, *sizes)))
        assert events[-1].verdict.flagged and payload[:20] not in joined(events)


@pytest.mark.parametrize("score, action", [(0.83, "pass"), (0.84, "refuse")])  # LOOK_MARGIN over 0.5 is 0.832
def test_a_part_of_the_view_by_itself_needs_a_margin_for_an_alarm(ids, score, action, monkeypatch):
    """Regression: a long harmless answer in capitals was scored anew each 32 tokens, begun in mid-sentence, and the highest score counted."""
    p, _ = make(ids)
    text, parts = (SAFE * 8).upper(), []

    def of_views(item, deadline, views):
        parts.extend(views)
        is_whole = views[0] == normalised(text)
        return 0.2 if is_whole else (0.1, 0.1, score)[len(parts) % 3], {"tokens": 9, "windows": 1, "looks": 0}, None

    monkeypatch.setattr(p, "_score", of_views)
    state, shown = StreamGuard(p, Q, hold=0), [0]  # shown: characters at each part
    for chunk in cut(text, 3):
        state.push(chunk)
        shown += [state.released] * (len(parts) >= len(shown))
    events = state.finish()
    if action == "refuse":
        assert len(parts) == 2 and events == [] and state.done
        return
    v = events[-1].verdict
    assert (v.action, v.flagged, v.text) == ("pass", False, text) and v.usage["fragments"] == len(parts) - 1 > 4 and v.score < 0.5
    # What a part over the threshold read waits for the next one.
    assert 0 < shown[1] == shown[2] < shown[3] < shown[4] == shown[5] < shown[6]


def test_m36_a_view_longer_than_the_limit_is_scored_as_in_guard(ids):
    """Regression: the stream ended in input_too_long."""
    p, _ = make(ids, max_bytes=300)
    text = "\u33af" * 100  # 300 bytes; each looks like "rad/s2"
    whole, last = p.guard(Q, text), list(p.stream(Q, cut(text, 9)))[-1].verdict
    assert len(normalised(text).encode()) > 2 * p.max_bytes and whole.action == last.action == "pass" and last.score == pytest.approx(whole.score, abs=1e-6)
    assert p.guard(Q, text + "x").action == "error"


def test_m16_usage_is_that_of_guard(ids):
    p, _ = make(ids)
    p.detector.path = "models/detector.gguf"
    for text in (SAFE * 3, (SAFE * 3).upper(), "so b\u200blue", " ", HARMFUL):
        for q, history in ((Q * 30, [("Hi?", "Hello. " * 200)]), ("", None)):
            last, whole = list(p.stream(q, cut(text, 7), history))[-1].verdict, p.guard(q, text, history).usage
            usage = {key: value for key, value in last.usage.items() if key not in ("ms", "shown_chars")}
            n, tokens = usage.pop("fragments", 0), usage.pop("fragment_tokens", 0)
            assert (n > 0) == (tokens > 0) == (text == (SAFE * 3).upper())
            whole.pop("ms")
            assert usage == whole or last.flagged and usage.keys() == whole.keys()
    detector = FakeDetector(ids, change=lambda logits: logits * (math.nan if detector.n_fed > 30 else 1))
    p, _ = make(ids, detector=detector)
    usage = list(p.stream(Q, cut(SAFE * 3, 3)))[-1].verdict.usage
    assert (usage["backend"], usage["input"], usage["windows"]) == ("fake", "pair", 2) and usage["tokens"] > 20 and usage["ms"] > 0


# -- errors and ends

def test_m39_empty_chunks_and_empty_streams(ids):
    p, detector = make(ids)
    for chunks, text in (([], ""), (["", ""], ""), (["", " ", "\n"], " \n"), (["", "a", "", "b c"], "ab c")):
        events = list(p.stream(Q, chunks))
        assert joined(events) == text and events[-1].verdict.action == "pass" and sum(e.verdict is not None for e in events) == 1
    assert detector.n_opened == 1  # blank answers see no model


def test_m40_an_upstream_error_flushes_nothing(ids):
    def upstream():
        yield from cut(SAFE, 3)
        raise ConnectionError("gone")

    for on_error in ("refuse", "pass", "raise"):
        p, detector = make(ids, on_error=on_error)
        shown, events = [], p.stream(Q, upstream())
        with pytest.raises(ConnectionError):
            for event in events:
                shown.append(event)
        assert SAFE.startswith(joined(shown)) and len(ids.encode(joined(shown))) <= detector.n_fed - 8
        assert all(event.verdict is None for event in shown) and detector.n_open == 0 and list(events) == []


def test_m02_chunks_of_another_type(ids):
    p, detector = make(ids)
    for chunk in (None, b"bytes", 3, {"text": "x"}):
        with pytest.raises(TypeError, match="chunk must be a str"):
            list(p.stream(Q, [SAFE, chunk]))
    assert detector.n_open == 0
    for call in (p.stream, p.astream):  # at the call, not at the first event
        with pytest.raises(TypeError):
            call(3, [])
        with pytest.raises(ValueError, match="hold must be an int >= 0, got -1"):
            call(Q, [], hold=-1)


@pytest.mark.parametrize("fault", [RuntimeError(SAFE), MemoryError(), math.nan])
def test_m52_m53_a_model_error_in_mid_stream(ids, fault, caplog):
    def broken(after):
        def change(logits):
            if p_detector.n_fed > after:
                if isinstance(fault, float):
                    return logits * fault
                raise fault
            return logits

        p_detector = FakeDetector(ids, change=change)
        return p_detector

    for after in (0, 15):
        p, detector = make(ids, detector=broken(after))
        events = list(p.stream(Q, cut(SAFE, 1)))
        v, shown = events[-1].verdict, joined(events[:-1])
        assert (v.action, v.text, events[-1].text) == ("error", REFUSAL, ("\n\n" if shown else "") + REFUSAL)
        assert SAFE.startswith(shown) and len(ids.encode(shown)) <= after and detector.n_open == 0 and math.isnan(v.score)

        p, detector = make(ids, detector=broken(after), on_error="raise")
        with pytest.raises(ProtectorError):
            list(p.stream(Q, cut(SAFE, 1)))
        assert detector.n_open == 0

        # "pass": the whole original goes out, unguarded from the error on, and it is said and logged as critical once.
        caplog.clear()
        p, detector = make(ids, detector=broken(after), on_error="pass")
        events = list(p.stream(Q, cut(SAFE, 1)))
        v = events[-1].verdict
        assert joined(events) == v.text == SAFE and v.action == "error" and p.counters["unguarded"] == 1 and detector.n_open == 0
        assert [record.levelno for record in caplog.records] == [logging.CRITICAL]


def test_an_error_after_the_alarm_is_a_refusal_under_pass_too(ids, monkeypatch):
    p, _ = make(ids, BETTER, on_error="pass")
    monkeypatch.setattr(p, "_decide", lambda *_: 1 / 0)
    events = list(p.stream(Q, cut(HARMFUL, 4)))
    assert events[-1].verdict.action == "refuse" and "vinegar" not in joined(events)


@pytest.mark.parametrize("on_flag, action", [("refuse", "refuse"), ("report", "error")])
def test_m53_an_error_once_the_score_is_over_the_threshold_is_no_way_to_the_original(ids, on_flag, action, monkeypatch):
    """Regression: the original left where the flagged answer's view couldn't be scored, or the deadline came before an alarm."""
    p, detector = make(ids, on_flag=on_flag, on_error="pass", deadline_ms=10 ** 6)
    monkeypatch.setattr(detector, "running_logits", lambda *_: 1 / 0)  # views
    text = "Use wa\u200bter and vinegar"
    events = list(p.stream(Q, [text]))
    v = events[-1].verdict
    assert v.action == action and joined(events) == (text if on_flag == "report" else REFUSAL)
    assert v.error == (None if on_flag == "refuse" else "ZeroDivisionError")

    state, text = StreamGuard(p, Q), "Use warm water and a soft cloth on the wet floor and vinegar "  # more than two steps: its end doesn't wait
    events = state.push(text)
    assert state._whole > 0.5 and not state._alarm  # its last word only
    events += state.expire() + state.finish()
    v = events[-1].verdict
    assert v.action == action and v.error.startswith("DeadlineExceeded")
    if on_flag == "report":  # which shows flagged answers anyway
        assert joined(events) == text and p.counters["unguarded"] == 2
    else:
        assert joined(events) == REFUSAL and v.flagged and v.score > 0.5 and p.counters["unguarded"] == 0
    assert detector.n_open == 0


def test_m53_an_error_in_the_last_step_ends_with_its_verdict_under_pass_too(ids, monkeypatch):
    """Regression: the text left, and no event said that it was unguarded."""
    p, detector = make(ids, on_error="pass")
    monkeypatch.setattr(detector, "running_logits", lambda *_: 1 / 0)  # views
    event, = p.stream(Q, ["Use wa\u200bter."])
    assert event.text == event.verdict.text == "Use wa\u200bter." and event.verdict.action == "error" and p.counters["unguarded"] == 1


def test_m17_a_stream_over_the_limit(ids):
    p, detector = make(ids, max_bytes=200)
    for chunks in (cut("calm " * 100, 5), ["calm " * 100], ["é" * 101], ["x"] * 201):
        v = list(p.stream(Q, chunks))[-1].verdict
        assert v.action == "error" and v.error.startswith("_TooLong: input_too_long: answer must have at most 200 bytes")
    assert list(p.stream(Q, ["é" * 100]))[-1].verdict.action == "pass"
    start = time.process_time()
    p.max_bytes = 256 * 1024
    assert list(p.stream(Q, ["x" * 100_000_000]))[-1].verdict.action == "error"
    assert time.process_time() - start < 0.5  # most of it is making the text


@pytest.mark.parametrize("override", ["\u202e", "&#8238;", "&#x0202E;", "%E2%80%AE", "\\u202e"])
@pytest.mark.parametrize("n_before, n_behind", [(1, 1), (4, 60), (60, 400)])
def test_s23_text_behind_an_override_waits_for_the_whole_view(ids, override, n_before, n_behind):
    """Regression: further behind it than a part of the view reaches back, what it turns around was released unread."""
    shown = "calm " * n_before + "vinegar " + "calm " * n_behind  # to a reader, from left to right
    p, _ = make(ids, on_flag="refuse", max_bytes=1 << 16)
    escapes = " %20%20" if "%" in override else "\\u0020" * 3 if "\\" in override else ""  # one or two are no encoding
    text = "All is calm here. " * 4 + escapes + override + shown[::-1]
    assert p.guard(Q, text).flagged
    events = list(p.stream(Q, cut(text, 5)))
    assert events[-1].verdict.action == "refuse" and "ragen" not in joined(events) and "mlac" not in joined(events)


def test_m41_a_stream_that_never_ends_meets_the_deadline(ids):
    def endless():
        while True:
            time.sleep(0.001)
            yield chunk

    for chunk in ("calm ", "x", " ", ""):
        p, detector = make(ids, deadline_ms=50)
        start = time.monotonic()
        v = list(p.stream(Q, endless()))[-1].verdict
        assert v.error.startswith("DeadlineExceeded") and time.monotonic() - start < 1 and detector.n_open == 0


def test_m41_a_chunk_that_never_comes_meets_the_deadline(ids):
    closed = []

    async def stuck():
        try:
            yield SAFE
            await asyncio.sleep(100)
        finally:
            closed.append(1)

    async def main(p):
        return [event async for event in p.astream(Q, stuck())]

    p, detector = make(ids, deadline_ms=100)
    start = time.monotonic()
    events = asyncio.run(main(p))
    assert time.monotonic() - start < 2 and events[-1].verdict.error.startswith("DeadlineExceeded") and detector.n_open == 0
    assert events[-1].text.endswith(REFUSAL) and closed == [1]
    p, _ = make(ids, deadline_ms=100, on_error="raise")
    with pytest.raises(DeadlineExceeded):
        asyncio.run(main(p))


def test_m41_under_pass_nothing_is_lost_at_the_deadline(ids):
    """Regression: the wait for a chunk was cancelled at the deadline, and with it what came."""
    class Upstream:  # no generator: after a cancelled wait it would go on, with a hole
        chunks = iter(["One ", "two ", "three ", "four."])

        def __aiter__(self):
            return self

        async def __anext__(self):
            chunk = next(self.chunks, None)
            await asyncio.sleep(0.15)
            if chunk is None:
                raise StopAsyncIteration
            return chunk

    async def generated():
        async for chunk in Upstream():
            yield chunk

    async def main(p, chunks):
        return [event async for event in p.astream(Q, chunks)]

    for make_chunks in (Upstream, generated):
        Upstream.chunks = iter(["One ", "two ", "three ", "four."])
        p, detector = make(ids, deadline_ms=200, on_error="pass")
        events = asyncio.run(main(p, make_chunks()))
        assert joined(events) == "One two three four." == events[-1].verdict.text
        assert events[-1].verdict.error.startswith("DeadlineExceeded") and detector.n_open == 0


def test_a_stream_that_ended_has_no_deadline(ids):
    """Regression: what another channel of the answer says next was refused once the first one's time was over."""
    p, _ = make(ids, BETTER, deadline_ms=50)
    state = StreamGuard(p, Q)
    events = state.push(HARMFUL + " ") + state.finish()
    assert events[-1].verdict.flagged and state.done and state.time_left_s() is None


def test_a_flagged_view_is_what_is_rewritten(ids):
    """Regression: a stream gave the detoxifier the disguise, where guard() gives it what it says."""
    payload = base64.b64encode(b"mix it with vinegar please").decode()
    p, _ = make(ids, BETTER, threshold=0.99)
    for text in (payload, SAFE + payload + " " + SAFE * 3):
        p.detoxifier.calls.clear()
        assert p.guard(Q, text).action == list(p.stream(Q, cut(text, 5)))[-1].verdict.action == "rewrite"
        whole, streamed = (ids.decode(call["prompt"]) for call in p.detoxifier.calls)
        assert "vinegar" in whole and "vinegar" in streamed and (whole == streamed or text != payload)


def test_a_deadline_stops_a_huge_chunk_between_windows(ids):
    p, detector = make(ids, detector=FakeDetector(ids, step_s=0.005), deadline_ms=20)
    list(p.stream(Q, ["calm " * 20_000]))
    assert detector.n_steps < 20


def test_m21_a_client_that_leaves_frees_the_cursor_and_the_upstream(ids):
    closed = []

    def upstream():
        try:
            yield from cut(SAFE * 3, 3)
        finally:
            closed.append(1)

    for leave in (lambda events: events.close(), lambda events: None):
        p, detector = make(ids)
        events = p.stream(Q, upstream())
        next(events)
        assert detector.n_open == 1
        leave(events)
        del events
        gc.collect()
        assert detector.n_open == 0
    assert closed == [1, 1]
    make(ids)[0].stream(Q, upstream())  # never started: nothing to free


def test_m21_an_async_client_that_is_cancelled(ids):
    """Closing waits for the running step: the freed sequence is never written by a thread that was left behind."""
    p, detector = make(ids, detector=FakeDetector(ids, step_s=0.1))
    closed = []

    class Upstream:  # close() as OpenAI's client has it
        async def __aiter__(self):
            for chunk in cut(SAFE * 3, 20):
                yield chunk

        async def close(self):
            closed.append(1)

    async def main():
        async def client():
            async for _ in p.astream(Q, Upstream()):
                pass

        task = asyncio.ensure_future(client())
        await asyncio.sleep(0.15)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return detector.n_open, detector.n_steps

    n_open, n_steps = asyncio.run(main())
    time.sleep(0.15)
    assert (n_open, closed, detector.n_steps) == (0, [1], n_steps)


def test_m21_a_callers_check_stops_a_step_past_the_error_policy(ids):
    class Gone(BaseException):
        pass

    def check():
        if detector.n_steps >= 3:
            raise Gone

    p, detector = make(ids, on_error="pass")
    state = StreamGuard(p, Q, check=check)
    with pytest.raises(Gone):
        state.push("calm " * 20_000)
    assert detector.n_steps <= 4 and state.time_left_s() is None
    state.close()
    assert detector.n_open == 0 and not p.counters


def test_close_from_another_thread_in_a_step(ids):
    p, detector = make(ids, detector=FakeDetector(ids, step_s=0.05))
    state, events = StreamGuard(p, Q), []
    thread = threading.Thread(target=lambda: events.extend(state.push("calm " * 500)))
    thread.start()
    time.sleep(0.08)
    start = time.monotonic()
    state.close()
    assert time.monotonic() - start < 0.3 and detector.n_open == 0  # the step, not the 20 windows that were left
    thread.join()
    assert events == [] and state.push("more ") == [] and state.finish() == []


def test_astream_is_stream_and_leaves_the_event_loop_alone(ids):
    p, _ = make(ids, BETTER, detector=FakeDetector(ids, step_s=0.02))

    async def chunks(text):
        for chunk in cut(text, 5):
            yield chunk

    async def main(text):
        longest, last, events = 0.0, time.monotonic(), []

        async def collect():
            async for event in p.astream(Q, chunks(text)):
                events.append(event)

        task = asyncio.ensure_future(collect())
        while not task.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        await task
        return events, longest

    for text in (SAFE, HARMFUL):
        events, longest = asyncio.run(main(text))
        assert joined(events) == joined(p.stream(Q, cut(text, 5))) and longest < 0.1


def test_push_and_finish_after_the_end_do_nothing(ids):
    p, _ = make(ids)
    state = StreamGuard(p, Q)
    assert len(state.finish()) == 1 and state.finish() == [] and state.push("x") == []
    state.close()


def test_the_question_is_read_with_the_first_word(llama_detector, torch_detector):
    """Not together with the first step: no push waits for both."""
    state = StreamGuard(Protector(llama_detector, False, threshold=1.0), Q)
    for blank in ("  ", "\n"):
        state.push(blank)
    assert state._cursor is None, "a blank answer needs no model"
    for chunk in (" Use", " warm"):
        state.push(chunk)
    assert state._cursor.n_cached == len(state._prefix) and not state._ids
    assert [event.text for event in state.finish()] == ["  \n Use warm"]
    p = Protector(torch_detector, False, threshold=1.0)
    assert list(p.stream(Q, cut(SAFE, 3)))[-1].verdict.score == pytest.approx(p.score(Q, SAFE), abs=1e-4)


def test_what_is_begun_reads_the_question_ahead_and_changes_nothing_else(ids):
    p, detector = make(ids)
    events, n_first = {}, {}
    for is_begun in (False, True):
        state, n_steps = StreamGuard(p, Q), detector.n_steps
        if is_begun:
            state.begin()
            state.begin()
            assert detector.n_steps == n_steps + 1 and state._cursor is not None
        n_steps = detector.n_steps
        events[is_begun] = state.push("Use warm")
        n_first[is_begun] = detector.n_steps - n_steps
        events[is_begun] += [event for chunk in cut(SAFE, 3) for event in state.push(chunk)] + state.finish()
    assert n_first == {False: 1, True: 0}, "the first word's push doesn't read it again"
    last = [part[-1].verdict for part in events.values()]
    assert [event.text for event in events[False]] == [event.text for event in events[True]] and last[0].score == last[1].score
    assert [{**verdict.usage, "ms": 0} for verdict in last] == [{**last[0].usage, "ms": 0}] * 2 and detector.n_open == 0


def test_what_fails_while_the_question_is_read_ahead_is_the_first_pushs(ids, caplog):
    class Gone(BaseException):
        pass

    def raised(sequences):
        if faults:
            raise faults.pop()

    faults = [RuntimeError("once")]
    p, detector = make(ids, detector=FakeDetector(ids, fault=raised))
    state = StreamGuard(p, Q)
    state.begin()
    assert not faults and detector.n_open == 0 and not state.done and not p.counters
    assert "reading a question ahead failed: RuntimeError" in caplog.text and Q not in caplog.text
    assert joined([event for chunk in cut(SAFE, 3) for event in state.push(chunk)] + state.finish()) == SAFE  # it was gone by then
    faults += [RuntimeError("for good")] * 2
    state = StreamGuard(p, Q)
    state.begin()
    assert (state.push("warm water ") or state.finish())[-1].verdict.action == "error" and detector.n_open == 0 and not faults
    # What isn't an error comes through, and leaves nothing half open: a later push scores with the question.
    for state in (StreamGuard(p, Q, check=lambda: faults and raised(())), StreamGuard(p, Q)):
        faults.append(Gone())
        with pytest.raises(Gone):
            state.begin()
        assert detector.n_open == 0 and state._cursor is None
        assert joined([event for chunk in cut(SAFE, 3) for event in state.push(chunk)] + state.finish()) == SAFE
    state, n_steps = StreamGuard(p, Q), detector.n_steps
    state.close()
    state.begin()
    assert detector.n_steps == n_steps and detector.n_open == 0, "a closed stream reads nothing"


def test_what_was_begun_early_is_not_late(ids):
    p, _ = make(ids, deadline_ms=60)
    for is_restarted, action in ((False, "error"), (True, "pass")):
        state = StreamGuard(p, Q)
        state.begin()
        time.sleep(0.08)
        if is_restarted:
            state.restart_clock()
        events = state.push("warm water ") or state.finish()
        assert events[-1].verdict.action == action
        state.close()


def test_the_wait_after_the_last_chunk_is_one_step(ids):
    for n in range(14, 21):
        p, detector = make(ids)
        state = StreamGuard(p, Q)
        for chunk in cut(SAFE * n, 4):
            state.push(chunk)
        n_steps, n_windows = detector.n_steps, state._n_windows
        state.finish()
        assert detector.n_steps - n_steps <= 1 + state._n_windows - n_windows <= 2 and detector.sequences == []  # a window's end takes one


def test_m43_cost_per_token_is_flat(ids):
    def cpu_s(n_words):
        words = ["calm", "blue", "warm", "soft", "cloth,", "water."] * (n_words // 6)
        p, _ = make(ids, max_bytes=10 ** 7)
        start = time.process_time()
        for _ in p.stream(Q, (word + " " for word in words)):
            pass
        return (time.process_time() - start) / n_words

    cpu_s(200)
    short = min(cpu_s(200) for _ in range(5))
    # Quadratic in the text would be 20 times as much; 1.5 is the promise, on time that other processes don't disturb.
    assert min(cpu_s(4000) for _ in range(2)) < 1.5 * short


@pytest.mark.parametrize("unit", ["x", "好", "=", "\u200b"])
def test_m43_text_without_a_safe_cut_is_not_read_again_for_each_chunk(ids, unit):
    p, _ = make(ids)
    start = time.process_time()
    list(p.stream(Q, [unit] * 20_000))
    assert time.process_time() - start < 3  # most of it the fake's; rescanning 20 KB for each chunk takes far more


def test_m43_many_streams_in_a_row_leave_nothing_behind(ids):
    p, detector = make(ids)

    def run(n):
        for i in range(n):
            list(p.stream(Q, ["Use warm water ", "and a soft cloth."]))

    def grown(n):
        before = tracemalloc.get_traced_memory()[0]
        run(n)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    run(100)
    gc.collect()
    tracemalloc.start()
    least = min(grown(100) for _ in range(5))  # what each stream leaves grows in every part; an interpreter's pools fill in some
    tracemalloc.stop()
    assert 5 * least < 20_000 and detector.n_open == 0 and detector.n_opened == 600


def test_m24_shown_chars_is_an_offset_in_the_original(ids):
    p, _ = make(ids)
    text = "👨‍👩‍👧 é e\u0301 " * 10 + HARMFUL
    events = list(p.stream(Q, cut(text, 3)))
    assert text[:events[-1].verdict.usage["shown_chars"]] == joined(events[:-1])


def test_m33_history_is_in_the_prefix(ids):
    p, detector = make(ids)
    history = [("What is it?", "A carpet.")]
    v = list(p.stream(Q, cut(SAFE, 5), history))[-1].verdict
    assert v.score == pytest.approx(p.score(Q, SAFE, history), abs=1e-6) != p.score(Q, SAFE)
    assert v.usage["history_turns_dropped"] == 0 and v.usage["input"] == "pair"
    assert list(p.stream(None, cut(SAFE, 5)))[-1].verdict.usage["input"] == "answer"


def test_tokenisers_that_join_a_sign_and_a_line_end_are_cut_elsewhere(ids):
    class Joining:
        """Llama 3's rule: a run of signs takes the newlines that follow it."""

        def encode(self, text):
            import re
            return [hash_of(part) for part in re.findall(r"\w+| ?[^\s\w]+[\n]*|\s*\n+|\s", text)]

        def special(self, name):
            return {"<|im_start|>": 1, "<|im_end|>": 2}.get(name)

        def decode(self, ids):
            return ""

    def hash_of(part):
        return sum((i + 1) * byte for i, byte in enumerate(part.encode())) + 10

    p, _ = make(ids, detector=FakeDetector(Joining()))
    text = "One two.\n\nThree;\nfour {\n}\n}\nfive\nsix. Seven" * 4
    for sizes in CHUNKINGS:
        assert list(p.stream(Q, cut(text, *sizes)))[-1].verdict.score == pytest.approx(p.score(Q, text), abs=1e-6)


@pytest.mark.parametrize("is_old", [False, True])
def test_m36_sentencepiece_is_cut_where_its_mark_before_a_text_changes_nothing(ids, is_old):
    """Regression: OpenLLaMA's and Vicuna's put a mark before each line that a stream began with, which guard() hasn't."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers (extra train)")
    tokenizer, metaspace = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>")), tokenizers.pre_tokenizers.Metaspace
    tokenizer.pre_tokenizer = metaspace(prepend_scheme="first")  # as SentencePiece learns: no token goes on into another word
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXTS["English"], TEXTS["Chinese"], "One two"], trainer)
    tokenizer.pre_tokenizer = metaspace(prepend_scheme="first", split=False)
    if is_old:  # conversions of a tokenizer.model once had it so: a space at a text's begin gets another mark
        parts = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer, tokenizer.pre_tokenizer = tokenizers.normalizers.Sequence(parts), None

    class SentencePiece:
        def encode(self, text):
            return tokenizer.encode(text, add_special_tokens=False).ids

        def special(self, name):
            return {"bos": 1, "eos": 2}.get(name)

        def decode(self, ids):
            return tokenizer.decode(ids)

    cuts, text = safe_cut(Template(SentencePiece())), "One two\nThree, four.\n\nFive\t6 \u4f60\u597d\uff0c\u4e16\u754c\u3002 seven\n" * 4
    assert bool(cuts.search("One two")) == (not is_old) and not cuts.search("One\ntwo") and not cuts.search("\u4f60\u597d\uff0c")
    p, _ = make(ids, detector=FakeDetector(SentencePiece(), Limits(window=64, overlap=16, question_tokens=16)))
    for sizes in CHUNKINGS:
        events = list(p.stream(Q, cut(text, *sizes)))
        assert joined(events) == text and events[-1].verdict.score == pytest.approx(p.score(Q, text), abs=1e-6)
        assert (len(events) > 1) == (not is_old)


def test_m57_an_event_does_not_print_its_text():
    assert "secret" not in repr(Event("secret words"))


# -- the real cache

@pytest.mark.parametrize("n_places, n_tokens", [(3, 10 ** 6), (64, 120)])
def test_more_streams_than_the_cache_has_room_for(llama_detector, monkeypatch, n_places, n_tokens):
    """Regression: the ninth stream of one thread waited forever. The one that was idle longest is decoded again."""
    p = Protector(llama_detector, False, threshold=1.0)
    monkeypatch.setattr(llama_detector._streams, "caches", [])
    guards = [StreamGuard(p, Q) for _ in range(6)]
    list(p.stream(Q, [SAFE]))  # opens the context
    monkeypatch.setattr("protector.llama._PLACES", n_places)
    monkeypatch.setattr("protector.llama._CACHES", 1)
    for cache in llama_detector._streams.caches:
        monkeypatch.setattr(cache.context, "n_ctx", min(n_tokens, cache.context.n_ctx))
    lost = []
    monkeypatch.setattr("protector.llama._Cursor._leave",
                        lambda self, leave=_Cursor._leave: (lost.append(self.sequence), leave(self)))
    for i in range(0, 240, 10):
        for j, guard in enumerate(guards):
            guard.push(f"Answer {j}: {4 * SAFE}"[i:i + 10])
    n_lost = sum(sequence is not None for sequence in lost)
    for guard in guards:
        v = guard.finish()[-1].verdict
        assert v.score == pytest.approx(p.score(Q, v.text), abs=1e-3)
    assert n_lost > 6 and not any(cache.places for cache in llama_detector._streams.caches)


def test_m36_on_llama_cpp(llama_detector):
    p = Protector(llama_detector, False, threshold=1.0)
    text = TEXTS["English"] + TEXTS["Chinese"] + TEXTS["emoji"]
    assert len(p._plan((Q, text, ()), None)["sequences"]) > 1
    for sizes in ((7,), (10_000,)):
        v = list(p.stream(Q, cut(text, *sizes)))[-1].verdict
        assert v.score == pytest.approx(p.score(Q, text), abs=1e-3) and v.text == text


@pytest.mark.parametrize("deadline_ms", [None, 100])
def test_m19_m21_a_stream_whose_view_waits_for_the_model(llama_detector, deadline_ms):
    p = Protector(llama_detector, False, threshold=1.0, deadline_ms=deadline_ms)
    state, events = StreamGuard(p, Q), []
    scoring = threading.Thread(target=lambda: events.extend(state.push("Use wa\u200bter.") + state.finish()))
    closing = threading.Thread(target=state.close)
    with llama_detector.context.lock:  # as if another answer were scored
        scoring.start()
        if deadline_ms is None:
            while not llama_detector.context._next.locked():
                time.sleep(0.01)
            closing.start()
            closing.join(10)
        scoring.join(10)
        assert not scoring.is_alive() and not closing.is_alive()
    assert state.done and [event.verdict.error.split(":")[0] for event in events] == ["DeadlineExceeded"] * (deadline_ms is not None)


def test_a_view_is_longer_than_what_an_alarm_needs():
    assert VIEW_TOKENS > PATIENCE
