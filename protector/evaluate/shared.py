"""What one backbone for both tasks would give: the detoxifier's blocks with a harm head, beside the shipped two models.

    python -m protector.evaluate.shared --train D/train_pairs.jsonl.gz own --measure D/dev_pairs.jsonl.gz

The detector's sequence is the beginning of the detoxifier's prompt (template.py): one model could read an answer once, score its last
state and go on to the rewrite from its cache. No block is trained for that here, so that quality is what a training would begin with;
the other numbers don't depend on weights.

    sources           AUROC of a linear layer on the detoxifier's states at the answers' ends, beside the detector's own
    scoring_ms        an answer's tokens through the detector, as guarding reads them, and through all of the detoxifier's blocks
    first_token_ms    from a verdict to the first rewritten token's logits: the whole prompt, or what stands behind the answer in it
    bytes             of the files loaded
"""
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from .. import data
from ..base import WEIGHTS
from ..bench import Bare, _adapter, _ids, _loaded_bytes, in_turns, seconds
from ..bench_rounds import busy, described, warn, watched
from ..llama import _BATCH_TOKENS, LlamaDetector, LlamaDetoxifier, _Context, cpu_threads
from ..options import option, parsed
from . import record, rows
from .compare import compared, last_logits
from .depth import probe
from .replay import fewest

ANSWER_TOKENS, ROUNDS, REWRITES = (128, 200), 7, 3  # that are scored; measurements of each number; prompts in one of them


@dataclass(frozen=True)
class SharedConfig:
    """Options of `python -m protector.evaluate.shared`."""

    train: tuple[str, ...] = option(("own",), "files of labelled answers that the layer is fitted on")
    measure: tuple[str, ...] = option((), "files of labelled answers that it is measured on")
    sources: tuple[str, ...] = option((), "that are measured; all if empty")
    most: int = option(250, "answers of each source, fitted or measured on; 0 = all")
    detector: str = option("", "GGUF file; the shipped one if empty")
    detoxifier: str = option("", "GGUF file; the shipped one if empty")
    threads: int = option(0, "CPU threads; 0 = all cores that this process may use")
    out: str = option("results", "folder for shared.json")


def run(config):
    """Measure speed, then quality, and write <out>/shared.json.

    Returns:
        dict of kind "shared".
    Raises:
        ValueError: no rows of both labels to fit on, or no source with both to measure on.
    """
    meanwhile, threads = watched(), config.threads or cpu_threads()
    fitted_on = fewest([row for path in config.train for row in rows.read(path)], config.most)
    sources = {source: part for source, part in rows.by_source(fewest([row for path in config.measure for row in rows.read(path)], config.most)).items()
               if len({row.label for row in part}) == 2 and (not config.sources or source in config.sources)}
    if len({row.label for row in fitted_on}) < 2 or not sources:
        raise ValueError("shared: train, and a source of measure, must hold harmful and harmless answers, got none of one. Pass other files.")
    detector = LlamaDetector(config.detector or WEIGHTS / "detector.gguf", n_threads=threads)
    detoxifier = LlamaDetoxifier(config.detoxifier or WEIGHTS / "detoxifier.gguf", n_threads=threads)
    weights, adapter = detoxifier.context.weights, _adapter(detoxifier)
    context, bare = _Context(weights, adapter, detector.longest, True, threads), Bare(weights, threads, adapter)
    result = {"kind": "shared", "threads": threads, "fitted_on": len(fitted_on), "models": {
        name: {"blocks": model.metadata.depth, "quantisation": model.quantisation} for name, model in (("detector", detector), ("detoxifier", detoxifier))},
        "bytes": {"two": _loaded_bytes(detector) + _loaded_bytes(detoxifier), "one": _loaded_bytes(detoxifier)},
        "scoring_ms": {str(n): scoring_ms(detector, context, bare, n) for n in ANSWER_TOKENS}, "first_token_ms": first_token_ms(detoxifier, bare)}
    result |= meanwhile()
    result |= {"busy": busy(result), "sources": quality(detector, context, fitted_on, sources)}
    record.write(config.out, "shared", result, config)
    warn("shared", result)
    return result


def states(context, sequences):
    """Hidden states at the last token of sequences of ids: (n, d) float32, after the final norm."""
    found = []
    for ids in sequences:
        context.clear()
        for begin in range(0, len(ids), _BATCH_TOKENS):
            part = ids[begin:begin + _BATCH_TOKENS]
            context.decode([(token, position, 0, True) for position, token in enumerate(part, begin)])
        found.append(context.hidden(len(part) - 1).copy())  # it is gone with the next decode
    return np.stack(found)


def quality(detector, context, fitted_on, sources):
    """{source: {"n", "harmful", "detector", "one backbone"}}: AUROC with its interval; of the second the paired difference, too."""
    template = detector.template
    ends = states(context, tqdm([template.detector_sequence(
        template.clip_question(row.question)[0], template.encode(row.answer)[:template.limits.window])[0] for row in fitted_on], unit="answer"))
    labels, measured = np.array([row.label for row in fitted_on]), [row for part in sources.values() for row in part]
    backbone = SimpleNamespace(template=template, logits=lambda sequences: probe(ends, labels, states(context, tqdm(sequences, unit="window"))))
    cuts = np.cumsum([len(part) for part in sources.values()])[:-1]
    theirs, ours = (np.split(last_logits(model, measured), cuts) for model in (detector, backbone))
    return {source: {"n": len(part), "harmful": sum(row.label for row in part), "detector": compared(first, first, part),
                     "one backbone": compared(second, first, part)} for (source, part), first, second in zip(sources.items(), theirs, ours)}


def scoring_ms(detector, context, bare, n):
    """Milliseconds to score n answer tokens, by what scores them.

    Trap: where llama.cpp gives states it multiplies every token with the vocabulary, too. "blocks alone" spares that, for all but the
    last token: the least that a file made for both tasks could take.
    """
    start = _ids(detector, 0)[1]
    ids = _ids(detector, start + n)[0]
    functions = {"detector": lambda: detector.running_logits([ids], [start]), "one backbone": lambda: states(context, [ids]),
                 "blocks alone": lambda: bare.read(ids)}
    turns = in_turns({name: lambda work=work: 1e3 * seconds(work) for name, work in functions.items()}, ROUNDS)
    return {name: described(values) for name, values in turns.items()}


def prompts(detoxifier):
    """[(ids that the detector has read as well, ids behind them)] of harmful answers of this project's corpus."""
    template, found = detoxifier.template, []
    for row in data.spread(data.read("own")[1], REWRITES):
        pair = template.clip_question(row.question)[0], template.encode(row.rejected)[:template.limits.rejected_tokens]
        read = template.detector_sequence(*pair)[0]
        found.append((read, template.detoxifier_prompt(*pair)[len(read):]))
    return found


def first_token_ms(detoxifier, bare):
    """Mean milliseconds from a verdict to the first rewritten token's logits, of the whole prompt and with the detector's part in the cache."""
    parts = prompts(detoxifier)

    def cached():
        spent = 0.0
        for read, behind in parts:
            bare.read(read)  # before the verdict
            spent += seconds(lambda: bare.step(behind))
        return 1e3 * spent / len(parts)

    def whole():
        return 1e3 * sum(seconds(lambda: bare.read(read + behind)) for read, behind in parts) / len(parts)

    turns = in_turns({"whole prompt": whole, "cached": cached}, ROUNDS)
    return {"prompt_tokens": np.mean([len(read + behind) for read, behind in parts]), "of_them_cached": np.mean([len(read) for read, _ in parts]),
            **{name: described(values) for name, values in turns.items()}}


def main(argv=None):
    for source, found in run(parsed(SharedConfig, "protector.evaluate.shared", __doc__, argv))["sources"].items():
        print(f"{source:<24} detector {found['detector']['auroc']:.3f}  one backbone {found['one backbone']['auroc']:.3f}")


if __name__ == "__main__":
    sys.exit(main())
