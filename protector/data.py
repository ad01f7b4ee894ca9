"""Read, check, split, balance and fingerprint the training data.

    pairs    (question, answer, label)         label 1 = harmful          -> detector
    triples  (question, accepted, rejected)    the paper's data           -> detoxifier; as two pairs each, detector

Layouts, recognised by content:
    JSONL, .gz too   {"question","answer","label"} or, the paper's way, {"question","answer","h"} with h = 1 harmless;
                     "grade" beside or in place of them is P(harmful) as a grader sees it, from 0 to 1
                     {"question","accepted","rejected"}
    PKU-SafeRLHF     {"prompt","response_0","response_1","is_response_0_safe","is_response_1_safe"}, a JSONL file,
                     or "hub:PKU-Alignment/PKU-SafeRLHF" (the only path that uses the network, through `datasets`)
    PyRIT            the wheel `pyrit-*.whl` or a folder with its human-scored CSVs
    "own"            the rows that this package ships in protector/corpus/
"""
import csv
import gzip
import hashlib
import io
import json
import random
import re
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from .base import whole_file
from .errors import DataError

MAX_TEXT_BYTES = 1 << 20  # a training text above this is a broken row, not an answer
CORPUS = Path(__file__).parent / "corpus"
REPLIES = Path(__file__).parent / "replies.jsonl"  # accepted answers of this project to questions of public sets, by their digest
GRADES = Path(__file__).parent / "grades.jsonl"  # how harmful answers of public sets are, as this project had them graded, by their digest
_PYRIT_CSVS = "datasets/scorer_evals/harm/"


@dataclass(frozen=True)
class Pair:
    """One labelled answer."""

    question: str
    answer: str
    label: int  # 1 = harmful
    source: str = ""
    weight: float = 1.0  # of this row in the loss; below 1 for weak or relative labels
    grade: float | None = field(default=None, repr=False)  # P(harmful) by a grader, the loss's target in place of the label

    @property
    def target(self):
        """What the loss compares the score with: the grade where there is one, else the label."""
        return float(self.label if self.grade is None else self.grade)


@dataclass(frozen=True)
class Triple:
    """One question with an accepted (harmless) and a rejected (harmful) answer."""

    question: str
    accepted: str
    rejected: str
    source: str = ""
    weight: float = 1.0  # of its two pairs in a detector's loss


def read(path, unlabelled=None):
    """Every pair and triple in one file, folder or named source, in file order.

    Args:
        path: a file, a folder of PyRIT's CSVs, "own", or "hub:OWNER/NAME".
        unlabelled: label of answers that have none; they are an error if None.
    Returns:
        (list of Pair, list of Triple)
    Raises:
        DataError: names the file, the row (from 1) and the rule that it breaks.
    Example:
        pairs, triples = read("own")
    """
    path = str(path)
    if path == "own":
        parts = [read(file) for file in sorted(CORPUS.glob("*.jsonl"))]
        return sum((pairs for pairs, _ in parts), []), sum((triples for _, triples in parts), [])
    if path.startswith("hub:"):
        rows = enumerate(_hub_rows(path[4:]), 1)
    elif not Path(path).exists():
        raise DataError(f"read: path must be an existing file, got {path}. Check the path.")
    elif path.endswith(".whl") or Path(path).is_dir():
        rows = _pyrit_rows(Path(path))
    else:
        rows = _jsonl_rows(path)
    pairs, triples = [], []
    for number, row in rows:
        try:
            if unlabelled is not None and isinstance(row, dict) and not {"label", "h", "grade"} & row.keys():
                row = {**row, "label": unlabelled}
            _sort(row, pairs, triples, Path(path).name.split(".")[0])
        except (KeyError, TypeError, ValueError) as error:
            reason = f"column {error} is missing" if isinstance(error, KeyError) else error
            raise DataError(f"{path}, row {number}: {reason}") from None
    if not pairs and not triples:
        raise DataError(f"{path}: holds no rows. A data file has one JSON object per line.")
    return pairs, triples


def pairs_of(triples):
    """Each triple as two pairs: the accepted answer is harmless, the rejected one harmful."""
    return [Pair(t.question, answer, label, t.source, t.weight)
            for t in triples for answer, label in ((t.accepted, 0), (t.rejected, 1))]


def triples_of(pairs, most_per_question=2, seed=0):
    """Pair each question's harmful answers with its harmless ones; questions that have only one kind give none."""
    rng, by_question, triples = random.Random(seed), {}, []
    for pair in pairs:
        by_question.setdefault(_question_key(pair), ([], []))[pair.label].append(pair)
    for harmless, harmful in by_question.values():
        if harmless and harmful:
            for _ in range(min(most_per_question, max(len(harmless), len(harmful)))):
                good, bad = rng.choice(harmless), rng.choice(harmful)
                triples.append(Triple(bad.question, good.answer, bad.answer, bad.source))
    return triples


def replies(path=REPLIES, kind="accepted"):
    """{digest of a question: answers of a kind}: the questions are other people's data, what is answered to them is this project's.

    Args:
        kind: "accepted", some forty words in the tone of a person, or "plain", two short sentences that a small model learns to write.
    """
    return {row["question_sha256"]: row[kind] for _, row in _jsonl_rows(str(path)) if kind in row}


def replied(triples, found):
    """The triples with replies in place of their accepted answers, where their question has some: each in its turn.

    Jailbreak sets have a stock refusal there, or nothing at all that suits the question.

    Args:
        triples: list of Triple. found: what replies() gives.
    Returns:
        list of Triple of the same length.
    Example:
        replied([Triple("Q?", "Sorry.", "Do it.")], {question_digest("Q?"): ["Q hurts."]})[0].accepted  # "Q hurts."
    """
    turns, changed = Counter(), []
    for triple in triples:
        digest = question_digest(triple.question)
        if digest in found:
            triple = replace(triple, accepted=found[digest][turns[digest] % len(found[digest])])
            turns[digest] += 1
        changed.append(triple)
    return changed


def pairs_with_replies(pairs, found):
    """A harmless pair for each reply to a question that the pairs hold."""
    questions = {question_digest(pair.question): pair.question for pair in pairs if pair.question.strip()}
    return [Pair(questions[digest], answer, 0, "replies") for digest, answers in found.items() if digest in questions for answer in answers]


def question_digest(question):
    """The first 16 hex digits of a question's sha256, spaces and case aside."""
    return _digest(folded(question))


def grades(path=GRADES):
    """{digest of an answer to a question: P(harmful)}: the texts are other people's data, the grades are this project's."""
    return {row["answer_sha256"]: row["grade"] for _, row in _jsonl_rows(str(path)) if "answer_sha256" in row}


def pairs_of_grades(pairs, path=GRADES):
    """A pair for each graded answer that stands in the file whole and whose question, named by its digest, the pairs hold."""
    questions = {question_digest(pair.question): pair.question for pair in pairs if pair.question.strip()}
    return [Pair(questions[row["question_sha256"]], row["answer"], int(row["grade"] >= 0.5), "answers", grade=row["grade"])
            for _, row in _jsonl_rows(str(path)) if row.get("question_sha256") in questions]


def graded(pairs, found):
    """The pairs with grades as their targets where they have one, and the label that the grade rounds to.

    A label that is relative (the worse of two) or a weaker model's says less than a grade of the answer itself.

    Args:
        pairs: list of Pair. found: what grades() gives.
    Returns:
        list of Pair of the same length.
    Example:
        graded([Pair("Q?", "A.", 1)], {answer_digest("Q?", "A."): 0.25})[0].label  # 0
    """
    known = [found.get(answer_digest(pair.question, pair.answer)) for pair in pairs]
    return [pair if grade is None else replace(pair, label=int(grade >= 0.5), grade=grade) for pair, grade in zip(pairs, known)]


def answer_digest(question, answer):
    """The first 16 hex digits of the sha256 of a question and an answer, spaces and case aside."""
    return _digest(f"{folded(question)}\0{folded(answer)}")


def _digest(text):
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def unique(rows):
    """Rows without exact repeats, in order; a pair that stands with both labels is left out altogether."""
    labels = {}
    for row in rows:
        labels.setdefault(_text_key(row), set()).add(getattr(row, "label", 0))
    kept = {}
    for row in rows:
        if len(labels[_text_key(row)]) == 1:
            kept.setdefault(_text_key(row), row)
    return list(kept.values())


def split(rows, held_out=0.1, seed=0):
    """Split by question, so that no question stands on both sides: (training rows, held-out rows).

    A question's side depends on its text and the seed alone, not on the other rows.
    """
    sides = ([], [])
    for row in rows:
        digest = hashlib.sha256(f"{seed}\0{_question_key(row)}".encode("utf-8", "replace")).digest()
        sides[int.from_bytes(digest[:8], "big") < held_out * 2**64].append(row)
    return sides


def write_parts(path, folder, parts, seed=0):
    """Split one source of labelled pairs by question into JSONL files.

    Args:
        path: what read() takes.
        folder: where <name>.jsonl is written, whole or not at all.
        parts: {name: share}; shares sum to 1.
    Returns:
        {name: number of rows}
    """
    if not parts or not all(share > 0 for share in parts.values()) or abs(sum(parts.values()) - 1) > 1e-6:
        raise ValueError("write_parts: shares must be positive and sum to 1. Example: train=0.7 test=0.3")
    pairs, triples = read(path)
    rest, left, counts = unique(pairs + pairs_of(triples)), 1.0, {}
    for name, share in parts.items():
        rest, mine = split(rest, min(share / left, 1.0), seed=f"{seed}-{name}")
        left -= share
        counts[name] = len(mine)
        with whole_file(Path(folder) / f"{name}.jsonl") as partial, open(partial, "w", encoding="utf-8") as file:
            for row in mine:
                grade = {} if row.grade is None else {"grade": row.grade}
                file.write(json.dumps({"question": row.question, "answer": row.answer, "label": row.label,
                                       "source": row.source, "weight": row.weight, **grade}) + "\n")
    return counts


def balance(rows, n, exponent=0.5, source_weights=None, seed=0):
    """Draw n rows so that a question with many answers doesn't rule: P(row) ~ source weight / count(question)^exponent.

    Systematic sampling: a row that is due k + f times comes k times, and once more with probability f.

    Args:
        exponent: 0 takes rows as they come, 1 gives every question the same share.
        source_weights: {source: factor}, 1 where not named; 0 leaves a source out.
    Returns:
        list of n rows in random order.
    """
    source_weights = source_weights or {}
    counts = Counter((row.source, _question_key(row)) for row in rows)
    shares = [source_weights.get(row.source, 1.0) / counts[row.source, _question_key(row)] ** exponent for row in rows]
    total = sum(shares)
    if not total > 0:
        raise DataError("balance: rows must have a positive share, got none. Check the source weights.")
    rng = random.Random(seed)
    order = list(range(len(rows)))
    rng.shuffle(order)
    drawn, due, at = [], 0.0, rng.random()
    for i in order:
        due += n * shares[i] / total
        while at < due and len(drawn) < n:
            drawn.append(rows[i])
            at += 1
    rng.shuffle(drawn)
    return drawn


def spread(rows, n):
    """n of the rows in even steps over all of them; all, if there are no more.

    Example:
        spread(range(10), 4)  # [0, 2, 5, 7]
    """
    return [rows[i * len(rows) // n] for i in range(n)] if n < len(rows) else list(rows)


_STOCK_REFUSAL = re.compile(
    r"\s*(?:i(?:'| a)?m (?:really |very |so )?sorry|sorry|i apologi[sz]e|my apologies|unfortunately|as an ai|"
    r"i (?:can(?:'|no)?t|am unable|am not able|cannot|can not|will not|won't|do not feel|must decline|refuse))\b", re.IGNORECASE)


def is_stock_refusal(text):
    """Whether an answer opens as a refusal that would fit any question.

    Example:
        is_stock_refusal("I'm sorry, but I can't help with that.")  # True
    """
    return _STOCK_REFUSAL.match(text.replace("\u2019", "'")) is not None


def cap_refusals(triples, share, seed=0):
    """Drop triples at random until at most this share of the accepted answers are stock refusals.

    A detoxifier that is trained on refusals alone learns one sentence for every question.
    """
    refusals = [triple for triple in triples if is_stock_refusal(triple.accepted)]
    n_others = len(triples) - len(refusals)
    keep = {id(triple) for triple in random.Random(seed).sample(
        refusals, min(len(refusals), int(n_others * share / (1 - share)) if share < 1 else len(refusals)))}
    return [triple for triple in triples if id(triple) in keep or not is_stock_refusal(triple.accepted)]


def fingerprint(rows):
    """sha256 of the rows, whatever their order: it says which data a model saw."""
    # A row without a grade counts as it did before there were grades.
    texts = [repr(row) + ("" if getattr(row, "grade", None) is None else repr(row.grade)) for row in rows]
    digests = sorted(hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in texts)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def folded(text):
    """A text without what questions that are the same may differ in: case and white space."""
    return " ".join(text.lower().split())


def _question_key(row):
    # Answer-only rows have no question to share: each stands for itself.
    return folded(row.question) or "\0" + (getattr(row, "answer", "") or row.rejected)


def _text_key(row):
    return (row.question, row.answer) if isinstance(row, Pair) else (row.question, row.accepted, row.rejected)


def _sort(row, pairs, triples, source):
    """Check one raw row and append it as Pair or Triple; KeyError, TypeError or ValueError say what is wrong."""
    if not isinstance(row, dict):
        raise ValueError("must be a JSON object")
    if "prompt" in row and "response_0" in row:
        prompt = _text(row, "prompt", empty=True)
        # The paper's h: 1 = harmless. Flipped here and in `_label`, nowhere else.
        answers = [(_text(row, f"response_{i}"), 1 - _bit(row[name], name))
                   for i, name in enumerate(("is_response_0_safe", "is_response_1_safe"))]
        pairs += [Pair(prompt, answer, label, source) for answer, label in answers]
        if answers[0][1] != answers[1][1]:
            (good, _), (bad, _) = sorted(answers, key=lambda item: item[1])
            triples.append(Triple(prompt, good, bad, source))
        return
    question = _text(row, "question", empty=True)
    source, weight = str(row.get("source") or source), row.get("weight", 1.0)
    if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        # A message never shows what a column holds: it may be text in the wrong place.
        raise ValueError(f"weight must be a finite number >= 0, got {type(weight).__name__}")
    weight = float(weight)
    if "rejected" in row:
        triples.append(Triple(question, _text(row, "accepted"), _text(row, "rejected"), source, weight))
    else:
        grade = row.get("grade")
        if grade is not None and (isinstance(grade, bool) or not isinstance(grade, (int, float)) or not 0 <= grade <= 1):
            raise ValueError(f"grade must be a number from 0 to 1, got {grade if isinstance(grade, (int, float)) else type(grade).__name__}")
        label = int(grade >= 0.5) if grade is not None and not {"label", "h"} & row.keys() else _label(row)
        pairs.append(Pair(question, _text(row, "answer"), label, source, weight, grade))


def _label(row):
    if "label" not in row and "h" in row:
        return 1 - _bit(row["h"], "h")  # the paper's h is 1 for harmless
    return _bit(row["label"], "label")


def _bit(value, name):
    if value not in (0, 1) or isinstance(value, str):
        raise ValueError(f"{name} must be 0 or 1, got {type(value).__name__}")
    return int(value)


def _text(row, name, empty=False):
    value = row[name]
    if value is None and empty:
        value = ""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {type(value).__name__}")
    if not value.strip() and not empty:
        raise ValueError(f"{name} must not be empty")
    if len(value) > MAX_TEXT_BYTES or len(value.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
        raise ValueError(f"{name} must be at most {MAX_TEXT_BYTES} bytes, got more")
    return value


def _jsonl_rows(path):
    opener = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as lines:  # a text file decodes ahead, and its error would name an earlier row
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line.decode())
    except (ValueError, RecursionError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        # The decoder's own message may quote the row, which is not for a log.
        row = number if isinstance(error, (ValueError, RecursionError)) else number + 1
        raise DataError(f"{path}, row {row}: must be one JSON object in UTF-8 per line, got "
                        f"{type(error).__name__}.") from None


def _hub_rows(name):
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("read: hub:... needs the package datasets. Run: pip install datasets") from None
    return load_dataset(name, split="train")


def _pyrit_rows(path):
    """Human-scored rows; the mean score is the label where it is clear: up to 0.2 harmless, from 1/3 harmful."""
    if path.is_dir():
        files = {str(file): file.read_bytes() for file in sorted(path.rglob("*.csv"))}
    else:
        try:
            with zipfile.ZipFile(path) as wheel:
                files = {name: wheel.read(name) for name in sorted(wheel.namelist())
                         if _PYRIT_CSVS in name and name.endswith(".csv")}
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DataError(f"{path}: must be a whole wheel, got {type(error).__name__}. Download it again.") from None
    if not files:
        raise DataError(f"{path}: holds no CSV under {_PYRIT_CSVS}. Pass the wheel pyrit-*.whl or its folder.")
    for name, content in files.items():
        number = 0
        try:
            lines = io.StringIO(content.decode("utf-8-sig"))
            first = lines.readline()
            if not first.startswith("#"):  # the files begin with a version line, not with the header
                lines.seek(0)
            for number, row in enumerate(csv.DictReader(lines), 1):
                scores = [float(row[key]) for key in row if key and key.startswith("human_score") and row[key]]
                mean = sum(scores) / len(scores) if scores else 0.25
                if mean <= 0.2 or mean >= 0.33:
                    yield f"{Path(name).name}:{number}", {"question": row["objective"], "answer": row["assistant_response"],
                                                          "label": int(mean >= 0.33), "source": "pyrit"}
        except (ValueError, KeyError, csv.Error) as error:
            raise DataError(f"{path}, row {Path(name).name}:{number}: must have objective, assistant_response and numbers as "
                            f"human_score, got {type(error).__name__}. Download it again.") from None
