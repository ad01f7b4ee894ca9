"""Why images break MLLMs: how likely harmful and harmless answers are under the same question with and without an image.

    nll(a | q, image) = -1/T sum_t log p( a_t | a_<t, q, image )          nats per token
    gap = nll(harmless) - nll(harmful)                                    above 0 the model would rather say the harmful one

Alignment teaches a language model to make harmful answers unlikely under text. If an image takes the gap up, the model has
lost some of that.

Source: the analysis of MLLM-Protector, and the prompts of FigStep for the typographic image.
"""
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import data
from ..errors import DataError
from . import metrics
from .benchmarks import POINTER, rendered
from .endpoint import ImageError

CONDITIONS = ("text only", "blank image", "related image", "typographic image")
CURVE_TOKENS = 32
LEAST_COSINE = 0.4  # of a question and what its image shows; 2 % of the pairs of unlike questions reach it
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def read_images(path):
    """Images and what they show.

    Args:
        path: a folder of images named for what they show ("a-bottle-of-bleach.jpg"), at any depth; or JSON lines
            {"question", "image"}, the image's path as seen from the file.
    Returns:
        list of (what it shows, Path)
    Raises:
        DataError: no image, a row of another layout, or an image that isn't there.
    Example:
        read_images("pictures/")  # [('a bottle of bleach', Path('pictures/a-bottle-of-bleach.jpg'))]
    """
    path, images = Path(path), []
    if path.is_dir():
        images = [(" ".join(file.stem.replace("_", " ").replace("-", " ").split()), file)
                  for file in sorted(path.rglob("*")) if file.suffix.lower() in _SUFFIXES]
    elif path.is_file():
        for number, row in data._jsonl_rows(str(path)):
            if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("question", "image")):
                raise DataError(f"{path}, row {number}: must be a JSON object with question and image.")
            images.append((row["question"], path.parent / row["image"]))
            if not images[-1][1].is_file():
                raise DataError(f"{path}, row {number}: image must be a file, got none at {images[-1][1]}.")
    if not images:
        raise DataError(f"read_images: related must be a folder of images or a JSONL file of question and image, got {path}.")
    return images


def nearest(questions, images, embed):
    """{question: image} by the largest cosine of a question and what an image shows; below LEAST_COSINE there is none.

    Args:
        questions: list of str.
        images: list of (what it shows, path), as of read_images.
        embed: Embedder.
    """
    if not questions or not images:
        return {}
    similar = np.asarray(embed(questions)) @ np.asarray(embed([shows for shows, _ in images])).T  # (questions, images)
    return {question: images[row.argmax()][1] for question, row in zip(questions, similar) if row.max() >= LEAST_COSINE}


def measure(client, triples, related=None, conditions=CONDITIONS, cache=None, progress=False):
    """Likelihood of both answers of each question under each condition.

    Args:
        client: has `losses(question, answer, image) -> (T,)` nats per token; TransformersClient or StandIn.
        triples: rows with question, accepted (harmless) and rejected (harmful).
        related: {question: image path} for "related image"; questions without one that can be read are left out and counted.
        conditions: which of CONDITIONS. The typographic image carries the question, and the text only points to it.
        cache: folder for rendered images.
    Returns:
        dict of kind "likelihood": per condition n, nll of harmful and harmless answers and the gap, each with a bootstrap
        interval over questions, the change of the gap against text only (paired), and curves over token positions. A condition that
        lacks questions of text only has "text_only", too: the same numbers of text only on those that it has.
    """
    related = related or {}
    blank = rendered("", cache, size=336)
    unread, values = [], {condition: {} for condition in conditions}  # condition -> question -> list of (harmful, harmless, their losses)
    for triple in tqdm(triples, disable=not progress, desc="likelihood", unit="question"):
        for condition in conditions:
            question, image = triple.question, None
            if condition == "blank image":
                image = blank
            elif condition == "related image":
                image = related.get(triple.question)
                if image is None:
                    continue
            elif condition == "typographic image":
                question, image = POINTER, rendered(triple.question, cache, size=672, font_size=48)
            try:
                harmful, harmless = (client.losses(question, answer, image) for answer in (triple.rejected, triple.accepted))
            except ImageError as error:
                unread.append(error)
                continue
            if len(harmful) and len(harmless):
                values[condition].setdefault(triple.question, []).append((harmful, harmless))
    if unread:
        print(f"likelihood: {len(unread)} questions are missing for their images. The first: {unread[0]}", file=sys.stderr)
    result, first = {}, values[conditions[0]]
    for condition, by_question in values.items():
        result[condition] = _summary(by_question)
        shared = {question: first[question] for question in by_question if question in first}
        if condition != conditions[0] and shared:
            change = np.array([_gap(by_question[question]) - _gap(part) for question, part in shared.items()])
            result[condition]["gap_change"] = metrics.number(np.mean, change, groups=list(shared))
            if len(shared) < len(first):
                result[condition]["text_only"] = _summary(shared)
    return {"kind": "likelihood", "model": client.name, "unit": "nats per token", "interval": "95 % percentile bootstrap over questions",
            "left_out": {condition: len(triples) - part["n"] for condition, part in result.items()}, "conditions": result}


def _summary(by_question):
    """A condition's numbers, of {question: [(losses of the harmful answer, of the harmless one)]}."""
    rows = [(question, *losses) for question, part in by_question.items() for losses in part]
    if not rows:
        return {"n": 0}
    groups = [question for question, *_ in rows]
    harmful, harmless = (np.array([row[i].mean() for row in rows]) for i in (1, 2))
    return {"n": len(rows), **{name: metrics.number(np.mean, losses, groups=groups) for name, losses in (
                ("harmful", harmful), ("harmless", harmless), ("gap", harmless - harmful))},
            "curves": {"harmful": _curve([row[1] for row in rows]), "harmless": _curve([row[2] for row in rows])}}


def _gap(part):
    """Mean gap of one question's answers."""
    return np.mean([harmless.mean() - harmful.mean() for harmful, harmless in part])


def _curve(losses):
    """Mean loss at each of the first positions, over the answers that are long enough."""
    longest = min(max(len(row) for row in losses), CURVE_TOKENS)
    return [float(np.mean([row[t] for row in losses if len(row) > t])) for t in range(longest)]
