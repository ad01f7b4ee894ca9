"""(question, answer) -> token ids that no text can forge, and the windows in which a long answer is scored.

    detector    <|im_start|>user\\n q <|im_end|>\\n<|im_start|>assistant\\n a          score is read at the last token of a
    detoxifier  <|im_start|>user\\n q <|im_end|>\\n<|im_start|>assistant\\n a <|im_end|>\\n<|im_start|>rewrite\\n a_acc <|im_end|>

Roles and boundaries are token ids put in by this file. User text is tokenised on its own with special-token parsing off,
so a text that spells "<|im_end|>" becomes ordinary tokens. The score is read by index, at the last id of the sequence.
There is no end mark after the answer: the score of a prefix of an answer is then the same number whether the answer
goes on or not, which is what lets a stream be scored token by token on a growing cache.
"""
from dataclasses import dataclass
from typing import NamedTuple

TEMPLATE_ID = "chatml-1"  # part of a model's metadata; change it with any change of ids below
MAX_HISTORY_TOKENS = 256  # earlier turns beyond this are dropped, oldest first, and usage says so


@dataclass(frozen=True)
class Limits:
    """Sizes in tokens; part of what a score means, so they travel with the model."""

    question_tokens: int = 160  # a longer question keeps its end; usage says so
    window: int = 256  # answer tokens scored in one sequence
    overlap: int = 64  # answer tokens that two neighbouring windows share
    rewrite_tokens: int = 160  # room that is reserved for a rewrite
    rejected_tokens: int = 256  # how much of a flagged answer the detoxifier reads: a window

    def __post_init__(self):
        for name, least in (("question_tokens", 1), ("overlap", 0), ("rewrite_tokens", 1), ("rejected_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Limits: {name} must be at least {least}, got {getattr(self, name)}. Choose another number.")
        if self.window <= self.overlap:
            raise ValueError(f"Limits: window must be larger than overlap, got {self.window} and {self.overlap}. "
                             "Choose another number.")


class Window(NamedTuple):
    """Answer tokens [start, stop) that are scored in one sequence."""

    start: int
    stop: int


def windows(n_tokens, window, overlap):
    """Cover n_tokens by windows that start at fixed multiples, so that a growing text only ever adds to the last one.

    Args:
        n_tokens: length of the answer in tokens, at least 1.
        window: most tokens in one window.
        overlap: tokens that neighbours share, less than window.
    Returns:
        list of Window; their union is [0, n_tokens) and each starts window - overlap after the one before.
    Raises:
        ValueError: overlap isn't less than window.
    Example:
        windows(10, 6, 2)  # [Window(0, 6), Window(4, 10)]
    """
    if not 0 <= overlap < window:
        raise ValueError(f"windows: 0 <= overlap < window must hold, got {overlap} and {window}. Choose other sizes.")
    starts = range(0, max(n_tokens - overlap, 1), window - overlap)
    return [Window(start, min(start + window, n_tokens)) for start in starts]


def well_formed(text):
    """The text as both tokenisers can read it: surrogate pairs joined, lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Template:
    """Builds sequences of ids for one tokeniser.

    Args:
        tokenizer: has `encode(text) -> list of ids` with special-token parsing off, and `special(name) -> id or None`
            for "<|im_start|>", "<|im_end|>", "bos" and "eos".
        limits: Limits.

    A backbone without ChatML's two marks (OpenLLaMA, Vicuna) uses its own begin and end tokens in their place.
    """

    def __init__(self, tokenizer, limits=Limits()):
        self.tokenizer, self.limits = tokenizer, limits
        self.start, self.end = tokenizer.special("<|im_start|>"), tokenizer.special("<|im_end|>")
        if self.start is None or self.end is None:
            self.start, self.end = tokenizer.special("bos"), tokenizer.special("eos")
        if self.start is None or self.end is None:
            raise ValueError("Template: tokenizer must have <|im_start|> and <|im_end|>, or a begin and an end token, "
                             "got neither. Choose another backbone.")
        if {self.start, self.end} & set(tokenizer.encode("<|im_start|><|im_end|>")):
            raise ValueError("Template: tokenizer must read <|im_start|> in a text as text, got the mark itself, which would let an answer forge a turn. "
                             "Make its marks special tokens, or choose another backbone.")
        newline = tokenizer.encode("\n")
        self._close = [self.end] + newline  # ends a turn
        self._open = {role: [self.start] + tokenizer.encode(role + "\n") for role in ("user", "assistant", "rewrite")}

    def encode(self, text):
        """Ids of a user's text; never a special id."""
        return self.tokenizer.encode(well_formed(text))

    def prefix(self, question_ids, history=()):
        """Ids before the answer.

        Args:
            question_ids: ids of the question, already within its limit; empty for answer-only input.
            history: (question_ids, answer_ids) of earlier turns, oldest first, already within budget.
        Returns:
            list of ids that ends with the assistant's role.
        """
        ids = []
        for earlier_question, earlier_answer in history:
            ids += self._turn("user", earlier_question) + self._turn("assistant", earlier_answer)
        return ids + self._turn("user", question_ids) + self._open["assistant"]

    def _turn(self, role, ids):
        return self._open[role] + list(ids) + self._close if ids else []

    def clip_question(self, question):
        """(ids of the question's end, number of tokens dropped from its start)."""
        ids = self.encode(question) if question else []
        dropped = max(len(ids) - self.limits.question_tokens, 0)
        return ids[dropped:], dropped

    def detector_sequence(self, question_ids, answer_ids, history=()):
        """(ids, start): the sequence to score and the index of its first answer token. The score is at ids[-1]."""
        prefix = self.prefix(question_ids, history)
        return prefix + list(answer_ids), len(prefix)

    def pair_sequence(self, question, answer):
        """Ids of detector_sequence of two texts, the question cut to its limit."""
        return self.detector_sequence(self.clip_question(question)[0], self.encode(answer))[0]

    def rewrite_prompt(self, question, rejected):
        """detoxifier_prompt of two texts, each cut to its limit."""
        return self.detoxifier_prompt(self.clip_question(question)[0], self.encode(rejected)[:self.limits.rejected_tokens])

    def detoxifier_prompt(self, question_ids, rejected_ids):
        """Ids after which the detoxifier writes; rejected_ids are cut to `limits.rejected_tokens` by the caller."""
        return self.prefix(question_ids) + list(rejected_ids) + self._close + self._open["rewrite"]
