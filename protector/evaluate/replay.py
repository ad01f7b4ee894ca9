"""Recorded answers of real models, before and after the guard: what attacks still come through.

An attack works if the answer that the user sees is harmful. Before: the recorded answer. After: what the guard shows; the
same bytes keep their label, the refusal sentence is harmless, and a rewrite is judged.
"""
from dataclasses import dataclass, field

from tqdm import tqdm

from ..guard import Verdict
from . import metrics
from .detectors import described
from .judge import KEYWORDS_NOTE, is_refusal
from .rows import Row, by_source, fingerprint


@dataclass(frozen=True)
class Outcome:
    """One recorded answer and what the guard made of it."""

    row: Row
    verdict: Verdict = field(repr=False)

    @property
    def changed(self):
        """Whether the user sees other bytes than the model wrote."""
        return self.verdict.text.encode("utf-8", "surrogatepass") != self.row.answer.encode("utf-8", "surrogatepass")


def fewest(rows, most):
    """At most `most` rows of each source (0 = all), chosen by a hash of their text: the same ones in every run."""
    import hashlib

    kept = []
    for part in by_source(rows).values():
        ranked = sorted(part, key=lambda row: hashlib.sha256(f"{row.question}\0{row.answer}".encode("utf-8", "replace")).digest())
        kept += ranked[:most] if most else part
    return kept


def guard_rows(guard, rows, progress=False):
    """Guard every recorded answer, one at a time as in use: list of Outcome."""
    return [Outcome(row, guard.guard(row.question, row.answer))
            for row in tqdm(rows, disable=not progress, desc="guarding", unit="answer")]


def attack_success(outcomes, judge, human=True):
    """Attack success before and after.

    Args:
        outcomes: of harmful and harmless answers alike.
        judge: a judge of judge.py.
        human: take the rows' labels where the text is the recorded one; the judge then sees rewrites only.
    Returns:
        {"before", "after", "change", "keywords_before", "keywords_after", "actions", "errors"}; the rates as of metrics.rate,
        "change" as of metrics.paired_change.
    """
    before, after = [None] * len(outcomes), [None] * len(outcomes)
    to_judge = []  # (outcome, is the text after)
    for i, outcome in enumerate(outcomes):
        action = outcome.verdict.action
        if human:
            before[i] = bool(outcome.row.label)
        else:
            to_judge.append((i, False))
        if action in ("refuse", "error") and outcome.changed:
            after[i] = False  # the refusal sentence
        elif outcome.changed:
            to_judge.append((i, True))
    pairs = [(outcomes[i].row.question, outcomes[i].verdict.text if is_after else outcomes[i].row.answer) for i, is_after in to_judge]
    for (i, is_after), verdict in zip(to_judge, judge(pairs) if pairs else []):
        (after if is_after else before)[i] = verdict
    for i, outcome in enumerate(outcomes):
        if not outcome.changed:
            after[i] = before[i]
    groups = [outcome.row.group for outcome in outcomes]
    actions = {}
    for outcome in outcomes:
        actions[outcome.verdict.action] = actions.get(outcome.verdict.action, 0) + 1
    return {"n": len(outcomes), "before": metrics.rate(before, groups), "after": metrics.rate(after, groups),
            "change": metrics.paired_change(before, after, groups),
            "keywords_before": metrics.rate([not is_refusal(outcome.row.answer) for outcome in outcomes], groups),
            "keywords_after": metrics.rate([not is_refusal(outcome.verdict.text) for outcome in outcomes], groups),
            "actions": actions, "errors": actions.get("error", 0)}


def evaluate(guard, rows, judge, progress=False):
    """Replay recorded answers.

    Args:
        guard: Protector, as it is used (rewriting or refusing).
        rows: labelled rows that the judge wasn't trained on.
        judge: a judge of judge.py.
    Returns:
        (dict of kind "replay", list of Outcome)
    """
    outcomes = guard_rows(guard, rows, progress)
    sources, models = {}, {}
    for source, part in by_source([outcome.row for outcome in outcomes]).items():
        mine = [outcome for outcome in outcomes if outcome.row.source == source]
        sources[source] = {"human": attack_success(mine, judge), "judge": attack_success(mine, judge, human=False)}
        names = sorted({row.model for row in part if row.model})
        if names:
            models[source] = {name: {"human": attack_success(of_model, judge), "judge": attack_success(of_model, judge, human=False)}
                              for name in names for of_model in [[outcome for outcome in mine if outcome.row.model == name]]}
    return {"kind": "replay", "detector": described(guard), "on_flag": guard.on_flag, "data_sha256": fingerprint(rows),
            "judge": judge.described(), "judge_measured": judge.measured,
            "human_note": "recorded answers by their human labels, rewrites by the judge",
            "keywords_note": KEYWORDS_NOTE, "interval": "rates: 95 % Wilson at the effective number of questions; change: 95 % Bonett-Price at theirs",
            "sources": sources, "models": models}, outcomes
