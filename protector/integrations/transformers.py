"""transformers: stop `generate` where an answer turns harmful.

    stop = HarmStoppingCriteria(protector, tokenizer, inputs["input_ids"].shape[1], [question])
    model.generate(**inputs, stopping_criteria=StoppingCriteriaList([stop]))
    text = stop.verdicts()[0].text
"""
import torch
from transformers import StoppingCriteria

from ..stream import StreamGuard


class HarmStoppingCriteria(StoppingCriteria):
    """Scores each row's new tokens on a growing cache and stops a row at the alarm.

    `generate` still returns the tokens up to there: what may be shown is `verdicts()[row].text`.

    Args:
        protector: guard.Protector.
        tokenizer: the generating model's; anything with decode(ids, skip_special_tokens=True).
        prompt_tokens: ids in front of the answer; 0 where the prompt is given as `inputs_embeds`.
        questions: one per row.
    Raises:
        ValueError: another number of rows than of questions, at the first step (beam search has more).
    """

    def __init__(self, protector, tokenizer, prompt_tokens, questions):
        self.tokenizer, self.prompt_tokens = tokenizer, prompt_tokens
        self._guards = [StreamGuard(protector, question) for question in questions]
        self._texts, self._verdicts = [""] * len(questions), [None] * len(questions)

    def __call__(self, input_ids, scores, **kwargs):
        """(B, T) ids so far -> (B,) bool, True where a row stops."""
        if len(input_ids) != len(self._guards):
            raise ValueError(f"HarmStoppingCriteria: input_ids must have a row per question, got {len(input_ids)} rows and "
                             f"{len(self._guards)} questions. Use greedy search or sampling.")
        for row, ids in enumerate(input_ids):
            if not self._guards[row].done:
                self._take(row, self.tokenizer.decode(ids[self.prompt_tokens:], skip_special_tokens=True), last=False)
        return torch.tensor([guard.done for guard in self._guards], dtype=torch.bool, device=input_ids.device)

    def verdicts(self):
        """Verdict per row, after `generate`; scores what is left and frees the caches."""
        for row, guard in enumerate(self._guards):
            if self._verdicts[row] is None:
                if not guard.done:
                    self._take(row, self._texts[row], last=True)
                self._note(row, guard.finish())
        return list(self._verdicts)

    def close(self):
        """Free the caches, if verdicts() is never asked for."""
        for guard in self._guards:
            guard.close()

    def _take(self, row, text, last):
        """Push what is new; half a character at the end waits for its other half."""
        guard = self._guards[row]
        whole = text if last else text.rstrip("\ufffd")
        self._texts[row] = text
        pushed = guard.text
        if not whole.startswith(pushed):
            # A tokeniser that changes its mind about earlier text: score the text anew.
            guard.close()
            guard = self._guards[row] = StreamGuard(guard.protector, guard.q)
            pushed = ""
        self._note(row, guard.push(whole[len(pushed):]))

    def _note(self, row, events):
        for event in events:
            if event.verdict is not None:
                self._verdicts[row] = event.verdict
