"""A detector and a detoxifier without weights: their scores are functions of the very ids that a model would see.

The logit of a position is a rolling hash of all ids up to it, so one id too many, too few or in another place shows, and
rises by 10 once the ids spell the harmful word.
"""
import time
from functools import cache

import numpy as np

from protector.template import Limits, Template

HARM = "vinegar"  # an answer that has it is harmful
SMALL = Limits(question_tokens=16, window=24, overlap=8, rewrite_tokens=16, rejected_tokens=24)


@cache
def real_tokenizer():
    """llama.cpp's tokeniser of the default base, without its weights."""
    import llama_cpp

    from protector import base, llama

    class Vocabulary:
        llama.quiet()
        options = llama_cpp.llama_model_default_params()
        options.vocab_only = True
        pointer = llama_cpp.llama_model_load_from_file(str(base.base_path()).encode(), options)
        vocab = llama_cpp.llama_model_get_vocab(pointer)

    return llama.LlamaTokenizer(Vocabulary)


class FakeDetector:
    """Logits in [-4, -2), and 10 more where the answer has the harmful word.

    Args:
        tokenizer: as template.py wants it.
        limits: Limits.
        fault: called with the sequences before they are scored; may raise.
        change: function of (logits) -> logits, for NaN and the like.
        step_s: seconds that a call takes.
    """

    name, quantisation, model_sha256, path, calibration = "fake", "F32", "0" * 64, None, ()

    def __init__(self, tokenizer, limits=SMALL, fault=None, change=None, step_s=0.0):
        self.limits, self.tokenizer, self.template = limits, tokenizer, Template(tokenizer, limits)
        self.fault, self.change, self.step_s = fault, change, step_s
        self.harm = [tokenizer.encode(space + HARM) for space in ("", " ")]
        self.sequences, self.n_open, self.n_opened, self.n_fed, self.n_steps = [], 0, 0, 0, 0

    def running_logits(self, sequences, starts, deadline=None):
        parts = []
        for ids, start, last in zip(sequences, starts, self.logits(sequences, deadline)):
            cursor = FakeCursor(self)
            cursor.start(ids[:start])
            parts.append(np.array(cursor.step(ids[start:])[:-1] + [last], np.float32))
        return parts

    def logits(self, sequences, deadline=None):
        results = []
        for ids in sequences:
            if deadline:
                deadline()
            self.wait()
            if self.fault:
                self.fault(sequences)
            self.sequences.append(list(ids))
            results.append(self.last_logit(ids))
        results = np.array(results, np.float32)
        return self.change(results) if self.change else results

    def wait(self):
        if self.step_s:
            time.sleep(self.step_s)

    def last_logit(self, ids):
        value = 7
        for token in ids:
            value = (value * 31 + token + 1) % 1_000_003
        answer = ids[len(ids) - ids[::-1].index(self.template.start):]
        has_harm = any(answer[i:i + len(part)] == part for part in self.harm for i in range(len(answer)))
        return value % 1000 / 500 - 4 + 10 * has_harm

    def open(self):
        self.n_open += 1
        self.n_opened += 1
        return FakeCursor(self)


class FakeCursor:
    """Scores on: nothing of what was fed before is looked at but a running state."""

    def __init__(self, detector):
        self.detector, self.is_closed = detector, False

    def start(self, ids):
        self.value, self.seen, self.has_harm = 7, [], False
        self.step(ids)

    def feed(self, ids, check=None):
        assert not self.is_closed, "fed after close"
        detector = self.detector
        detector.wait()
        detector.n_steps += 1
        if detector.fault:
            detector.fault([ids])
        detector.n_fed += len(ids)
        logits = np.array(self.step(ids), np.float32)
        return detector.change(logits) if detector.change else logits

    def step(self, ids):
        logits = []
        for token in ids:
            if token == self.detector.template.start:
                self.seen, self.has_harm = [], False
            self.value = (self.value * 31 + token + 1) % 1_000_003
            self.seen = (self.seen + [token])[-8:]
            self.has_harm |= any(self.seen[-len(part):] == part for part in self.detector.harm)
            logits.append(self.value % 1000 / 500 - 4 + 10 * self.has_harm)
        return logits

    def close(self):
        if not self.is_closed:
            self.is_closed = True
            self.detector.n_open -= 1


class FakeDetoxifier:
    """Writes what it was given, one text for each attempt, and remembers how it was asked."""

    def __init__(self, tokenizer, *texts, limits=SMALL, finished=True, fault=None):
        self.limits, self.tokenizer, self.template = limits, tokenizer, Template(tokenizer, limits)
        self.texts, self.finished, self.fault, self.calls = texts, finished, fault, []

    def generate(self, prompt, max_tokens, temperature=0.0, seed=0, deadline=None):
        if deadline:
            deadline()
        if self.fault:
            self.fault(prompt)
        text = self.texts[min(len(self.calls), len(self.texts) - 1)]
        self.calls.append({"prompt": list(prompt), "max_tokens": max_tokens, "temperature": temperature, "seed": seed})
        return text, len(self.tokenizer.encode(text)), self.finished
