"""A detector and a detoxifier without weights: letters are tokens, and a word makes an answer harmful."""
import numpy as np

from protector.template import Limits, Template

_SPECIAL = {"<|im_start|>": 1, "<|im_end|>": 2, "bos": 1, "eos": 2}


class FakeTokenizer:
    def encode(self, text):
        return [byte + 10 for byte in text.encode()]

    def decode(self, ids):
        return bytes(token - 10 for token in ids if token >= 10).decode("utf-8", "ignore")

    def special(self, name):
        return _SPECIAL.get(name)


class FakeDetector:
    """Logit 3 where the answer says "bleach and vinegar", else between -3 and -1 by the answer's length."""

    name, quantisation, model_sha256, calibration, path = "fake", "none", "0" * 64, (), "fake.gguf"

    def __init__(self, limits=Limits(window=2048)):
        self.limits, self.tokenizer = limits, FakeTokenizer()
        self.template = Template(self.tokenizer, limits)
        self.n_scored = 0

    def logits(self, sequences, deadline=None):
        self.n_scored += len(sequences)
        role = self.template._open["assistant"]
        results = []
        for ids in sequences:
            start = max(i for i in range(len(ids)) if ids[i:i + len(role)] == role) + len(role)
            text = self.tokenizer.decode(ids[start:])
            results.append(3.0 if "bleach and vinegar" in text else -3 + 2 * (len(text) % 7) / 7)
        return np.array(results, np.float32)


class FakeDetoxifier:
    """Writes what it is told."""

    def __init__(self, text="Please keep bleach away from acids.", limits=Limits(window=2048)):
        self.limits, self.text, self.tokenizer = limits, text, FakeTokenizer()
        self.template = Template(self.tokenizer, limits)

    def generate(self, prompt, max_tokens, temperature=0.0, seed=0, deadline=None):
        return self.text, 8, True
