"""The table that `reproduce.sh` ends with: detector, guard and cost on answers that none of the models was trained on.

    AUROC, F1, false positives    of the detector, on human-labelled answers
    harmful before -> after       share of answers that the independent judge calls harmful, unguarded and guarded; a refusal is none
    ms                            median time of guard() for a harmless answer, one at a time; the fastest and the slowest
"""
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import bench_rounds, data
from ..base import WEIGHTS
from ..guard import Protector
from . import metrics, record, report, rows
from .base_model import BaseModel
from .detectors import BagOfWords, measure, named, score_rows, scoring_guard
from .embed import Embedder
from .judge import judge_folds, train_offline
from .replay import attack_success, fewest, guard_rows

ANSWER_TOKENS = 96  # of the base model's own answers


@dataclass(frozen=True)
class TableConfig:
    """Options of `protector table`."""

    runs: str = field(default="runs/reproduce", metadata={
        "help": "folder with detector.gguf and detoxifier.gguf of a run; '' for the shipped ones alone"})
    data: str = field(default="runs/reproduce/data", metadata={
        "help": "folder with measure.jsonl and judge.jsonl, or with dev_pairs.jsonl.gz"})
    most: int = field(default=400, metadata={"help": "labelled answers of one source at most"})
    answers: int = field(default=24, metadata={
        "help": "answers of the base model, and harmful labelled answers, that are guarded"})
    results: str = field(default="results", metadata={"help": "folder for table.json"})


def run(config):
    """Measure, print the table as Markdown on stdout and write it to <results>/table.json.

    Returns:
        dict of kind "table".
    """
    inputs = rows.gather([config.data])
    judge_train, held_out = judge_folds(inputs.pairs, inputs.judge, inputs.seen, inputs.halve)[0]
    chosen = fewest(held_out, config.most)
    judge = train_offline([(judge_train, chosen)], Embedder())
    harmful = data.spread([row for row in chosen if row.label], config.answers)
    harmless = data.spread([row for row in chosen if not row.label], config.answers)
    questions = [row.question for row in data.spread([row for row in chosen if row.label and row.question], config.answers)]
    base = BaseModel()
    own = [rows.Row(question, base.generate(question, ANSWER_TOKENS)) for question in questions]  # a real, weakly aligned model
    others = bench_rounds.others()
    models = {"shipped": (WEIGHTS / "detector.gguf", WEIGHTS / "detoxifier.gguf", None)}
    if config.runs and (Path(config.runs) / "detector.gguf").exists():
        # A model of a few minutes has no calibration: its threshold is the even one.
        models["this run"] = (Path(config.runs) / "detector.gguf", Path(config.runs) / "detoxifier.gguf", 0.5)
    result = {"kind": "table", "judge": judge.described(), "models": {},
              "rows": {source: len(part) for source, part in rows.by_source(chosen).items()}, "rows_sha256": rows.fingerprint(chosen)}
    for name, (detector, detoxifier, threshold) in models.items():
        result["models"][name] = _measure(detector, detoxifier, threshold, chosen, harmful, harmless, own, judge)
    result.update(others())
    words = BagOfWords(inputs.train)
    result["models"]["bag of words"] = {"threshold": 0.5, **_detector_numbers(np.array([words.score(row.answer) for row in chosen]), chosen, 0.5)}
    record.write(config.results, "table", result, config)
    print(markdown(result))
    return result


def _detector_numbers(scores, chosen, threshold):
    found = measure(scores, [row.label for row in chosen], threshold, [row.group for row in chosen], draws=500)
    return {name: found[name] for name in ("auroc", "f1", "false_positives", "n", "harmful")}


def _measure(detector, detoxifier, threshold, chosen, harmful, harmless, own, judge):
    guard = Protector(detector, detoxifier, threshold=threshold)
    scorer = scoring_guard(guard.detector, threshold=threshold)
    scores, thresholds = score_rows(scorer, chosen)
    # The detoxifier loads now, and not within the first flagged answer's time.
    numbers = {"detector": named(guard.detector), "detoxifier": named(guard.detoxifier), "threshold": guard.thresholds["pair"], **_detector_numbers(scores, chosen, thresholds)}
    outcomes = guard_rows(guard, harmless)
    times = [outcome.verdict.usage["ms"] for outcome in outcomes]
    numbers["harmless_changed_without_flag"] = metrics.rate([outcome.changed and not outcome.verdict.flagged for outcome in outcomes],
                                                            [row.group for row in harmless])
    numbers["ms"] = {"median": float(np.median(times)), "low": float(np.min(times)), "high": float(np.max(times))}
    for name, part in (("labelled", harmful), ("base", own)):
        outcomes, groups = guard_rows(guard, part), [row.group for row in part]
        found = attack_success(outcomes, judge, human=False)
        numbers[name] = {"before": found["before"], "after": found["after"],
                         "flagged": metrics.rate([outcome.verdict.flagged for outcome in outcomes], groups),
                         "rewritten": metrics.rate([outcome.verdict.action == "rewrite" for outcome in outcomes], groups)}
    return numbers


def _share(rate):
    return report.share(rate, digits=0)


def markdown(result):
    """The table as README.md shows it."""
    columns = list(result["models"])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]

    def line(title, cell, is_guard=True):
        cells = [cell(found) if not is_guard or "ms" in found else "" for found in result["models"].values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    line("AUROC", lambda m: report.number(m["auroc"], 2), is_guard=False)
    line("F1 at the threshold", lambda m: report.number(m["f1"], 2), is_guard=False)
    line("threshold", lambda m: f"{m['threshold']:.3f}", is_guard=False)
    line("harmless answers flagged", lambda m: _share(m["false_positives"]), is_guard=False)
    line("harmless answers changed without a flag", lambda m: _share(m["harmless_changed_without_flag"]))
    line("labelled harmful answers: flagged", lambda m: _share(m["labelled"]["flagged"]))
    for title, part in (("labelled harmful answers", "labelled"), ("base model's own answers", "base")):
        line(f"{title}: judged harmful before -> after", lambda m: f"{_share(m[part]['before'])} -> {_share(m[part]['after'])}")
    line("ms per harmless answer, median",
         lambda m: f"{m['ms']['median']:.0f} [{m['ms']['low']:.0f}, {m['ms']['high']:.0f}], n {m['harmless_changed_without_flag']['n']}")
    n = next(iter(result["models"].values()))
    sources = ", ".join(f"{source} {count}" for source, count in result["rows"].items())
    lines += ["", f"{n['n']} labelled answers ({n['harmful']} harmful): {sources}. Judge: {result['judge']}.",
              "In square brackets: AUROC and F1 95 % bootstrap over questions, shares 95 % Wilson, ms the fastest and the slowest of the n answers."]
    guards = [f"{name}: {report.guard_name(model)}" for name, model in result["models"].items() if "detector" in model]
    lines += [f"Guards: {'; '.join(guards)}."] if guards else []
    lines += report.busy_times(result)
    return "\n".join(lines)
