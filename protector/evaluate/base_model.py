"""A language model on llama.cpp without any adapter: it writes answers, and says how likely a text is."""
import ctypes
import math
from pathlib import Path

import numpy as np

from .. import llama
from ..base import base_path
from ..engine import llama_cpp
from ..template import Limits, Template

_CONTEXT_TOKENS = 2048


class BaseModel:
    """A GGUF model, asked and measured in the chat form that its template gives.

    Args:
        path: GGUF file; the default base if None.
        n_threads: CPU threads; all cores that this process may use if None.
    """

    def __init__(self, path=None, n_threads=None):
        self.path = Path(path or base_path())
        self.name = self.path.stem
        self._weights = llama._Weights.of(self.path, 0)
        self.tokenizer = llama.LlamaTokenizer(self._weights)
        self.template = Template(self.tokenizer, Limits())
        self.context = llama._Context(self._weights, None, _CONTEXT_TOKENS, False, n_threads)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self._weights.vocab)

    def prompt(self, question):
        """Ids of a user's turn and the opened answer; the question's last 1,200 tokens."""
        return self.template.prefix(self.template.encode(question)[-1200:])

    def generate(self, question, max_tokens=256, temperature=0.0, seed=0):
        """The answer that the model writes.

        Args:
            question: str.
            max_tokens: most tokens to write.
            temperature: 0 = greedy.
            seed: of sampling.
        Returns:
            str
        """
        prompt = self.prompt(question)
        max_tokens = min(max_tokens, self.context.n_ctx - len(prompt))
        rng, written = np.random.default_rng(seed), []
        with self.context.lock:
            self.context.clear()
            for start in range(0, len(prompt), llama._BATCH_TOKENS):
                part = prompt[start:start + llama._BATCH_TOKENS]
                self.context.decode([(token, start + i, 0, start + i == len(prompt) - 1) for i, token in enumerate(part)])
            for position in range(len(prompt), len(prompt) + max_tokens):
                token = llama._pick(self._logits(-1), temperature, rng)
                if token == self.template.end or self.tokenizer.is_control(token):
                    break
                written.append(token)
                self.context.decode([(token, position, 0, True)])
            self.context.clear()
        return self.tokenizer.decode(written).strip()

    def losses(self, question, answer):
        """Negative log-likelihood of each answer token after its question, in nats: (T,) float64.

        An answer's tokens beyond the model's room are left out.
        """
        prefix = self.prompt(question)
        return self.of_ids(prefix, self.template.encode(answer)[:self.context.n_ctx - len(prefix)])

    def of_ids(self, prefix, target):
        """Negative log-likelihood of each target id after the prefix's: (T,) float64."""
        ids, losses = list(prefix) + list(target), []
        if len(ids) > self.context.n_ctx:
            raise ValueError(f"of_ids: prefix and target must fit {self.context.n_ctx} tokens, got {len(ids)}. Shorten the target.")
        with self.context.lock:
            self.context.clear()
            for start in range(0, len(ids) - 1, llama._BATCH_TOKENS):  # the last id predicts nothing
                part = range(start, min(start + llama._BATCH_TOKENS, len(ids) - 1))
                self.context.decode([(ids[t], t, 0, t + 1 >= len(prefix)) for t in part])
                for t in part:
                    if t + 1 >= len(prefix):
                        logits = self._logits(t - start).astype(np.float64)
                        top = logits.max()
                        losses.append(top + math.log(np.exp(logits - top).sum()) - logits[ids[t + 1]])
            self.context.clear()
        return np.array(losses)

    def perplexity(self, question, answer):
        """exp(mean negative log-likelihood per token) of an answer; NaN for an empty one."""
        losses = self.losses(question, answer)
        return float(np.exp(losses.mean())) if len(losses) else math.nan

    def _logits(self, i):
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context.pointer, ctypes.c_int32(i)), (self.n_vocab,))
