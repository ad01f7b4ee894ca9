"""Ray: guard many answers on many machines, with one class for Ray Data and one function for files.

    one_thread = {"n_threads": 1}
    ray.data.read_parquet(IN).map_batches(GuardBatch, compute=ray.data.ActorPoolStrategy(size=8), num_cpus=1, batch_size=64, fn_constructor_kwargs={
        "detector_options": one_thread, "detoxifier_options": one_thread}).write_parquet(OUT)
    guard_files(["answers.jsonl"], "guarded/", workers=8)      # goes on where it stopped

A bad row gets action "error" and the refusal as its text, and the others their verdicts; guard_files says so, too, of a row that ends
its worker each time. ray itself is imported where workers are started: both also run in one process without it.
"""
import json
import os
import time
from collections import Counter, deque
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..base import WEIGHTS, file_sha256, whole_file
from ..errors import DataError, ProtectorError
from ..evaluate.detectors import named
from ..guard import Protector

_TRIES = 2  # of a part, and then of each of its rows, before what ended its worker is known


class GuardBatch:
    """Adds action, flagged, score, text and error to each row of a batch, in place of columns of these names.

    Args:
        question, answer: names of the columns; a row without a question is scored on its answer alone.
        options: of guard.Protector. One thread per actor (`detector_options={"n_threads": 1}`) and an actor per core is the
            way to fill CPUs; `backend="torch"` with `num_gpus=1` is the one for GPUs. A path must be absolute where workers have another folder.
    Traps: Ray Data starts a dead actor again for ever, and a row that ends its worker each time never lets the job end. guard_files finds it.
        Reading and writing take CPUs, too: actors that hold all of them wait for rows for ever. A column of yours that is None throughout
        a batch loses its type.
    Example:
        GuardBatch()({"question": np.array(["Hi?"]), "answer": np.array(["Hello."])})["action"]  # array(["pass"])
    """

    def __init__(self, question="question", answer="answer", **options):
        if options.get("on_error") == "raise":
            raise ValueError("GuardBatch: on_error must be refuse or pass, got raise. One row would end the job.")
        self.question, self.answer, self.protector = question, answer, Protector(**options)

    def __call__(self, batch):
        """Ray Data's numpy batch {column: (n,) array} -> the same with five columns more; score is NaN after an error, error "" without one."""
        n = len(batch[self.answer])
        rows = self.rows([{name: _value(batch[name][i]) for name in (self.question, self.answer) if name in batch} for i in range(n)])
        # Never None: Arrow gives a column of None alone another type, and then the Parquet files of one job have two schemas.
        new = {name: np.array([row[name] or "" for row in rows], dtype=object) for name in ("action", "text", "error")}
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
        _write(_target(out, part), self.lines(part))
        return part.n_rows

    def lines(self, part, deadly=False):
        """The JSON lines of one part of a file, guarded; deadly: as of rows."""
        with open(part.path, "rb") as file:
            file.seek(part.offset)
            rows = [_parsed(file.readline()) for _ in range(part.n_rows)]
        return "".join(json.dumps({**(row if isinstance(row, dict) else {}), "source_row": part.first_row + i, **new}) + "\n"
                       for i, (row, new) in enumerate(zip(rows, self.rows(rows, deadly))))


def _value(value):
    """None for the NaN that Ray gives for it where a block has nothing else in that column."""
    return None if isinstance(value, (float, np.floating)) and value != value else value


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


def _write(target, text):
    # A part that is run twice, because its worker died, is written by two processes, of two machines even: each has its own file until it is whole.
    with whole_file(target) as partial:
        Path(partial).write_text(text)


def _sha256(model, shipped):
    """sha256 of the file, or of each file of the folder, that Protector(detector=model) reads; of a loaded model its own, where it has one."""
    if model is not None and not isinstance(model, (str, os.PathLike)):
        return named(model)["sha256"]
    path = WEIGHTS / shipped if model is None else Path(model)
    names = ("protector.json", "model.safetensors", "calibration.json") if path.is_dir() else ("",)
    return [file_sha256(path / name) for name in names if (path / name).is_file()]


def parts_of(sources, rows):
    """Cut JSONL files into parts of at most `rows` lines. A blank line is a bad row: numbers are those of the lines."""
    if rows < 1:
        raise ValueError(f"parts_of: rows must be at least 1, got {rows}. Leave it out for 256.")
    parts, first_row = [], 0
    for path in sources:
        with open(path, "rb") as file:
            offset = 0
            while n_rows := sum(1 for _ in islice(file, rows)):
                parts.append(Part(len(parts), str(path), offset, first_row, n_rows))
                offset, first_row = file.tell(), first_row + n_rows
    return parts


def guard_files(sources, out, workers=0, rows=256, num_cpus=1, num_gpus=0, **options):
    """Guard every line of JSONL files into <out>/part-*.jsonl, one verdict per row; a second call goes on where it stopped.

    Each is the line's own fields and, in place of fields of these names, source_row (its number over all sources, from 0), action, flagged,
    score, text and error. A row that ends its worker, alone and at each try, gets action "error" as other bad rows do; without ray it ends
    this process.

    Args:
        sources: JSONL files, and out: a folder; every worker must see both at the same absolute path.
        workers: Ray actors; 0 works in this process, without ray. Those that Ray has no place for yet aren't waited for.
        rows: lines of one part: what is lost when a worker dies, and done again by another.
        num_cpus, num_gpus: that Ray reserves for each actor.
        options: of GuardBatch. Relative paths of the two models are this process's; those within detector_options are each worker's.
    Returns:
        {"rows": n, "flagged": n, "errors": [source_row of each bad row]}
    Raises:
        DataError: <out> holds parts of another job, of other weights or without a job.json, or a row doesn't have exactly one verdict.
        ValueError: rows is below 1.
    """
    # Not resolved: a link may lead elsewhere on a worker's machine.
    sources, out = [Path(path).absolute() for path in sources], Path(out).absolute()
    models = {kind: options.get(kind) for kind in ("detector", "detoxifier")}
    paths = {kind: str(Path(model).absolute()) for kind, model in models.items() if isinstance(model, (str, os.PathLike))}
    sha256 = {kind: _sha256(model, f"{kind}.gguf") for kind, model in models.items()}
    # A model is named by its hash: a path may be spelled otherwise, and a loaded one's repr is its address in this process.
    others = sorted(item for item in options.items() if not (models.get(item[0]) and sha256[item[0]]))
    job = json.dumps({"sources": [file_sha256(path) for path in sources], "rows": rows, "options": repr(others), "sha256": list(sha256.values())})
    options = {**options, **paths}
    out.mkdir(parents=True, exist_ok=True)
    known = (out / "job.json").read_text() if (out / "job.json").exists() else None
    if known != job and (known is not None or any(out.glob("part-*.jsonl"))):
        got = "parts without a job.json" if known is None else "another's parts"
        raise DataError(f"guard_files: {out} must be a new folder or of this job, got {got}. Choose another folder.")
    _write(out / "job.json", job)
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
        # Workers that still start aren't waited for: with more of them than Ray has CPUs, some never do. They go with `running`.
        while items or any(item is not None for _, item in running.values()):
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
        _write(_target(out, part), "".join(lines[row] for row in part.rows()))


def _summary(out, parts):
    flagged, errors = 0, []
    for part in parts:
        with open(_target(out, part)) as file:
            rows = [json.loads(line) for line in file]
        if [row["source_row"] for row in rows] != list(range(part.first_row, part.first_row + part.n_rows)):
            raise DataError(f"guard_files: {_target(out, part)} must have one verdict for each of {part.n_rows} rows, got {len(rows)}. "
                            "Delete it and run again.")
        flagged += sum(row["flagged"] for row in rows)
        errors += [row["source_row"] for row in rows if row["action"] == "error"]
    return {"rows": sum(part.n_rows for part in parts), "flagged": flagged, "errors": errors}
