"""Ray: guard many answers on many machines, with one class for Ray Data and one function for files.

    ray.data.read_parquet(IN).map_batches(GuardBatch, compute=ray.data.ActorPoolStrategy(size=8), num_cpus=1, batch_size=64,
                                          fn_constructor_kwargs={"detector_options": {"n_threads": 1}}).write_parquet(OUT)
    guard_files(["answers.jsonl"], "guarded/", workers=8)      # goes on where it stopped

A bad row gets action "error" and the refusal as its text, and the others their verdicts; guard_files says so, too, of a row that ends
its worker each time. ray itself is imported where workers are started: both also run in one process without it.
"""
import json
import os
import time
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..base import WEIGHTS, file_sha256
from ..errors import DataError, ProtectorError
from ..guard import Protector

_TRIES = 2  # of a part, and then of each of its rows, before what ended its worker is known


class GuardBatch:
    """Adds action, flagged, score, text and error to each row of a batch, in place of columns of these names.

    Args:
        question, answer: names of the columns; a row without a question is scored on its answer alone.
        options: of guard.Protector. One thread per actor (`detector_options={"n_threads": 1}`) and an actor per core is the
            way to fill CPUs; `backend="torch"` with `num_gpus=1` is the one for GPUs.
    Trap: Ray Data starts a dead actor again for ever, and a row that ends its worker each time never lets the job end. guard_files finds it.
    Example:
        GuardBatch()({"question": np.array(["Hi?"]), "answer": np.array(["Hello."])})["action"]  # array(["pass"])
    """

    def __init__(self, question="question", answer="answer", **options):
        if options.get("on_error") == "raise":
            raise ValueError("GuardBatch: on_error must be refuse or pass, got raise. One row would end the job.")
        self.question, self.answer, self.protector = question, answer, Protector(**options)

    def __call__(self, batch):
        """Ray Data's numpy batch {column: (n,) array} -> the same with five columns more; score is NaN after an error."""
        n = len(batch[self.answer])
        rows = self.rows([{name: batch[name][i] for name in (self.question, self.answer) if name in batch} for i in range(n)])
        new = {name: np.array([row[name] for row in rows], dtype=object) for name in ("action", "text", "error")}
        score = np.array([np.nan if row["score"] is None else row["score"] for row in rows], np.float64)
        return {**batch, **new, "score": score, "flagged": np.array([row["flagged"] for row in rows], bool)}

    def rows(self, rows, deadly=False):
        """The five new values of each row, as dicts; what isn't a dict with a string answer is a bad row.

        deadly: each of them ended its workers; none is scored, and the error policy answers.
        """
        pairs = [(row.get(self.question), row.get(self.answer)) if isinstance(row, dict) else None for row in rows]
        found = []
        for verdict in map(self._deadly, pairs) if deadly else self.protector.guard_batch(pairs):
            score = None if verdict.score != verdict.score else verdict.score  # NaN isn't JSON
            found.append({"action": verdict.action, "flagged": verdict.flagged, "score": score, "text": verdict.text, "error": verdict.error})
        return found

    def _deadly(self, pair):
        error = ProtectorError(f"guard_files: row must leave its worker alive, got a dead one at each of {_TRIES} tries. Give workers more memory.")
        return self.protector._failed((*(pair or ("", "")), ()), error, time.monotonic())

    def part(self, part, out):
        """Guard one part of a file into <out>/part-<number>.jsonl, which is whole or absent; returns its number of rows."""
        _write(out, part, self.lines(part))
        return part.n_rows

    def lines(self, part, deadly=False):
        """The JSON lines of one part of a file, guarded; deadly: as of rows."""
        with open(part.path, "rb") as file:
            file.seek(part.offset)
            rows = [_parsed(file.readline()) for _ in range(part.n_rows)]
        return "".join(json.dumps({**(row if isinstance(row, dict) else {}), "row": part.first_row + i, **new}) + "\n"
                       for i, (row, new) in enumerate(zip(rows, self.rows(rows, deadly))))


class Part(NamedTuple):
    """Lines of a source that one worker guards in one go."""

    number: int
    path: str
    offset: int  # bytes
    first_row: int  # over all sources
    n_rows: int

    def rows(self):
        """Each of its lines, as a part."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for i in range(self.n_rows):
                yield self._replace(offset=file.tell(), first_row=self.first_row + i, n_rows=1)
                file.readline()


def _parsed(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # also what isn't UTF-8, or too deep
        return None


def _target(out, part):
    return Path(out) / f"part-{part.number:06d}.jsonl"


def _write(out, part, lines):
    target = _target(out, part)
    # A part that is run twice, because its worker died, is written by two processes: each has its own file until it is whole.
    partial = target.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(lines)
    os.replace(partial, target)


def _sha256(model, shipped):
    """sha256 of the file, or of each file of the folder, that Protector(detector=model) reads; of a loaded model its own, where it has one."""
    if model is not None and not isinstance(model, (str, os.PathLike)):
        return getattr(model, "model_sha256", None)
    path = WEIGHTS / shipped if model is None else Path(model)
    names = ("protector.json", "model.safetensors", "calibration.json") if path.is_dir() else ("",)
    return [file_sha256(path / name) for name in names if (path / name).is_file()]


def parts_of(sources, rows):
    """Cut JSONL files into parts of at most `rows` lines. A blank line is a bad row: numbers are those of the lines."""
    parts, first_row = [], 0
    for path in sources:
        offsets = [0]
        with open(path, "rb") as file:
            for line in file:
                offsets.append(offsets[-1] + len(line))
        for start in range(0, len(offsets) - 1, rows):
            n_rows = min(rows, len(offsets) - 1 - start)
            parts.append(Part(len(parts), str(path), offsets[start], first_row, n_rows))
            first_row += n_rows
    return parts


def guard_files(sources, out, workers=0, rows=256, num_cpus=1, num_gpus=0, **options):
    """Guard every line of JSONL files into <out>/part-*.jsonl, one verdict per row; a second call goes on where it stopped.

    A row that ends its worker, alone and at each try, gets action "error" as other bad rows do; without ray it ends this process.

    Args:
        sources: JSONL files, and out: a folder; every worker must see both.
        workers: Ray actors; 0 works in this process, without ray.
        rows: lines of one part: what is lost when a worker dies, and done again by another.
        num_cpus, num_gpus: that Ray reserves for each actor.
        options: of GuardBatch.
    Returns:
        {"rows": n, "flagged": n, "errors": [row numbers]}
    Raises:
        DataError: <out> holds parts of another job or of other weights, or a row doesn't have exactly one verdict.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    job = json.dumps({"sources": [[str(path), file_sha256(path)] for path in sources], "rows": rows, "options": repr(sorted(options.items())),
                      "sha256": [_sha256(options.get(kind), f"{kind}.gguf") for kind in ("detector", "detoxifier")]})
    if (out / "job.json").exists() and (out / "job.json").read_text() != job:
        raise DataError(f"guard_files: {out} must be a new folder or of this job, got another's parts. Choose another folder.")
    (out / "job.json").write_text(job)
    parts = parts_of(sources, rows)
    due = [part for part in parts if not _target(out, part).exists()]
    if due and workers:
        _on_ray(due, str(out), workers, num_cpus, num_gpus, options)
    elif due:
        guard = GuardBatch(**options)
        for part in due:
            guard.part(part, out)
    return _summary(out, parts)


def _on_ray(due, out, workers, num_cpus, num_gpus, options):
    """Write the due parts' files. What ends a part's workers is looked for row by row, once the other parts are done."""
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError

    actor = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(GuardBatch)
    idle = []

    def each(method, items, *arguments):
        """Yield (item, what the method makes of it) in the order they are done; None where the worker died at each try."""
        items, running, deaths = deque(items), {}, Counter()  # running: {what ray returns: (worker, item)}, without an item while it starts
        while items or running:
            while items and idle:
                worker, item = idle.pop(), items.popleft()
                running[getattr(worker, method).remote(item, *arguments)] = worker, item
            n_starting = sum(item is None for _, item in running.values())
            for _ in range(min(workers - len(running), len(items) - n_starting)):
                worker = actor.remote(**options)
                running[worker.__ray_ready__.remote()] = worker, None
            done = ray.wait(list(running))[0][0]
            worker, item = running.pop(done)
            try:
                result = ray.get(done)
            except (RayActorError, OutOfMemoryError):
                if item is None:  # a worker that can't even start is no row's doing: its error ends the job
                    raise
                deaths[item] += 1
                if deaths[item] < _TRIES:  # the part's file is replaced as a whole, so no row counts twice
                    items.append(item)
                    continue
                result = None
            else:
                idle.append(worker)
            if item is not None:
                yield item, result

    for part in [part for part, n_rows in each("part", due, out) if n_rows is None]:
        lines = dict(each("lines", part.rows()))
        lines.update(each("lines", [row for row, line in lines.items() if line is None], True))
        lost = [str(row) for row in part.rows() if lines[row] is None]
        if lost:  # not even read: no worker lives long enough for a row of its own
            raise RuntimeError(f"guard_files: a worker must live to read a row, got none for rows {', '.join(lost)}. Give workers more memory.")
        _write(out, part, "".join(lines[row] for row in part.rows()))


def _summary(out, parts):
    seen, flagged, errors = [], 0, []
    for part in parts:
        for line in _target(out, part).read_text().splitlines():
            row = json.loads(line)
            seen.append(row["row"])
            flagged += row["flagged"]
            errors += [row["row"]] if row["action"] == "error" else []
    if seen != list(range(sum(part.n_rows for part in parts))):
        raise DataError(f"guard_files: {out} must have one verdict per row, got {len(seen)}. Delete the folder and run again.")
    return {"rows": len(seen), "flagged": flagged, "errors": errors}
