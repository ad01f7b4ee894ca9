"""Would prompt lookup make rewrites faster? What followed the last tokens earlier in the text is guessed to follow again; one decode checks it.

    python -m protector.evaluate.lookup --measure D/dev_pairs.jsonl.gz --sources beavertails_test_NC pyrit

Nothing is guessed here while writing: the guard's greedy rewrites are replayed, and the decodes that guessing would have taken are
counted and timed by their sizes.

    speed-up = sum of ms(1) over the tokens written / sum of ms(1 + its guesses) over the decodes
"""
import sys
from dataclasses import dataclass
from itertools import product

import numpy as np
from tqdm import tqdm

from ..base import WEIGHTS
from ..bench import in_turns, seconds
from ..bench_rounds import busy, described, warn, watched
from ..engine import llama_cpp
from ..llama import LlamaDetoxifier, cpu_threads
from ..options import option, parsed
from . import metrics, record, rows
from .replay import fewest

GUESSES, LONGEST, ROUNDS = (1, 2, 4, 8), 3, 15  # most tokens guessed at once; most last tokens that are looked up; measurements of each size
CACHED = 128  # tokens in the cache while decodes are timed


@dataclass(frozen=True)
class LookupConfig:
    """Options of `python -m protector.evaluate.lookup`."""

    measure: tuple[str, ...] = option(("own",), "files of labelled answers; the harmful ones are rewritten")
    sources: tuple[str, ...] = option((), "that are rewritten; all if empty")
    most: int = option(20, "harmful answers of each source; 0 = all")
    detoxifier: str = option("", "GGUF file; the shipped one if empty")
    threads: int = option(0, "CPU threads; 0 = all cores that this process may use")
    out: str = option("results", "folder for lookup.json")


def guess(ids, most, least=1):
    """What followed the latest earlier place of the last LONGEST tokens, or of fewer down to `least`: at most `most` ids, [] without such a place.

    Example:
        guess([1, 2, 3, 4, 1, 2], 2)  # [3, 4]
    """
    for n in range(LONGEST, least - 1, -1):
        for i in range(len(ids) - n - 1, -1, -1):
            if ids[i:i + n] == ids[-n:]:
                return ids[i + n:i + n + most]
    return []


def decodes(prompt, written, most, least=1):
    """Tokens of each decode that writes these ids after the prompt; the first comes with the prompt itself.

    A decode of one token and g guesses writes one more than it guessed right.

    Example:
        decodes([5, 6, 7], [5, 6, 7, 8], 2)  # [3]: 6 and 7 are guessed after 5, and the decode that finds them right gives 8
    """
    sizes, known = [], 1
    while known < len(written):
        guessed = guess(prompt + written[:known], most, least)
        right = next((i for i, (a, b) in enumerate(zip(guessed, written[known:])) if a != b), min(len(guessed), len(written) - known))
        sizes.append(1 + len(guessed))
        known += right + 1
    return sizes


def decode_ms(detoxifier, prompt, sizes):
    """{size: milliseconds, described} of a decode of so many tokens after the prompt, with logits at each."""
    context = detoxifier.context

    def after_prompt(size):
        context.clear()
        context.decode([(token, position, 0, False) for position, token in enumerate(prompt)])
        llama_cpp.llama_synchronize(context.pointer)
        entries = [(prompt[i], len(prompt) + i, 0, True) for i in range(size)]
        return 1e3 * seconds(lambda: (context.decode(entries), llama_cpp.llama_synchronize(context.pointer)))

    turns = in_turns({size: lambda size=size: after_prompt(size) for size in sizes}, ROUNDS)
    return {size: described(values) for size, values in turns.items()}


def run(config):
    """Measure, and write <out>/lookup.json.

    Returns:
        dict of kind "lookup".
    Raises:
        ValueError: no harmful answer to rewrite.
    """
    meanwhile, threads = watched(), config.threads or cpu_threads()
    harmful = [row for path in config.measure for row in rows.read(path) if row.label and (not config.sources or row.source in config.sources)]
    harmful = fewest(harmful, config.most)
    if not harmful:
        raise ValueError("lookup: measure must hold harmful answers, got none. Pass other files.")
    detoxifier = LlamaDetoxifier(config.detoxifier or WEIGHTS / "detoxifier.gguf", n_threads=threads)
    template, texts = detoxifier.template, []
    for row in tqdm(harmful, unit="rewrite"):
        prompt = template.rewrite_prompt(row.question, row.answer)
        text, _, finished = detoxifier.generate(prompt, detoxifier.limits.rewrite_tokens)
        texts.append((prompt, template.encode(text) + [template.end] * finished))
    times = decode_ms(detoxifier, texts[0][0][:CACHED], range(1, 2 + max(GUESSES)))
    ms = {size: found["median"] for size, found in times.items()}
    result = {"kind": "lookup", "threads": threads, "rewrites": len(texts), "quantisation": detoxifier.quantisation,
              "decode_ms": {str(size): found for size, found in times.items()}, **meanwhile(), "guesses": []}
    groups = [row.group for row in harmful]
    for least, most in product(range(1, LONGEST + 1), GUESSES):
        sizes = [decodes(prompt, written, most, least) for prompt, written in texts]
        plain = np.array([(len(written) - 1) * ms[1] for _, written in texts])
        with_guesses = np.array([sum(ms[size] for size in each) for each in sizes])
        result["guesses"].append({"matched": least, "most": most, "decodes_of_tokens": sum(map(len, sizes)) / sum(len(written) - 1 for _, written in texts),
                                  "speed_up": metrics.number(lambda a, b: a.sum() / b.sum(), plain, with_guesses, groups=groups)})
    result["busy"] = busy(result)
    record.write(config.out, "lookup", result, config)
    warn("lookup", result)
    return result


def main(argv=None):
    for found in run(parsed(LookupConfig, "protector.evaluate.lookup", __doc__, argv))["guesses"]:
        print(f"{found['matched']} matched, {found['most']} guesses: {found['decodes_of_tokens']:.2f} decodes a token, {found['speed_up']['value']:.2f} times as fast")


if __name__ == "__main__":
    sys.exit(main())
