"""llama.cpp against PyTorch: one score, one rewrite, whatever the batch, the stream or the thread; and files that must not load."""
import multiprocessing
import random
import re
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import BLOCKS, D, MILD_PAIRS, canaries_of, sequences_of, shake
from guard_fakes import FakeDetoxifier
from test_gguf import resigned, rewrite

from protector import Protector, canaries, gguf, llama
from protector.errors import DeadlineExceeded, ModelError
from protector.gguf import export_adapter, export_merged, read_metadata
from protector.llama import LlamaDetector, LlamaDetoxifier
from protector.models import ModelConfig, build
from protector.template import Limits, windows

# llama.cpp keeps keys and values in float16, 2^-12 relative on average. The random weights make attention logits of up to 8:
# 2e-3 in an attention weight, through up to 4 blocks 5e-3 of a logit near 1. Wrong by a permutation, a target or a norm is
# wrong by 0.05 and more: see the planted faults below.
F16_CACHE = 5e-3


@pytest.fixture(scope="module")
def sequences(torch_detector):
    rng = random.Random(6)
    return sequences_of(torch_detector, MILD_PAIRS) + [[rng.randrange(17, 49152) for _ in range(n)] for n in (1, 2, 33, 300, 511, 512, 700)]


@pytest.fixture(scope="module")
def expected(torch_detector, sequences):
    return torch_detector.logits(sequences)


@pytest.fixture(scope="module", params=["base", "F32"])  # the adapter at run time, and merged
def detoxifier(request, detoxifier_gguf, tiny):
    model = LlamaDetoxifier(detoxifier_gguf, base=tiny.gguf, quantisation=request.param, n_threads=1)
    assert hasattr(model.context, "adapter") == (request.param == "base")
    return model


# -- the same score as PyTorch

# Weights of the base in float16: 2^-11 in each of 64 products, some 1e-3. Q8_0: half a step of 1/127 of a block's largest weight,
# 0.4 % of it or 1 % of a typical one; 28 matrices add up to some 5 % of hidden states near 1. Q4_0 is 16 times coarser.
@pytest.mark.parametrize("quantisation, tolerance", [("F32", F16_CACHE), ("F16", 2 * F16_CACHE), ("Q8_0", 0.1), ("base", F16_CACHE)])
def test_m63_an_adapter_scores_as_pytorch(detector_gguf, tiny, sequences, expected, quantisation, tolerance):
    detector = LlamaDetector(detector_gguf, base=tiny.gguf, quantisation=quantisation, n_threads=1)
    assert np.abs(detector.logits(sequences) - expected).max() < tolerance
    assert detector.quantisation == quantisation and detector.name == "llama.cpp"
    # Without its adapter the base says something else: the test would see it missing.
    assert np.abs(expected).max() > 0.2


def test_each_target_of_the_adapter_counts(torch_detector, llama_detector, sequences, expected):
    # Planted fault: one target's B set to zero moves the scores by far more than the tolerance above.
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        values = [value for key, value in torch_detector.trained().items() if f".{name}.lora_B" in key]
        kept = [value.detach().clone() for value in values]
        with torch.no_grad():
            try:
                for value in values:
                    value.zero_()
                moved = np.abs(torch_detector.logits(sequences) - expected).max()
            finally:
                for value, before in zip(values, kept):
                    value.copy_(before)
        assert moved > 10 * F16_CACHE, name


@pytest.mark.parametrize("depth", [1, 3])
def test_a_cut_detector_scores_as_pytorch(tiny, tmp_path, sequences, depth):
    model = shake(build(ModelConfig("detector", tiny.folder, depth=depth, rank=4)))
    export_adapter(model, tmp_path / "d.gguf", tiny.gguf, canaries_of(model))
    detector = LlamaDetector(tmp_path / "d.gguf", base=tiny.gguf, quantisation="base", n_threads=1)
    assert np.abs(detector.logits(sequences) - model.logits(sequences)).max() < F16_CACHE
    assert detector.metadata.depth == depth


@pytest.mark.parametrize("quantisation, tolerance", [("F16", 2 * F16_CACHE), ("BF16", 0.1), ("Q8_0", 0.1), ("Q4_0", 1.2)])
def test_m63_a_merged_detector_scores_as_pytorch(torch_detector, tiny, tmp_path, sequences, expected, quantisation, tolerance):
    path = tmp_path / "merged.gguf"
    export_merged(torch_detector, path, quantisation, tiny.gguf, canaries_of(torch_detector))
    detector = LlamaDetector(path, n_threads=1, check=quantisation != "Q4_0")  # random weights have no margin for 4 bits
    assert np.abs(detector.logits(sequences) - expected).max() < tolerance
    assert detector.quantisation == quantisation and detector.metadata.merged


def test_an_array_that_lies_beside_a_whole_model_is_not_its_embedding(torch_detector, tiny, tmp_path, sequences, expected):
    export_merged(torch_detector, tmp_path / "merged.gguf", "F16", tiny.gguf, canaries_of(torch_detector))
    np.save(tmp_path / "merged.npy", np.zeros((3, 3)))
    detector = LlamaDetector(tmp_path / "merged.gguf", n_threads=1)
    assert np.abs(detector.logits(sequences) - expected).max() < 2 * F16_CACHE


def test_a_fully_tuned_detector_scores_as_pytorch(tiny, tmp_path, sequences):
    model = shake(build(ModelConfig("detector", tiny.folder, depth=3, rank=0)))
    export_merged(model, tmp_path / "full.gguf", "F16", tiny.gguf, canaries_of(model))
    detector = LlamaDetector(tmp_path / "full.gguf", n_threads=1)
    assert np.abs(detector.logits(sequences) - model.logits(sequences)).max() < 2 * F16_CACHE


# -- batches

def test_m49_a_score_does_not_depend_on_its_batch(llama_detector, sequences):
    alone = np.array([llama_detector.logits([ids])[0] for ids in sequences])
    rng = random.Random(1)
    for _ in range(4):
        order = [rng.randrange(len(sequences)) for _ in range(24)]  # more than one decode holds, in tokens and in sequences
        assert np.abs(llama_detector.logits([sequences[i] for i in order]) - alone[order]).max() < 1e-3
    short = [sequences[i % 4] for i in range(50)]
    assert np.abs(llama_detector.logits(short) - alone[[i % 4 for i in range(50)]]).max() < 1e-3
    assert np.array_equal(llama_detector.logits(sequences), llama_detector.logits(sequences))
    assert llama_detector.logits([]).shape == (0,)


def test_m16_nothing_is_cut(llama_detector, torch_detector):
    # 100,000 tokens: the windows hold each of them, and the last one's score is its own, not that of a cut text.
    rng = random.Random(2)
    text = " ".join(rng.choice(("rinse", "bleach", "vinegar", "open", "window", "never", "apart")) for _ in range(100_000))
    template = llama_detector.template
    ids = template.encode(text)
    assert len(ids) >= 100_000 and template.tokenizer.decode(ids) == text
    spans = windows(len(ids), template.limits.window, template.limits.overlap)
    assert spans[-1].stop == len(ids) and len(spans) == 521
    last = [template.detector_sequence([], ids[span.start:span.stop])[0] for span in spans[-3:]]
    assert np.abs(llama_detector.logits(last) - torch_detector.logits(last)).max() < F16_CACHE
    assert template.encode(text) == torch_detector.template.encode(text)


def test_a_sequence_longer_than_a_batch(llama_detector, torch_detector):
    # 512 tokens a decode: lengths around its multiples, and the tokens before the last 512 must count.
    rng = random.Random(3)
    ids = [rng.randrange(17, 49152) for _ in range(1024)]
    long = [ids[:n] for n in (63, 64, 65, 511, 512, 513, 1023, 1024)]
    got = llama_detector.logits(long)
    assert np.abs(got - torch_detector.logits(long)).max() < F16_CACHE
    other = llama_detector.logits([[900] * 400 + ids[400:]])[0]
    assert abs(other - got[-1]) > F16_CACHE


def test_whole_answers_fill_a_tile(llama_detector, monkeypatch):
    # Below 64 tokens llama.cpp's flash attention sums in float16: short groups are padded, and long ones cut evenly.
    sizes, decode = [], llama_detector.context.decode
    monkeypatch.setattr(llama_detector.context, "decode", lambda entries: (sizes.append(len(entries)), decode(entries))[1])
    llama_detector.logits([[900]])
    llama_detector.logits([[900] * 60])
    llama_detector.logits([[900] * 20] * 4)
    llama_detector.logits([[900] * 513])
    assert sizes == [64, 64, 80, 256, 257]
    assert llama_detector.context.n_ctx >= -(-llama_detector.longest // 512) * 512  # the longest group of two batches fits


def test_too_long_is_an_error(llama_detector):
    with pytest.raises(RuntimeError, match=r"^decode: llama.cpp must decode \d+ tokens, got status \d+\."):
        llama_detector.logits([[900] * (llama_detector.context.n_ctx + 1000)])
    # and the next one is scored as ever
    assert np.isfinite(llama_detector.logits([[5, 6, 7]])).all()


def test_deadline_is_asked_before_each_decode(llama_detector):
    calls = []
    llama_detector.logits([[900] * 400] * 3, deadline=lambda: calls.append(1))
    assert len(calls) == 3

    def late():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        llama_detector.logits([[5, 6, 7]], deadline=late)
    assert np.isfinite(llama_detector.logits([[5, 6, 7]])).all()


def test_m19_a_deadline_is_kept_while_another_thread_has_the_model(llama_detector, detoxifier):
    p = Protector(llama_detector, False, threshold=1.0, deadline_ms=100)
    with ThreadPoolExecutor(1) as pool:
        with llama_detector.context.lock, detoxifier.context.lock:  # as if it scored and wrote
            v = pool.submit(p.guard, "How do I clean this?", "Use warm water.").result(10)
            assert v.action == "error" and v.error.startswith("DeadlineExceeded") and v.usage["ms"] < 5000
            with pytest.raises(DeadlineExceeded):
                pool.submit(detoxifier.generate, [5, 6], 3, deadline=p._deadline()).result(10)
        assert pool.submit(p.guard, "How do I clean this?", "Use warm water.").result(10).action == "pass"
        assert pool.submit(detoxifier.generate, [5, 6], 0).result(10) == ("", 0, False)


def until_another_waits(context):
    end_s = time.monotonic() + 10
    while not context._next.locked() and time.monotonic() < end_s:
        time.sleep(0.005)


def test_who_waits_comes_before_a_holder_that_comes_back(llama_detector):
    context, order = llama_detector.context, []

    def take(name):
        with context.turn():
            order.append(name)

    for _ in range(3):
        other = threading.Thread(target=take, args=("other",))
        with context.turn():
            other.start()
            until_another_waits(context)
        take("holder")
        other.join()
    assert order == ["other", "holder"] * 3


def test_m19_who_waits_has_a_turn_before_the_next_group_of_a_long_answer(llama_detector, monkeypatch):
    """Regression: an answer of 256 KiB held everyone up until its last window was scored."""
    rng = random.Random(12)
    sequences = [[rng.randrange(17, 49152) for _ in range(n)] for n in [300] * 6 + [100] * 5]  # 6 decodes and 1
    expected, turns, context = llama_detector.logits(sequences), [], llama_detector.context
    short = threading.Thread(target=lambda: turns.append(llama_detector.logits([[5, 6, 7]])[0]))

    def decode(entries, decode=context.decode):
        turns.append(threading.current_thread() is short)
        if len(turns) == 1:
            short.start()
            until_another_waits(context)
        decode(entries)

    alone = llama_detector.logits([[5, 6, 7]])[0]
    monkeypatch.setattr(context, "decode", decode)
    got = llama_detector.logits(sequences)
    short.join()
    assert [turn for turn in turns if isinstance(turn, bool)] == [False, True] + [False] * 6
    assert np.array_equal(got, expected) and alone in turns


def test_m19_a_detoxifier_that_loads_holds_no_answer_beyond_its_deadline(llama_detector, monkeypatch):
    may_load, loaded = threading.Event(), []

    def load(*_):
        may_load.wait(10)
        loaded.append(FakeDetoxifier(llama_detector.tokenizer, "Never mix cleaners."))
        return loaded[-1]

    p = Protector(llama_detector, threshold=0.0, deadline_ms=100)
    monkeypatch.setattr(sys.modules["protector.guard"], "_loaded", load)
    for _ in range(2):
        v = p.guard("How do I clean this?", "Use bleach.")
        assert v.action == "refuse" and v.error.startswith("DeadlineExceeded") and v.usage["ms"] < 5000 and not loaded
    may_load.set()
    p.deadline_ms = 10_000
    assert p.guard("How do I clean this?", "Use bleach.").usage["rewrite_attempts"] == 2 and len(loaded) == 1  # by the first, for all


# -- streams

def test_m36_a_stream_scores_what_the_whole_scores(llama_detector):
    rng = random.Random(4)
    prefix, answer = llama_detector.template.prefix([900, 901]), [rng.randrange(17, 49152) for _ in range(250)]
    whole = llama_detector.logits([prefix + answer[:i + 1] for i in range(0, 250, 10)])
    for _ in range(4):
        cursor, got, rest = llama_detector.open(), [], list(answer)
        cursor.start(prefix)
        while rest:
            n = rng.randint(1, 40)
            got += list(cursor.feed(rest[:n]))
            rest = rest[n:]
        cursor.close()
        assert len(got) == 250 and np.abs(np.array(got)[::10] - whole).max() < 1e-3


def test_running_logits_are_those_of_every_prefix(llama_detector):
    rng = random.Random(11)
    sequences = [[rng.randrange(17, 49152) for _ in range(n)] for n in (300, 1, 290, 40, 700)]  # over a batch's end, and longer than one
    starts = [290, 0, 0, 39, 510]
    parts = llama_detector.running_logits(sequences, starts)
    for ids, start, part in zip(sequences, starts, parts, strict=True):
        prefixes = range(start, len(ids), 37)
        expected = llama_detector.logits([ids[:i + 1] for i in prefixes])
        assert part.shape == (len(ids) - start,) and part.dtype == np.float32
        assert np.abs(part[::37] - expected).max() < 1e-3
    assert llama_detector.running_logits([], []) == []


def test_streams_share_a_cache_and_not_their_texts(llama_detector):
    rng = random.Random(5)
    texts = [[rng.randrange(17, 49152) for _ in range(30)] for _ in range(12)]  # more than there are places
    alone = []
    for text in texts:
        cursor = llama_detector.open()
        cursor.start([5, 6])
        alone.append(np.concatenate([cursor.feed(text[:10]), cursor.feed(text[10:])]))
        cursor.close()
    cursors = [llama_detector.open() for _ in texts]
    for cursor in cursors:
        cursor.start([5, 6])
    together = [[] for _ in texts]
    for at in range(0, 30, 5):
        order = list(range(len(texts)))
        rng.shuffle(order)
        for i in order:
            together[i] += list(cursors[i].feed(texts[i][at:at + 5]))
    for cursor in cursors:
        cursor.close()
        cursor.close()  # twice is once
    assert np.abs(np.array(together) - np.array(alone)).max() < 1e-3
    # starting anew forgets what was before
    cursor = llama_detector.open()
    cursor.start([900] * 40)
    cursor.feed([7, 8])
    cursor.start([5, 6])
    assert np.abs(cursor.feed(texts[0]) - alone[0]).max() < 1e-3
    assert cursor.feed([]).shape == (0,)
    cursor.close()


def one_cache(detector, monkeypatch):
    monkeypatch.setattr(detector._streams, "caches", [])
    monkeypatch.setattr("protector.llama._CACHES", 1)


def test_steps_of_streams_that_wait_are_decoded_together(llama_detector, monkeypatch):
    one_cache(llama_detector, monkeypatch)
    rng = random.Random(7)
    texts = [[rng.randrange(17, 49152) for _ in range(n)] for n in (5, 1, 9, 0, 700, 3)]  # one that no decode holds with the others
    cursors = [llama_detector.open() for _ in texts]
    alone, together, sizes = [], {}, []
    for cursor, text in zip(cursors, texts):
        cursor.start([5, 6])
        alone.append(cursor.feed(text))
        cursor.start([5, 6])
    streams = llama_detector._streams
    context, decode = streams.caches[0].context, streams.caches[0].context.decode
    monkeypatch.setattr(context, "decode", lambda entries: (sizes.append(len(entries)), decode(entries))[1])
    threads = [threading.Thread(target=lambda i=i: together.update({i: cursors[i].feed(texts[i])})) for i in range(len(texts))]
    with context.lock:
        for thread in threads:
            thread.start()
        while len(streams.waiting) < len(texts):
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert sorted(sizes) == sorted([5 + 1 + 9 + 0 + 3 + 5 * 2, 351, 351]) and not streams.waiting
    for i, expected in enumerate(alone):
        assert len(together[i]) == len(texts[i]) and np.abs(together[i] - expected).max(initial=0) < 1e-3
    # What follows is scored on what was fed then.
    for cursor, text in zip(cursors, texts):
        after = cursor.feed([900, 901])
        cursor.start([5, 6])
        assert np.abs(cursor.feed(text + [900, 901])[-2:] - after).max() < 1e-3
        cursor.close()


def test_streams_are_spread_over_caches(llama_detector, monkeypatch):
    """Attention reads a whole cache: many streams in one would pay for each other."""
    monkeypatch.setattr(llama_detector._streams, "caches", [])
    monkeypatch.setattr("protector.llama._CACHES", 2)
    texts, cursors = [list(range(100 * i, 100 * i + 20)) for i in range(1, 7)], [llama_detector.open() for _ in range(6)]
    found = [cursor.feed(text) for cursor, text in zip(cursors, texts)]
    assert [len(cache.places) for cache in llama_detector._streams.caches] == [3, 3]
    for cursor, text, logits in zip(cursors, texts, found):
        cursor.start([])
        assert np.abs(cursor.feed(text) - logits).max() < 1e-3
        cursor.close()


def test_a_step_that_fails_is_only_its_own(llama_detector, monkeypatch):
    one_cache(llama_detector, monkeypatch)
    cursors = [llama_detector.open() for _ in range(3)]
    for cursor in cursors:
        cursor.start([5, 6])
    cursors[0].feed([])
    streams, results = llama_detector._streams, {}
    context, decode = streams.caches[0].context, streams.caches[0].context.decode

    def broken(entries):
        if any(token == 777 for token, *_ in entries):
            raise RuntimeError("decode: no memory")
        decode(entries)

    def feed(i):
        try:
            results[i] = cursors[i].feed([700 + 77 * (i == 1)])
        except RuntimeError as error:
            results[i] = error

    monkeypatch.setattr(context, "decode", broken)
    threads = [threading.Thread(target=feed, args=(i,)) for i in range(3)]
    with context.lock:
        for thread in threads:
            thread.start()
        while len(streams.waiting) < 3:
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert isinstance(results[1], RuntimeError)
    for i in (0, 2):
        cursors[i].start([5, 6])
        assert np.abs(cursors[i].feed([700]) - results[i]).max() < 1e-3
    for cursor in cursors:
        cursor.close()


class Late(Exception):
    pass


def late(after_s):
    """A check that raises after so many seconds."""
    end_s = time.monotonic() + after_s

    def check():
        if time.monotonic() > end_s:
            raise Late

    return check


def test_m19_a_stream_waits_no_longer_than_its_check_allows(llama_detector, monkeypatch):
    """Regression: start, feed and close waited until the others' step had ended."""
    one_cache(llama_detector, monkeypatch)
    rng, streams = random.Random(13), llama_detector._streams
    texts = [[rng.randrange(17, 49152) for _ in range(20)] for _ in range(3)]
    cursors, alone, found = [llama_detector.open() for _ in texts], [], {}
    for cursor, text in zip(cursors, texts):
        cursor.start([5, 6])
        alone.append(cursor.feed(text))
        cursor.start([5, 6])
    context, go, begun = streams.caches[0].context, threading.Event(), threading.Event()
    monkeypatch.setattr(context, "decode", lambda entries, decode=context.decode: (begun.set(), go.wait(30), decode(entries)))
    first = threading.Thread(target=lambda: found.update({0: cursors[0].feed(texts[0])}))
    first.start()
    assert begun.wait(30)  # the first one has the model
    with pytest.raises(Late):
        cursors[1].feed(texts[1], late(0.05))
    cursors[1].close()
    cursors[2].start([5])
    cursors[2].start([5, 6])
    assert not streams.waiting and 0 not in found
    go.set()
    first.join()
    assert np.abs(found[0] - alone[0]).max() < 1e-3 and np.abs(cursors[2].feed(texts[2], late(60)) - alone[2]).max() < 1e-3
    assert set(streams.caches[0].places.values()) == {cursors[0], cursors[2]}  # what was closed gave its place back
    with pytest.raises(RuntimeError, match="must be open, got a closed one"):
        cursors[1].feed(texts[1])
    for cursor in cursors:
        cursor.close()
    assert not streams.caches[0].places and not streams.waiting


def test_m19_whoever_takes_up_the_steps_may_give_up_waiting_and_the_others_go_on(llama_detector, monkeypatch):
    one_cache(llama_detector, monkeypatch)
    cursors, streams, found = [llama_detector.open() for _ in range(2)], llama_detector._streams, {}
    for cursor in cursors:
        cursor.start([5, 6])
    expected = cursors[1].feed([7, 8])
    cursors[1].start([5, 6])
    def feed(i, check=None):
        try:
            found[i] = cursors[i].feed([7, 8], check)
        except Late:
            found[i] = None

    threads = [threading.Thread(target=feed, args=arguments) for arguments in ((0, late(0.3)), (1,))]
    with streams.lock:  # as if another thread decoded
        for thread in threads:
            thread.start()
            while not streams.is_busy:
                time.sleep(0.005)
        threads[0].join(10)
        assert found == {0: None}
    threads[1].join()
    assert np.abs(found[1] - expected).max() < 1e-3 and not streams.is_busy and not streams.waiting
    for cursor in cursors:
        cursor.close()


def test_m56_streams_that_end_at_any_time_leave_the_others_their_scores(llama_detector, monkeypatch):
    """Many threads, some of whose checks raise at random: what is scored is what it is alone, and nothing stays behind."""
    one_cache(llama_detector, monkeypatch)
    texts = [[random.Random(i).randrange(17, 49152) for _ in range(12)] for i in range(6)]
    expected, wrong, n_late = llama_detector.running_logits([[5, 6] + text for text in texts], [2] * len(texts)), [], []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(8):
            i, cursor, got = rng.randrange(len(texts)), llama_detector.open(), []
            try:
                for _ in range(rng.randint(1, 2)):  # begins anew in the middle, as a stream does at a window's end
                    cursor.start([5, 6])
                    got = []
                    for at in range(0, 12, 4):
                        got += list(cursor.feed(texts[i][at:at + 4], late(rng.choice((0.0, 0.02, 60)))))
                if np.abs(np.array(got) - expected[i]).max() > 1e-3:
                    wrong.append((seed, i))
            except Late:
                n_late.append(seed)
            except Exception as error:
                wrong.append(error)
            finally:
                cursor.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    streams = llama_detector._streams
    assert not wrong and n_late and not streams.waiting and not streams.is_busy
    cursor = llama_detector.open()
    cursor.feed([5])
    assert list(streams.caches[0].places.values()) == [cursor]
    cursor.close()


# -- rewriting

def test_greedy_rewrites_are_those_of_pytorch(detoxifier, torch_detoxifier):
    # test_models.py has PyTorch's equal to transformers'. A token is compared as long as no other one came near it: logits have
    # a standard deviation of 2.4 and err by F16_CACHE of it, so twice 0.012 is a tie.
    template, n_compared = torch_detoxifier.template, 0
    for q, a in MILD_PAIRS:
        prompt = template.detoxifier_prompt(template.encode(q), template.encode(a))
        assert prompt == detoxifier.template.detoxifier_prompt(detoxifier.template.encode(q), detoxifier.template.encode(a))
        tokens, n_sure = [], None
        with torch.no_grad():
            for _ in range(32):
                best = torch_detoxifier.lm(torch.tensor([prompt + tokens]), logits_to_keep=1).logits[0, -1].topk(2)
                if best.values[0] - best.values[1] < 0.024 and n_sure is None:
                    n_sure = len(tokens)
                tokens.append(int(best.indices[0]))
        text, n_tokens, finished = detoxifier.generate(prompt, 32)
        assert text.startswith(template.tokenizer.decode(tokens[:n_sure]).rstrip("\ufffd"))
        if n_sure is None and not set(tokens) & set(range(17)):
            assert (text, n_tokens, finished) == (template.tokenizer.decode(tokens), 32, False)
        n_compared += 32 if n_sure is None else n_sure
    assert n_compared > 60  # of 128


def test_m47_generation_ends_at_any_special_token(detoxifier, monkeypatch):
    prompt = detoxifier.template.detoxifier_prompt([900], [901, 902])
    for stop in (detoxifier.template.end, 0, 5):
        tokens = iter([500, 501, stop, 502])
        monkeypatch.setattr(llama, "_pick", lambda logits, temperature, rng: next(tokens))
        assert detoxifier.generate(prompt, 10) == (detoxifier.tokenizer.decode([500, 501]), 2, True)
    tokens = iter([500] * 10)
    assert detoxifier.generate(prompt, 3) == (detoxifier.tokenizer.decode([500] * 3), 3, False)
    assert detoxifier.generate(prompt, 0) == ("", 0, False)


def test_sampling_is_that_of_the_softmax():
    # Three tokens at temperature 2: p ~ exp(z / 2). 3,000 draws; five standard deviations are 137 at most.
    logits = np.log(np.array([1.0, 4.0, 16.0], np.float32))
    rng = np.random.default_rng(0)
    counts = np.bincount([llama._pick(logits, 2.0, rng) for _ in range(3000)], minlength=3)
    assert np.abs(counts - 3000 * np.array([1, 2, 4]) / 7).max() < 137
    assert llama._pick(logits, 0.0, rng) == 2


def test_m49_sampling_repeats_by_its_seed(detoxifier):
    prompt = detoxifier.template.detoxifier_prompt([900], [901, 902])
    one, two, other = (detoxifier.generate(prompt, 12, temperature=0.8, seed=seed)[0] for seed in (1, 1, 2))
    assert one == two != other


def test_m22_a_rewrite_has_room(detoxifier):
    limits = detoxifier.limits
    longest = detoxifier.template.detoxifier_prompt([900] * limits.question_tokens, [901] * limits.rejected_tokens)
    assert detoxifier.generate(longest, limits.rewrite_tokens)[1] > 0
    n_ctx = detoxifier.context.n_ctx
    with pytest.raises(ValueError) as error:
        detoxifier.generate([900] * (n_ctx - 5), 6)
    assert str(error.value) == f"generate: prompt and max_tokens must fit {n_ctx} tokens, got {n_ctx - 5} + 6. Shorten the prompt."


# -- one copy, many users

def test_models_of_one_file_share_its_weights(detector_gguf, detoxifier_gguf, tiny):
    detector = LlamaDetector(detector_gguf, base=tiny.gguf, quantisation="base", n_threads=1)
    detoxifier = LlamaDetoxifier(detoxifier_gguf, base=tiny.gguf, quantisation="base", n_threads=1)
    again = LlamaDetector(detector_gguf, base=tiny.gguf, quantisation="base", n_threads=1)
    assert detector.context.weights.pointer == detoxifier.context.weights.pointer == again.context.weights.pointer
    # each with its own adapter all the same
    ids = sequences_of(detector, MILD_PAIRS)
    before = detector.logits(ids)
    detoxifier.generate(ids[0], 3)
    assert np.array_equal(detector.logits(ids), before) and np.array_equal(again.logits(ids), before)


def test_all_layers_go_to_a_gpu_where_llama_cpp_has_one(detector_gguf, detoxifier_gguf, tiny, monkeypatch):
    asked, load = [], llama.llama_cpp.llama_model_load_from_file

    def recorded(path, options):
        if not options.vocab_only:
            asked.append(options.n_gpu_layers)
        return load(path, options)

    monkeypatch.setattr(llama.llama_cpp, "llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(llama.llama_cpp, "llama_model_load_from_file", recorded)
    monkeypatch.setattr(llama._Weights, "_loaded", weakref.WeakValueDictionary())  # what other tests loaded isn't loaded again
    options = {"base": tiny.gguf, "n_threads": 1}
    Protector(detector_gguf, detoxifier_gguf, threshold=0.5, detector_options=options, detoxifier_options=options)
    assert asked == [-1, -1]  # llama.h: a negative value means all layers
    LlamaDetector(detector_gguf, n_gpu_layers=0, **options)
    assert asked == [-1, -1, 0]


def test_weights_are_freed_with_their_last_user(detoxifier_gguf, tiny, tmp_path):
    import gc

    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny.gguf.read_bytes())
    gc.collect()  # what earlier tests left
    n = len(llama._Weights._loaded)
    detoxifier = LlamaDetoxifier(detoxifier_gguf, base=copy, quantisation="base", n_threads=1)
    assert len(llama._Weights._loaded) == n + 1
    del detoxifier
    gc.collect()
    assert len(llama._Weights._loaded) == n


def test_m56_threads_get_the_numbers_of_one(llama_detector, sequences):
    sequences = sequences[:7]
    expected = llama_detector.logits(sequences)
    results, errors = {}, []

    def work(i):
        try:
            for turn in range(3):
                order = list(range(len(sequences)))
                random.Random(i * 10 + turn).shuffle(order)
                results[i, turn] = np.abs(llama_detector.logits([sequences[j] for j in order]) - expected[order]).max()
                cursor = llama_detector.open()
                cursor.start(sequences[0][:10])
                results[i, turn, "stream"] = cursor.feed(sequences[0][10:])[-1] - expected[0]
                cursor.close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(results) == 48 and np.abs(list(results.values())).max() < 1e-3


def _score_in_child(detector, detoxifier, queue):
    for call in (lambda: detector.logits([[5, 6]]), detector.open, lambda: detoxifier.generate([5], 1)):
        try:
            call()
            queue.put("no error")
        except ModelError as error:
            queue.put(str(error))


@pytest.mark.filterwarnings("ignore:This process")  # that forking with threads is a risk is what this is about
def test_m56_a_fork_is_refused(llama_detector, detoxifier):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with llama_detector.context.lock, detoxifier.context.lock:  # as if another thread were decoding: the child must not wait for it
        child = context.Process(target=_score_in_child, args=(llama_detector, detoxifier, queue))
        child.start()
    messages = [queue.get(timeout=30) for _ in range(3)]
    child.join(30)
    assert child.exitcode == 0
    assert set(messages) == {"decode: model must be loaded in the process that uses it, got a fork. Load it after the fork."}


# -- files that must not load

def load_error(path, tiny, kind=LlamaDetector, **options):
    with pytest.raises(ModelError) as error:
        kind(path, base=tiny.gguf, n_threads=1, **{"quantisation": "F32", **options})
    return str(error.value)


def test_m50_the_wrong_kind(detector_gguf, detoxifier_gguf, tiny):
    assert load_error(detoxifier_gguf, tiny) == f"load: {detoxifier_gguf} must be a detector, got a detoxifier. Pass the other file."
    assert load_error(detector_gguf, tiny, LlamaDetoxifier) == f"load: {detector_gguf} must be a detoxifier, got a detector. Pass the other file."
    assert "must have the key protector.format_version" in load_error(tiny.gguf, tiny)


def test_m50_m54_the_wrong_base(detector_gguf, tiny, tmp_path, real_base):
    from protector.base import SHA256, file_sha256

    with pytest.raises(ModelError) as error:
        LlamaDetector(detector_gguf, base=real_base)
    assert str(error.value) == (f"load: base must be the file that {detector_gguf} was trained on (sha256 {file_sha256(tiny.gguf)[:16]}...), "
                                f"got sha256 {SHA256[:16]}... at {real_base}. Pass base=... with the right file.")
    with pytest.raises(ModelError) as error:
        LlamaDetector(detector_gguf, base=tmp_path / "none.gguf")
    assert str(error.value) == f"load: base must exist, got no file at {tmp_path / 'none.gguf'}. Check the path."
    # A base that the digest was forged for, of another width: llama.cpp refuses the adapter, in one line.
    forged = resigned(detector_gguf, tmp_path / "forged.gguf", base_sha256=SHA256)
    with pytest.raises(ModelError, match=rf"^load: {forged} must be an adapter of .*, got an error \(.*\)\. Use the base that it was trained on\.$"):
        LlamaDetector(forged, base=real_base, quantisation="base")


def test_m50_a_head_of_another_width(detector_gguf, tiny, tmp_path):
    wrong = resigned(detector_gguf, tmp_path / "wide.gguf", head_weight=np.ones(D + 1, np.float32))
    assert load_error(wrong, tiny) == (f"load: {wrong} must have a head of {D} weights, got {D + 1}. Use the base that it was trained on.")


CANARIES = (f"must score its canaries as at export (within {canaries.TOLERANCE}) and harmful above harmless, got a difference of ")


def test_m50_m65_a_flipped_head_does_not_load(detector_gguf, tiny, tmp_path):
    # Polarity: with the digest, the scores at export and even the labels forged to fit, nothing flipped loads.
    metadata = read_metadata(detector_gguf)
    flipped = {"head_weight": -metadata.head_weight, "head_bias": -metadata.head_bias}
    assert CANARIES in load_error(resigned(detector_gguf, tmp_path / "a.gguf", **flipped), tiny)
    scores = [{**canary, "score": 1 - canary["score"]} for canary in metadata.canaries]
    assert CANARIES + "0.00" in load_error(resigned(detector_gguf, tmp_path / "b.gguf", canaries=tuple(scores), **flipped), tiny)


@pytest.mark.parametrize("change", ["no canaries", "harmful only", "harmless only", "another score", "NaN score"])
def test_m50_m51_canaries_that_do_not_hold(detector_gguf, tiny, tmp_path, change):
    found = list(read_metadata(detector_gguf).canaries)
    if change == "no canaries":
        found = []
    elif change.endswith("only"):
        found = [canary for canary in found if canary["label"] == (change == "harmful only")]
    else:
        found[0] = {**found[0], "score": float("nan") if change == "NaN score" else (found[0]["score"] + 0.5) % 1}
    path = resigned(detector_gguf, tmp_path / "canaries.gguf", canaries=tuple(found))
    message = load_error(path, tiny)
    if change == "no canaries":
        assert message == f"check_canaries: {path} must have canaries, got none. Export it again."
    else:
        assert message.startswith(f"check_canaries: {path} {CANARIES}") and message.endswith("Export it again, or use another quantisation.")


def test_m50_weights_that_make_nan_do_not_load(detector_gguf, tiny, tmp_path):
    from test_gguf import array, read_gguf

    tensors = {name: array(tensor).copy() for name, tensor in read_gguf(detector_gguf)[1].items()}
    tensors["blk.1.ffn_up.weight.lora_b"][:] = np.nan
    metadata = read_metadata(detector_gguf)
    path = rewrite(detector_gguf, tmp_path / "nan.gguf", {"protector.model_sha256": gguf.model_sha256(metadata, tensors, 8.0)}, tensors=tensors)
    message = load_error(path, tiny)
    assert CANARIES in message or "NaN" in message


def test_m50_a_cut_base_does_not_load(detector_gguf, tiny, tmp_path):
    from protector.base import file_sha256

    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.gguf.read_bytes()[:-4096])
    path = resigned(detector_gguf, tmp_path / "d.gguf", base_sha256=file_sha256(cut))
    for quantisation in ("base", "Q8_0"):
        with pytest.raises(ModelError) as error:
            LlamaDetector(path, base=cut, quantisation=quantisation)
        assert "must be a" in str(error.value) and "again" in str(error.value)


def test_m50_a_missing_file(tiny, tmp_path):
    missing = tmp_path / "none.gguf"
    assert load_error(missing, tiny) == f"read_metadata: {missing} must exist, got no file. Check the path."


@pytest.fixture(scope="module")
def merged(torch_detector, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("merged") / "merged.gguf"
    export_merged(torch_detector, path, "F16", tiny.gguf, canaries_of(torch_detector))
    return path


def test_m55_a_malformed_model_ends_a_trial_process_and_not_this_one(merged, tmp_path, vocabulary):
    tokens, kinds = (vocabulary[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    odd = [{"llama.attention.head_count": 3}, {"llama.attention.head_count": "4"}, {"llama.embedding_length": 60}, {"llama.block_count": 5},
           {"llama.block_count": 10**6}, {"llama.rope.dimension_count": 7}, {"tokenizer.ggml.token_type": [str(kind) for kind in kinds]},
           {"tokenizer.ggml.tokens": tokens[:500]}, {"tokenizer.ggml.model": ["gpt2"]}]
    statuses, metadata = [], read_metadata(merged)
    for i, fields in enumerate(odd):
        path = rewrite(merged, tmp_path / f"odd{i}.gguf", fields)
        digest = gguf._digest(gguf._reader(path), metadata)  # forged to fit
        path.write_bytes(path.read_bytes().replace(metadata.model_sha256.encode(), digest.encode()))
        with pytest.raises(ModelError, match=rf"^load: {path} must be a model that llama.cpp loads, got ") as error:
            LlamaDetector(path, n_threads=1)
        statuses.append(re.search(r"trial process \((.*)\)", str(error.value))[1])
    assert any(status.startswith("-") for status in statuses), statuses  # by a signal: it would have been this process


def test_m55_the_trial_is_made_once_for_each_file(merged, tmp_path, monkeypatch, cache):
    tried = []
    monkeypatch.setattr(llama.subprocess, "run", lambda command, run=llama.subprocess.run, **options: tried.append(command[-1]) or run(command, **options))
    path = tmp_path / "merged.gguf"
    path.write_bytes(merged.read_bytes() + bytes(32))
    for _ in range(2):
        assert LlamaDetector(path, n_threads=1).metadata.merged
    assert tried == [str(path)]
    # What can't be tried out isn't loaded.
    path.write_bytes(merged.read_bytes() + bytes(64))
    monkeypatch.setattr(llama, "_TRIAL", "import time; time.sleep(60)")
    monkeypatch.setattr(llama, "_TRIAL_S", 0.5)
    with pytest.raises(ModelError, match=r"got the end of a trial process \(TimeoutExpired\)"):
        LlamaDetector(path, n_threads=1)


def test_m55_an_adapter_of_other_sizes_is_an_error(detector_gguf, tiny, tmp_path):
    from test_gguf import array, read_gguf

    wide = {name: array(tensor).copy() for name, tensor in read_gguf(detector_gguf)[1].items()}
    wide["blk.1.ffn_up.weight.lora_a"] = np.zeros((4, D + 1), np.float16)
    digest = gguf.model_sha256(read_metadata(detector_gguf), wide, 8.0)
    path = rewrite(detector_gguf, tmp_path / "wide.gguf", {"protector.model_sha256": digest}, tensors=wide)
    for quantisation in ("F32", "base"):
        assert "Use the base that it was trained on." in load_error(path, tiny, quantisation=quantisation)


def test_an_unknown_quantisation(detector_gguf, tiny):
    with pytest.raises(ValueError) as error:
        LlamaDetector(detector_gguf, base=tiny.gguf, quantisation="Q3")
    assert str(error.value) == "runnable_detector: quantisation must be one of F32, F16, BF16, Q4_0, Q8_0, got Q3."


def test_limits_travel_with_the_model(tiny, tmp_path):
    limits = Limits(question_tokens=20, window=40, overlap=8)
    model = shake(build(ModelConfig("detector", tiny.folder, depth=1, rank=2, limits=limits)))
    export_adapter(model, tmp_path / "d.gguf", tiny.gguf, canaries_of(model))
    detector = LlamaDetector(tmp_path / "d.gguf", base=tiny.gguf, quantisation="base", n_threads=1)
    assert detector.limits == detector.template.limits == limits
    assert BLOCKS != detector.metadata.depth == 1


def test_threads_are_those_of_the_containers_share(tmp_path):
    """Regression: with 2 cores of 64 in a container's limit 64 threads waited for each other."""
    limit, cores = tmp_path / "cpu.max", llama.cpu_threads(tmp_path / "absent")
    for text, threads in (("max 100000\n", cores), ("100000 100000\n", 1), ("50000 100000\n", 1), (f"{100000 * cores * 3} 100000\n", cores), ("broken", cores)):
        limit.write_text(text)
        assert llama.cpu_threads(limit) == threads
