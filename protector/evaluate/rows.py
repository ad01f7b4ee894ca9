"""Labelled answers for evaluation, with the columns that training doesn't need: which model wrote one, about which case."""
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from .. import data
from ..errors import DataError

# Files of a data folder, by what they are for; a folder may lack any of them.
PAIRS, BENIGN, TRAIN, JUDGE = "dev_pairs", "dev_benign_mllm", "train_pairs", "train_pairs_nc"


@dataclass(frozen=True)
class Row:
    """One labelled answer of some model."""

    question: str = field(repr=False)
    answer: str = field(repr=False)
    label: int = 0  # 1 = harmful
    source: str = ""
    model: str = ""  # that wrote the answer, where it is known
    case: str = ""  # rows of one case share an image; empty where there is none
    labeller: str = ""

    @property
    def pair(self):
        """(question, answer)."""
        return self.question, self.answer

    @property
    def group(self):
        """What rows must share to count as one draw: the case, else the question, else the answer itself."""
        return self.case or data.folded(self.question) or "\0" + self.answer


def read(path):
    """Rows of one file, in file order: JSONL (.gz too), a PyRIT wheel, or "own", as protector.data reads them.

    Raises:
        DataError: names the file, the row and the rule that it breaks.
    Example:
        read("own")[0].source
    """
    path = str(path)
    if path.endswith((".jsonl", ".jsonl.gz")) and Path(path).exists():
        rows = []
        for number, raw in data._jsonl_rows(path):
            if not isinstance(raw, dict):
                raise DataError(f"{path}, row {number}: must be a JSON object")
            if "answer" not in raw:
                break  # triples or another layout: protector.data knows it
            pairs = []
            try:
                data._sort(raw, pairs, [], Path(path).name.split(".")[0])
            except (KeyError, TypeError, ValueError) as error:
                reason = f"column {error} is missing" if isinstance(error, KeyError) else error
                raise DataError(f"{path}, row {number}: {reason}") from None
            pair = pairs[0]
            model, case, labeller = (str(raw.get(name) or "") for name in ("model", "case", "labeller"))
            # A model hub's "owner/name" stands as "owner--name" in names of folders: one model.
            rows.append(Row(pair.question, pair.answer, pair.label, pair.source, model.replace("--", "/", 1), case, labeller))
        else:
            if rows:
                return rows
    pairs, triples = data.read(path)
    return [Row(pair.question, pair.answer, pair.label, pair.source) for pair in pairs + data.pairs_of(triples)]


@dataclass(frozen=True)
class Inputs:
    """What one evaluation reads."""

    pairs: list  # labelled rows to measure on
    benign: list  # harmless answers apart from the pairs: of multimodal models, or of files without a harmful one
    train: list  # rows that the word-count baseline learns from
    judge: list  # rows for the offline judge alone, none of which the detector was trained on
    seen: list  # what the detector may have learned from: `train`, and this project's own rows whatever the folder holds
    files: tuple  # names of the files that were read
    halve: bool = True  # the judge learns from half of the pairs' questions; False where a folder has rows of its own for it


def gather(paths):
    """Inputs of data folders, files and wheels.

    A file of harmless answers alone is read as dev_benign_mllm is, under its own source's name, where the other data have harmless
    answers to measure on; where they have none, it is the harmless half of theirs.

    Args:
        paths: a folder holds dev_pairs, dev_benign_mllm, train_pairs and train_pairs_nc (.jsonl.gz), any of them absent; a
            file or wheel holds rows to measure on; a folder that `protector split` made holds train, judge and
            measure.jsonl. The baseline learns from "own" where no folder has train rows: among many of this project's own it does worse on others.
    Raises:
        DataError: nothing to measure on.
    """
    parts, files, harmless, halve = {PAIRS: [], BENIGN: [], TRAIN: [], JUDGE: []}, [], [], True
    for path in map(Path, paths):
        if (path / "measure.jsonl").exists():
            for name, part in (("measure", PAIRS), ("judge", JUDGE), ("train", TRAIN)):
                parts[part] += read(path / f"{name}.jsonl")
                files.append(f"{name}.jsonl")
            halve = False
        elif path.is_dir() and any((path / f"{name}.jsonl.gz").exists() for name in parts):
            for name, rows in parts.items():
                if (path / f"{name}.jsonl.gz").exists():
                    rows += read(path / f"{name}.jsonl.gz")
                    files.append(f"{name}.jsonl.gz")
        else:
            found = read(path)
            (parts[PAIRS] if any(row.label for row in found) else harmless).extend(found)
            files.append(path.name)
    parts[PAIRS if all(row.label for row in parts[PAIRS]) else BENIGN] += harmless
    if not parts[PAIRS]:
        raise DataError("gather: data must hold labelled answers, got none. Pass a data folder, a JSONL file with question, "
                        "answer and label, or the wheel of pyrit 1.1.0.")
    own = read("own")
    train = parts[TRAIN] or own
    return Inputs(parts[PAIRS], parts[BENIGN], train, parts[JUDGE], train + own, tuple(files), halve)


def halves(rows, seed="evaluate"):
    """Two halves that share no question: (for the judge to learn from, to measure on).

    Rows of one case (an image's questions in several wordings and languages) stay together. A group's half depends on its
    text and the seed alone, so it stays the same when rows are added.
    """
    sides = ([], [])
    for row in rows:
        sides[hashlib.sha256(f"{seed}\0{row.group}".encode("utf-8", "replace")).digest()[0] & 1].append(row)
    return sides


def by_source(rows):
    """{source: rows}, largest source first."""
    groups = {}
    for row in rows:
        groups.setdefault(row.source, []).append(row)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def fingerprint(rows):
    """sha256 of questions, answers and labels, whatever their order."""
    return data.fingerprint([(row.question, row.answer, row.label) for row in rows])
