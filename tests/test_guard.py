"""The algorithm: what comes back, when it was rewritten, and who answers after an error."""
import asyncio
import base64
import logging
import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from guard_fakes import SMALL, FakeCursor, FakeDetector, FakeDetoxifier, real_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from protector import DeadlineExceeded, ModelError, Protector, ProtectorError, Verdict
from protector.errors import MissingPackage
from protector.guard import REFUSAL, _half_words, _loops, _repeats, _sigmoid
from protector.template import Limits

Q, SAFE, HARMFUL = "How do I clean this?", "Use warm water and a soft cloth.", "Mix bleach and vinegar in a closed room."
BETTER = "Never mix cleaners; open a window."


@pytest.fixture(scope="module")
def ids():
    return real_tokenizer()


def make(ids, *texts, detector=None, fault=None, **options):
    """(Protector with threshold 0.5, its fake detector, its fake detoxifier or None)."""
    detector = detector or FakeDetector(ids, fault=fault)
    detoxifier = FakeDetoxifier(ids, *texts) if texts else None
    return Protector(detector, detoxifier or False, **{"threshold": 0.5, **options}), detector, detoxifier


def raises(error):
    def fault(_):
        raise error

    return fault


# -- the algorithm

def test_m48_a_harmless_answer_comes_back_as_the_same_object(ids):
    p, _, detoxifier = make(ids, BETTER)
    for answer in (SAFE, " \r\n\ttabs\u00a0and\x00NUL  ", "e\u0301 é \ud83d\ude00 \udc00", "{question} %s {{7*7}} $x"):
        v = p.guard(Q, answer)
        assert (v.text is answer, v.action, v.flagged, v.error) == (True, "pass", False, None)
        assert v.score == p.score(Q, answer) < v.threshold
    assert detoxifier.calls == []


def test_a_flagged_answer_is_rewritten_and_the_rewrite_scored(ids):
    p, detector, detoxifier = make(ids, BETTER)
    v = p.guard(Q, HARMFUL)
    assert (v.text, v.action, v.flagged) == (BETTER, "rewrite", True)
    assert v.score == p.score(Q, HARMFUL) > 0.99 and v.rewrite_score == p.score(Q, BETTER) < 0.5
    assert v.usage["rewrite_attempts"] == 1 and v.usage["rewrite_tokens"] == len(ids.encode(BETTER))
    assert detoxifier.calls[0]["prompt"] == detoxifier.template.detoxifier_prompt(ids.encode(Q), ids.encode(HARMFUL))


def test_score_by_hand(ids):
    detector = FakeDetector(ids)
    sequence, _ = detector.template.detector_sequence(ids.encode(Q), ids.encode(SAFE))
    assert Protector(detector, False, threshold=0.5).score(Q, SAFE) == pytest.approx(1 / (1 + math.exp(-detector.last_logit(sequence))), rel=1e-6)


def test_score_of_several_windows_is_the_largest(ids):
    text = " ".join(f"word{i}" for i in range(60))
    p, detector, _ = make(ids)
    n = len(ids.encode(text))
    starts = range(0, n - 8, 16)
    sequences = [detector.template.detector_sequence(ids.encode(Q), ids.encode(text)[s:s + 24])[0] for s in starts]
    assert p.score(Q, text) == pytest.approx(max(_sigmoid(detector.last_logit(s)) for s in sequences), rel=1e-6)
    usage = p.guard(Q, text).usage
    assert (usage["tokens"], usage["windows"], usage["views"]) == (n, len(starts), 1) and "view_tokens" not in usage


def test_usage_counts_the_answer_and_its_view_apart(ids):
    """Regression: a disguised answer of n tokens was said to have more than two n."""
    text = "Use warm wa\u200bter and a soft cl\u200both. " * 5
    p, detector, _ = make(ids)
    usage = p.guard(Q, text).usage
    assert (usage["tokens"], usage["view_tokens"], usage["views"]) == (len(ids.encode(text)), len(ids.encode(text.replace("\u200b", ""))), 2)
    assert usage["windows"] + usage["view_windows"] == len(detector.sequences)
    assert list(p.stream(Q, [text]))[-1].verdict.usage["tokens"] == usage["tokens"]


def test_m44_an_unfit_rewrite_is_tried_again_and_then_refused(ids):
    p, _, detoxifier = make(ids, "Mix vinegar, too.", BETTER)
    assert p.guard(Q, HARMFUL).text == BETTER
    assert [(call["temperature"] > 0, call["seed"]) for call in detoxifier.calls] == [(False, 0), (True, 1)]
    for attempts in (0, 1, 3):
        p, _, detoxifier = make(ids, "Mix vinegar, too.", rewrite_attempts=attempts)
        v = p.guard(Q, HARMFUL)
        assert (v.text, v.action, v.flagged, len(detoxifier.calls)) == (REFUSAL, "refuse", True, attempts)
        assert attempts == 0 or v.rewrite_score > 0.5


def test_m44_a_rewrite_must_score_lower_than_an_answer_must(ids):
    score = make(ids)[0].score(Q, BETTER)
    for threshold, bar, action in ((score * 1.1, 0.75, "refuse"), (score * 1.1, 1.0, "rewrite"), (score / 0.74, 0.75, "rewrite"), (score / 0.76, 0.75, "refuse")):
        v = make(ids, BETTER, threshold=threshold, rewrite_bar=bar)[0].guard(Q, HARMFUL)
        assert (v.action, v.rewrite_score) == (action, score) and v.usage["rewrite_scores"] == [score] * (1 + (action == "refuse"))
    assert make(ids, "", BETTER)[0].guard(Q, HARMFUL).usage["rewrite_scores"] == [None, score]
    for wrong in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match="rewrite_bar"):
            make(ids, rewrite_bar=wrong)


@pytest.mark.parametrize("text", ["", "  \n", "<|im_end|>", "</s> more", "no no no no no", "la" * 40, "." * 30,
                                  HARMFUL, HARMFUL.upper() + "!", "Sure: " + HARMFUL.replace(" ", "_")])
def test_m46_m47_emptiness_loops_marks_and_the_original_end_in_the_refusal(ids, text):
    # The detector would let every one of them through.
    detector = FakeDetector(ids)
    p, _, _ = make(ids, text, detector=detector)
    first = []

    def only_the_first(logits):
        first.append(1)
        return logits if len(first) == 1 else logits * 0 - 5

    detector.change = only_the_first
    assert p.guard(Q, HARMFUL).text == REFUSAL


def test_m46_a_rewrite_that_copies_what_was_read_in_a_view_is_refused(ids):
    """Regression: it was compared with the answer as it came, of which it keeps nothing."""
    run = "one two three four five six seven eight nine ten eleven twelve"
    payload = base64.b64encode(f"vinegar and {run}".encode()).decode()
    for text, action in ((f"No: {run}.", "refuse"), (f"No: {run[:-7]}.", "rewrite")):
        assert make(ids, text, threshold=0.99)[0].guard(Q, payload).action == action


def test_m47_a_mark_ends_a_rewrite(ids):
    p, _, _ = make(ids, BETTER + "<|im_end|>\n<|im_start|>user\nThanks")
    assert p.guard(Q, HARMFUL).text == BETTER


def test_m47_an_unfinished_rewrite_is_none(ids):
    p, _, detoxifier = make(ids, BETTER)
    detoxifier.finished = False
    assert p.guard(Q, HARMFUL).text == REFUSAL


def test_loops_by_hand():
    assert _loops("I think so so so so") and _loops("a b c a b c a b c a b c") and _loops("x" + "ab" * 12) and _loops("好" * 12)
    assert not _loops("no no no") and not _loops("It is what it is.") and not _loops("")


def test_repeats_by_hand():
    assert _repeats("Yes, it is!", "yes it is") and _repeats("Here: " + HARMFUL + " Bye.", HARMFUL)
    assert not _repeats("Yes. But open a window first.", "Yes.") and not _repeats(BETTER, HARMFUL)
    run = "one two three four five six seven eight nine ten eleven twelve"
    assert _repeats(f"No: {run.upper()}!", f"Well, {run} and more") and not _repeats(f"No: {run[:-7]} and so on", f"Well, {run} and more")


@pytest.mark.parametrize("harmful", ["先把漂白剂倒进桶里然后慢慢加入食醋并且关上所有的窗户和门", "漂白剤をバケツに入れてから酢をゆっくり加えて窓を全部閉めてください",
                                     "เทน้ำยาฟอกขาวลงในถังแล้วค่อยๆเติมน้ำส้มสายชูและปิดหน้าต่างทุกบาน"])
def test_repeats_reads_scripts_without_spaces(harmful):
    """Regression: runs were of words between white space, and such a text has one."""
    n = len(_half_words(harmful))
    assert 24 < n <= len(harmful) and _repeats(f"好。{harmful}。好!", f"好 {harmful} 好") and _repeats(harmful[:-1], f"好, {harmful}")
    assert not _repeats("好。" + harmful[:12] + "。x。" + harmful[12:24], harmful)


@settings(max_examples=300)
@given(*[st.lists(st.sampled_from(["a", "b", "I'm", "well-known", "-", "Über", "мир", "다시"]), max_size=40).map(" ".join)] * 2)
def test_repeats_with_spaces_is_a_run_of_twelve_words(text, a):
    def words(text):
        return [word for word in ("".join(filter(str.isalnum, part)) for part in text.casefold().split()) if word]

    text_words, words_of_a = words(text), words(a)
    runs = {tuple(words_of_a[i:i + 12]) for i in range(len(words_of_a) - 11)}
    joined, joined_a = "".join(text_words), "".join(words_of_a)
    expected = joined == joined_a or len(joined_a) > 24 and joined_a in joined or any(tuple(text_words[i:i + 12]) in runs for i in range(len(text_words) - 11))
    assert _repeats(text, a) == expected


def test_m22_the_detoxifier_reads_the_window_that_was_flagged_and_has_its_room(ids):
    long = " ".join(["calm"] * 100) + " with vinegar " + " ".join(["calm"] * 100)
    p, _, detoxifier = make(ids, BETTER)
    v = p.guard(Q * 40, long)
    call = detoxifier.calls[0]
    limits, marks = detoxifier.limits, len(detoxifier.template.detoxifier_prompt([1], [1])) - 2
    assert len(call["prompt"]) <= limits.question_tokens + limits.rejected_tokens + marks
    assert call["max_tokens"] == limits.rewrite_tokens
    assert "vinegar" in ids.decode(call["prompt"])
    assert v.usage["rewrite_dropped_tokens"] == len(ids.encode(long)) - SMALL.window


def test_a_detoxifier_may_have_another_tokeniser(ids):
    class Letters:
        def encode(self, text):
            return [byte + 10 for byte in text.encode()]

        def special(self, name):
            return {"<|im_start|>": 1, "<|im_end|>": 2}.get(name)

    detoxifier = FakeDetoxifier(Letters(), BETTER, limits=Limits(rejected_tokens=256))
    p = Protector(FakeDetector(ids), detoxifier, threshold=0.5)
    assert p.guard(Q, HARMFUL).text == BETTER
    spelled = bytes(token - 10 for token in detoxifier.calls[0]["prompt"] if token >= 10).decode()
    assert Q in spelled and HARMFUL in spelled


def test_on_flag_report_returns_the_answer_flagged(ids):
    p, _, detoxifier = make(ids, BETTER, on_flag="report")
    v = p.guard(Q, HARMFUL)
    assert (v.text, v.action, v.flagged, detoxifier.calls) == (HARMFUL, "pass", True, [])


def test_on_flag_refuse_and_no_detoxifier(ids):
    p, _, detoxifier = make(ids, BETTER, on_flag="refuse", refusal="No.")
    assert p.guard(Q, HARMFUL).text == "No." and detoxifier.calls == []
    assert make(ids)[0].guard(Q, HARMFUL).action == "refuse"


def test_a_threshold_flags_at_it_and_above(ids):
    score = make(ids)[0].score(Q, SAFE)
    assert make(ids, threshold=score)[0].guard(Q, SAFE).flagged
    assert not make(ids, threshold=math.nextafter(score, 1))[0].guard(Q, SAFE).flagged
    assert not make(ids, threshold=0.0)[0].guard(Q, " ").flagged  # nothing to flag


def test_m49_same_answer_same_verdict_alone_and_in_any_batch(ids):
    p, _, _ = make(ids, BETTER)
    pairs = [(Q, SAFE), ("", HARMFUL), (Q, HARMFUL), (None, SAFE * 20), (Q, ""), (Q, SAFE)]
    alone = [p.guard(*pair) for pair in pairs]
    for order in (range(6), (5, 3, 1, 0, 2, 4)):
        for i, v in zip(order, p.guard_batch([pairs[i] for i in order])):
            assert (v.text, v.action, v.score, v.rewrite_score) == (alone[i].text, alone[i].action, alone[i].score, alone[i].rewrite_score)


# -- errors

def test_m52_m53_every_error_goes_to_the_policy(ids, caplog):
    for fault in (raises(MemoryError()), raises(RuntimeError(HARMFUL)), raises(ModelError("lost")), raises(UnicodeError(HARMFUL))):
        v = make(ids, BETTER, fault=fault)[0].guard(Q, HARMFUL)
        assert (v.text, v.action, v.flagged, math.isnan(v.score)) == (REFUSAL, "error", False, True)
        with pytest.raises(ProtectorError):
            make(ids, fault=fault, on_error="raise")[0].guard(Q, HARMFUL)
        with pytest.raises(ProtectorError):
            make(ids, fault=fault)[0].score(Q, HARMFUL)
        caplog.clear()
        p, _, _ = make(ids, fault=fault, on_error="pass")
        v = p.guard(Q, HARMFUL)
        assert (v.text, v.action, v.flagged) == (HARMFUL, "error", False)
        assert [record.levelno for record in caplog.records] == [logging.CRITICAL] and p.counters["unguarded"] == 1
        assert HARMFUL not in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_m02_m52_a_logit_that_is_no_number_is_an_error_and_never_a_pass(ids, value):
    """Regression: sigmoid(NaN) was 0.0, a harmless score."""
    for answer in (SAFE, SAFE * 10):
        detector = FakeDetector(ids, change=lambda logits: np.where(np.arange(len(logits)) == len(logits) - 1, value, logits))
        p, _, _ = make(ids, BETTER, detector=detector)
        v = p.guard(Q, answer)
        assert (v.text, v.action, math.isnan(v.score)) == (REFUSAL, "error", True)
        assert v.error.startswith("ModelError: guard: score must be a number, got a logit of ")
        assert p.guard_batch([(Q, answer)])[0].action == "error"
        with pytest.raises(ModelError):
            p.score(Q, answer)


def test_a_detector_that_returns_too_few_scores_is_an_error(ids):
    p, _, _ = make(ids, detector=FakeDetector(ids, change=lambda logits: logits[:-1]))
    assert p.guard(Q, SAFE * 10).action == "error" and p.guard_batch([(Q, SAFE)])[0].action == "error"


def test_an_error_after_the_flag_never_brings_the_original_back(ids):
    for on_error in ("refuse", "pass"):
        p, _, detoxifier = make(ids, BETTER, on_error=on_error)
        detoxifier.fault = raises(RuntimeError("out of memory"))
        v = p.guard(Q, HARMFUL)
        assert (v.text, v.action, v.flagged, v.error) == (REFUSAL, "refuse", True, "RuntimeError")
    p, detector, _ = make(ids, BETTER, on_error="pass")
    detector.fault = lambda _: len(detector.sequences) < 1 or raises(MemoryError())(_)  # scoring the rewrite fails
    assert p.guard(Q, HARMFUL).text == REFUSAL
    p, _, detoxifier = make(ids, BETTER, on_error="raise")
    detoxifier.fault = raises(RuntimeError(HARMFUL))
    with pytest.raises(ProtectorError, match="got RuntimeError from the model"):
        p.guard(Q, HARMFUL)


def test_m02_wrong_types_are_type_errors(ids):
    p, _, _ = make(ids)
    for q, a in ((Q, None), (Q, b"yes"), (Q, 3), (Q, [SAFE]), (b"q", SAFE), (3, SAFE), (["q"], SAFE)):
        for call in (p.guard, p.score):
            with pytest.raises(TypeError, match="must be a str"):
                call(q, a)
        assert p.guard_batch([(q, a)])[0].action == "error"
    for history in ([SAFE], [(Q,)], [(Q, None)], [(Q, SAFE, SAFE)]):
        with pytest.raises(TypeError, match="history must be a list of"):
            p.guard(Q, SAFE, history)


def test_one_bad_item_never_fails_the_batch(ids):
    p, detector, _ = make(ids, BETTER)
    bad = [(Q, None), (Q,), None, 7, "qa", {"question": 1, "answer": 2}, (Q, SAFE, SAFE), (Q, "x" * 300_000)]
    pairs = [(Q, SAFE)] + [item for item in bad for item in (item, (Q, HARMFUL))]
    actions = ["pass"] + ["error", "rewrite"] * len(bad)
    assert [v.action for v in p.guard_batch(pairs)] == actions
    # One sequence that breaks its batch: the rest is scored one by one. Regression: a bad item beside it was a TypeError.
    boom = ids.encode(" boom")[0]
    detector.fault = lambda sequences: raises(MemoryError())(0) if any(boom in sequence for sequence in sequences) else None
    assert [v.action for v in p.guard_batch([(Q, SAFE), (Q, "a boom"), None, (Q, HARMFUL)])] == ["pass", "error", "error", "rewrite"]
    assert p.guard_batch([]) == [] and p.guard_batch(iter([(Q, SAFE)]))[0].action == "pass"


def test_m19_a_deadline_is_each_items_own_in_a_batch(ids):
    """Regression: the clock ran from the batch's start, so the last of many answers failed, however short it was."""
    p, _, _ = make(ids, detector=FakeDetector(ids, step_s=0.02), deadline_ms=100)
    verdicts = p.guard_batch([(Q, SAFE)] * 10 + [(Q, SAFE * 40), (Q, SAFE), (Q, None)])
    assert [v.action for v in verdicts] == ["pass"] * 10 + ["error", "pass", "error"]
    assert verdicts[10].error.startswith("DeadlineExceeded") and 100 <= verdicts[10].usage["ms"] < 200


def test_the_time_of_an_item_in_a_batch_is_its_own(ids):
    """20 ms a sequence: an answer of three windows takes three shares of the scoring, and a rewrite is no one else's time."""
    p, _, detoxifier = make(ids, BETTER, detector=FakeDetector(ids, step_s=0.02))
    detoxifier.fault = lambda _: time.sleep(0.3)
    long = "calm " * 50
    start = time.monotonic()
    first, longer, rewritten, last = p.guard_batch([(Q, SAFE), (Q, long), (Q, HARMFUL), (Q, SAFE)])
    took_ms = (time.monotonic() - start) * 1e3
    assert longer.usage["windows"] == 3 and longer.usage["ms"] > 2 * first.usage["ms"]
    assert rewritten.usage["ms"] > 300 and last.usage["ms"] < 100
    assert sum(v.usage["ms"] for v in (first, longer, rewritten, last)) <= took_ms + 1


def test_m19_the_deadline_is_checked_between_steps(ids):
    p, detector, _ = make(ids, detector=FakeDetector(ids, step_s=0.02), deadline_ms=1)
    start = time.monotonic()
    v = p.guard(Q, SAFE * 60)
    assert time.monotonic() - start < 0.2 and len(detector.sequences) <= 2 and v.action == "error"
    assert v.error.startswith("DeadlineExceeded: guard: work must be done within 1 ms")
    p, _, detoxifier = make(ids, "Mix vinegar.", deadline_ms=200, rewrite_attempts=10 ** 9)
    v = p.guard(Q, HARMFUL)  # in a rewrite: flagged already
    assert (v.text, v.action, v.error.split(":")[0]) == (REFUSAL, "refuse", "DeadlineExceeded")
    p, _, _ = make(ids, detector=FakeDetector(ids, step_s=0.02), deadline_ms=1, on_error="raise")
    with pytest.raises(DeadlineExceeded):
        p.guard(Q, SAFE * 60)


def test_m19_aguard_leaves_the_event_loop_alone(ids):
    p, _, _ = make(ids, detector=FakeDetector(ids, step_s=0.3))

    async def main():
        longest, last, task = 0.0, time.monotonic(), asyncio.ensure_future(p.aguard(Q, SAFE))
        while not task.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        return longest, task.result()

    longest, v = asyncio.run(main())
    assert longest < 0.1 and v.text == SAFE


def test_m56_threads_get_their_own_verdicts(ids):
    p, _, _ = make(ids, BETTER)
    wrong = []

    def work(i):
        for j in range(20):
            answer = f"{SAFE} {i} {j}" if (i + j) % 2 else f"{HARMFUL} {i} {j}"
            v = p.guard(Q, answer)
            if v.text != (answer if (i + j) % 2 else BETTER):
                wrong.append((i, j))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == [] and p.counters["pass"] == p.counters["rewrite"] == 80


@pytest.mark.parametrize("n_missing", [1, 100])
def test_m02_a_backend_that_leaves_out_logits_lets_nothing_through(ids, n_missing, monkeypatch):
    """Regression: numbers of sequences were compared, not of tokens, and a stream compared nothing: what had none passed with 0.0."""
    whole, fed, long = FakeDetector.running_logits, FakeCursor.feed, SAFE * 8
    monkeypatch.setattr(FakeDetector, "running_logits", lambda *args: [part[:-n_missing] for part in whole(*args)])
    monkeypatch.setattr(FakeCursor, "feed", lambda *args: fed(*args)[:-n_missing])
    p = make(ids)[0]
    for v in (p.guard(Q, long), *p.guard_batch([(Q, long)]), list(p.stream(Q, [long]))[-1].verdict):
        assert v.action == "error" and v.error.startswith("ModelError")


def test_m02_words_without_tokens_are_an_error(ids, monkeypatch):
    p = make(ids)[0]
    encode = p.detector.template.encode
    monkeypatch.setattr(p.detector.template, "encode", lambda text: [] if "soap" in text else encode(text))
    for v in (p.guard(Q, "soap"), list(p.stream(Q, ["soap"]))[-1].verdict):
        assert v.action == "error" and v.error.startswith("ModelError")


@pytest.mark.parametrize("path", ["/srv/own/detector.gguf", Path("/srv/own/detector.gguf")])
def test_usage_names_the_file_and_not_where_it_lies(ids, path):
    p, detector, _ = make(ids)
    detector.path = path
    assert p.guard(Q, SAFE).usage["model"] == list(p.stream(Q, [SAFE]))[-1].verdict.usage["model"] == "detector.gguf"


# -- options and results

@pytest.mark.parametrize("options, message", [
    ({"threshold": 1.5}, "Protector: threshold must be between 0 and 1, got 1.5."),
    ({"threshold": math.nan}, "Protector: threshold must be between 0 and 1, got nan."),
    ({"threshold": 0.5, "fpr": 0.01}, "Protector: threshold and fpr must not both be given. Give one."),
    ({"on_flag": "show"}, "Protector: on_flag must be one of rewrite, refuse, report, got 'show'."),
    ({"on_error": "ignore"}, "Protector: on_error must be one of refuse, raise, pass, got 'ignore'."),
    ({"backend": "onnx"}, "Protector: backend must be one of auto, llama.cpp, torch, got 'onnx'."),
    ({"refusal": " "}, "Protector: refusal must be a sentence, got nothing."),
    ({"deadline_ms": 0}, "Protector: rewrite_attempts must be >= 0, max_bytes >= 1 and deadline_ms > 0, got 2, 262144 and 0."),
    ({"deadline_ms": math.nan}, "Protector: rewrite_attempts must be >= 0, max_bytes >= 1 and deadline_ms > 0, got 2, 262144 and nan."),
    ({"max_bytes": math.nan}, "Protector: rewrite_attempts must be >= 0, max_bytes >= 1 and deadline_ms > 0, got 2, nan and None."),
    ({"window": 0}, "Protector: overlap < window <= 24 must hold, got 8 and 0."),
    ({"window": 25}, "Protector: overlap < window <= 24 must hold, got 8 and 25."),
    ({"window": 8}, "Protector: overlap < window <= 24 must hold, got 8 and 8."),
])
def test_wrong_options(ids, options, message):
    with pytest.raises(ValueError) as error:
        make(ids, **({"threshold": None} | options))
    assert str(error.value) == message


def test_m50_a_missing_model_is_an_error_at_construction(tmp_path):
    with pytest.raises(ModelError):
        Protector(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="with backend llama.cpp the model must be a GGUF file"):
        Protector(tmp_path, backend="llama.cpp")


def test_a_package_that_only_rewrites_need_is_missed_at_the_first_flag(ids, monkeypatch):
    """Regression: a detector of another backend didn't start without llama.cpp, though only the shipped detoxifier's options were to be read."""
    monkeypatch.setattr(sys.modules["protector.guard"], "_loading", lambda *_: (_ for _ in ()).throw(ModuleNotFoundError("No module", name="llama_cpp")))
    p = Protector(FakeDetector(ids), threshold=0.5, detoxifier_options={"n_threads": None})
    assert p.guard(Q, SAFE).action == "pass" and p.guard(Q, HARMFUL).action == "refuse"


@pytest.mark.parametrize("source", ["none", None])  # the shipped one loads at the first flag; its options are read before
@pytest.mark.parametrize("backend, known", [("torch", "device, dtype, n_threads"), ("llama.cpp", "base, quantisation, n_threads, n_gpu_layers")])
def test_unknown_options_of_a_backend_are_an_error(tmp_path, ids, backend, known, source):
    """Regression: PyTorch's loader was never given them."""
    pytest.importorskip("torch", reason="the PyTorch backend needs torch")
    with pytest.raises(ValueError) as error:
        Protector(FakeDetector(ids), source and tmp_path / source, backend=backend, threshold=0.5, detoxifier_options={"n_thread": 1, "n_threads": None})
    assert str(error.value) == (f"Protector: detoxifier_options of {'PyTorch' if backend == 'torch' else backend} must be of {known}, got n_thread. "
                                "Leave out the others.")


@pytest.mark.parametrize("package, source", [("torch", "folder"), ("llama_cpp", "none.gguf")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, source):
    (tmp_path / "folder").mkdir()
    for module in [name for name in sys.modules if name in ("protector.models", "protector.llama", "protector.engine")]:
        monkeypatch.delitem(sys.modules, module)
        monkeypatch.delattr(module)
    monkeypatch.setitem(sys.modules, package, None)  # its import fails
    with pytest.raises(MissingPackage, match=f"^Protector: {package} must be installed to load {tmp_path / source}, got none\\. Run: pip install"):
        Protector(tmp_path / source)


def test_a_verdict_has_no_truth_value(ids):
    v = make(ids)[0].guard(Q, SAFE)
    with pytest.raises(TypeError, match="Use v.flagged"):
        bool(v)
    assert isinstance(v, Verdict)


def test_m04_without_a_question_usage_and_threshold_are_those_of_answers(ids):
    p, detector, _ = make(ids)
    p.thresholds = {"pair": 0.9, "answer": 0.4}
    for q, kind, threshold in (("", "answer", 0.4), (None, "answer", 0.4), (Q, "pair", 0.9)):
        v = p.guard(q, SAFE)
        assert (v.usage["input"], v.threshold) == (kind, threshold)
    assert detector.sequences[0] == detector.template.prefix(()) + ids.encode(SAFE)


def test_long_questions_keep_their_end_and_say_so(ids):
    p, detector, _ = make(ids)
    question = " ".join(str(i) for i in range(20_000))
    usage = p.guard(question, SAFE).usage
    kept = question[-64 * 16:]
    assert usage["question_tokens_dropped"] == len(ids.encode(kept)) - 16 and usage["question_chars_dropped"] == len(question) - len(kept)
    assert question[-8:] in ids.decode(detector.sequences[-1])


def test_m33_history_drops_its_oldest_turns_visibly_and_the_answer_never(ids):
    p, detector, _ = make(ids, on_flag="report")
    turns = [(f"question {i} please", f"answer {i} " + "and so on " * 15) for i in range(50)]
    v = p.guard(Q, SAFE, turns)
    seen = ids.decode(detector.sequences[-1])
    assert seen.endswith(SAFE) and Q in seen and "answer 49" in seen and "answer 10 " not in seen
    n_kept = sum(f"question {i} please" in seen for i in range(50))
    assert v.usage["history_turns_dropped"] == 50 - n_kept > 0 and v.usage["history_tokens_dropped"] == 0
    assert p.guard(Q, SAFE, turns[:2]).usage["history_turns_dropped"] == 0
    # The latest turn is never dropped whole: its end is what the answer goes on from.
    v = p.guard(Q, SAFE, [("q " * 300, "a " * 3000 + "the end of it")])
    seen = ids.decode(detector.sequences[-1])
    assert "the end of it" in seen and v.usage["history_turns_dropped"] == 0 and v.usage["history_tokens_dropped"] > 1000
    # Roles and ends take room, too: many short turns don't outgrow the model's context.
    for turns in ([("a", "b")] * 5000, [("", "")] * 5000, [("x" * 10 ** 6, "y" * 10 ** 6)] * 3):
        p.guard(Q, SAFE, turns)
        assert len(detector.sequences[-1]) <= SMALL.question_tokens + SMALL.window + 256 + 64


def test_the_counters_count_actions(ids):
    p, _, _ = make(ids, BETTER)
    p.guard(Q, SAFE), p.guard(Q, HARMFUL), p.guard_batch([(Q, SAFE), (Q, None)])
    assert p.counters == {"pass": 2, "rewrite": 1, "error": 1}


def test_the_shipped_detoxifier_loads_at_the_first_flag(ids, monkeypatch):
    loaded, p = [], Protector(FakeDetector(ids), threshold=0.5)
    monkeypatch.setattr(sys.modules["protector.guard"], "_loaded", lambda *_: loaded.append(1) or FakeDetoxifier(ids, BETTER))
    p.guard(Q, SAFE)
    assert loaded == []
    p.guard(Q, HARMFUL), p.guard(Q, HARMFUL)
    assert loaded == [1]


# -- wrap

def test_wrap_guards_every_kind_of_callable(ids):
    p, _, _ = make(ids, BETTER)
    words = HARMFUL.split(" ")

    def text(q, end=""):
        return HARMFUL + end

    def chunks(q, end=""):
        yield from (word + " " for word in words)
        yield end

    async def coroutine(q, end=""):
        return HARMFUL + end

    async def async_chunks(q, end=""):
        for word in words:
            yield word + " "

    async def coroutine_of_chunks(q, end=""):
        return async_chunks(q)

    class Model:
        def __call__(self, q, end=""):
            return coroutine(q, end)

    async def joined(result):
        result = await result if hasattr(result, "__await__") else result
        return result if isinstance(result, str) else "".join([text async for text in result])

    assert p.wrap(text)(Q, end=" Now.") == BETTER
    assert "vinegar" not in "".join(p.wrap(chunks)(Q, end="x")) and "".join(p.wrap(chunks)(Q)).endswith(BETTER)
    assert "".join(p.wrap(lambda q: [SAFE[:7], SAFE[7:]])(Q)) == SAFE
    assert asyncio.run(joined(p.wrap(coroutine)(Q, end="!"))) == BETTER
    assert asyncio.run(joined(p.wrap(Model())(Q))) == BETTER  # not a coroutine function by its look
    for mllm in (async_chunks, coroutine_of_chunks, lambda q: async_chunks(q)):
        shown = asyncio.run(joined(p.wrap(mllm)(Q)))
        assert shown.endswith(BETTER) and "vinegar" not in shown


def test_wrap_lets_no_other_type_through(ids):
    p, _, _ = make(ids)
    for result in (None, b"bytes", {"text": HARMFUL}, 3):
        with pytest.raises(TypeError):
            p.wrap(lambda q: result)(Q)
    with pytest.raises(TypeError):
        list(p.wrap(lambda q: [b"bytes"])(Q))


def test_m21_closing_a_wrapped_stream_closes_the_model(ids):
    p, detector, _ = make(ids)
    closed = []

    async def mllm(q):
        try:
            while True:
                yield "more and more words "
        finally:
            closed.append(1)

    async def main():
        shown = p.wrap(mllm)(Q)
        async for _ in shown:
            break
        await shown.aclose()
        return list(closed), detector.n_open

    assert asyncio.run(main()) == ([1], 0)
