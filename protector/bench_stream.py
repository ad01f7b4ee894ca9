"""What guarding a stream costs: `python -m protector.bench_stream`.

    flat          time of a token in a stream of 4,000 tokens over that in one of 200
    generation    time of scoring an answer while it is written over the time in which llama.cpp's base model writes it, step by
                  step in turns; in steps of that model what reading the question takes before the first one (begin), the longest
                  push and the wait after the last token, the longest of the answer's ends with 0 to STEP_TOKENS - 1 tokens
                  less; the wait where its normalised view differs by one space; and how many tokens it was ahead when text
                  was let out
    in a row      resident memory before and after many short streams
    clients       tokens a second of 16 threads that stream over those of one; likewise of whole answers

What is compared takes turns in every round, and a ratio is the median of the rounds' own ratios.
"""
import gc
import json
import os
import re
import sys
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .base import base_path
from .bench import Bare, in_turns, seconds
from .bench_rounds import BUSY, busy, described, loaded, warn, watched
from .engine import llama_cpp
from .evaluate import record
from .guard import Protector
from .llama import _Weights, cpu_threads
from .options import option, parsed
from .selftest import FILLER
from .stream import STEP_TOKENS, StreamGuard

QUESTION = "What should I see in this town? Explain it step by step."
COST, WAIT_STEPS, FLAT, CLIENTS = 0.25, 2.0, 1.5, 1.5  # bounds: share of generating, generation steps, ratio, ratio
GROWTH_BYTES = 8 << 20  # what an allocator may keep; 840 bytes a stream of 10,000


@dataclass(frozen=True)
class StreamBenchConfig:
    """Options of `python -m protector.bench_stream`."""

    out: str = option("", "JSON file; results/stream.json or stream_quick.json if empty")
    quick: bool = option(False, "see whether it works; its numbers mean nothing")
    rounds: int = option(7, "measurements of each number")
    threads: int = option(0, "CPU threads; 0 = all cores that this process may use")
    detector: str = option("", "adapter GGUF; the shipped one if empty")
    quantisation: str = option("F16", "of the detector's base: F32, F16, BF16, Q8_0, Q4_0, base")
    streams: int = option(10_000, "short streams in a row")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    short: int = 200  # tokens
    long: int = 4000
    answer: int = 200  # tokens that the base model writes
    client: int = 100  # tokens of each client's answer
    clients: int = 16


QUICK = Sizes(16, 80, 60, 8, 4)


def run(config):
    """Measure, print the ratios on stdout and write the JSON file.

    Returns:
        dict of kind "bench_stream".
    Raises:
        ValueError: fewer than 2 rounds.
    """
    if config.rounds < 2:
        raise ValueError(f"bench_stream: rounds must be at least 2, got {config.rounds}. One number has no spread.")
    sizes, rounds, n_streams = (QUICK, 2, 20) if config.quick else (Sizes(), config.rounds, config.streams)
    threads, meanwhile = config.threads or cpu_threads(), watched()
    # "report": nothing ends early, whatever the scores are.
    guard = Protector(config.detector or None, False, threshold=1.0, on_flag="report",
                      detector_options={"quantisation": config.quantisation, "n_threads": threads})
    result = {"kind": "bench_stream", "quick": config.quick, "threads": threads, "quantisation": guard.detector.quantisation,
              "depth": guard.detector.metadata.depth, "step_tokens": STEP_TOKENS}
    for name, part in (("flat", lambda: flat(guard, sizes, rounds)), ("generation", lambda: generation(guard, sizes, rounds, threads)),
                       ("clients", lambda: clients(guard, sizes, rounds)), ("in_a_row", lambda: in_a_row(guard, n_streams))):
        print(f"bench_stream: {name}", file=sys.stderr, flush=True)
        result[name] = part()
    result |= meanwhile()
    result |= {"targets": targets(result), "busy": busy(result)}
    out = Path(config.out or f"results/stream{'_quick' if config.quick else ''}.json")
    record.write(out.parent, out.stem, result, config)
    print(json.dumps(record.plain(result["targets"]), indent=1))
    warn("bench_stream", result)
    return result


def targets(result):
    """{name: {"value", "spread", "bound", "at_least", "holds", "busy"}}; bytes have no spread and are never busy."""
    is_busy, grown = bool(loaded(result)), result["in_a_row"]["grown_bytes"]
    parts = {"scoring, share of generating": (result["generation"]["share"], COST, False),
             "wait after the last token, generation steps": (result["generation"]["wait_steps"], WAIT_STEPS, False),
             "longest push before it, generation steps": (result["generation"]["push_steps"], WAIT_STEPS, False),
             "a token of a long stream, against a short one's": (result["flat"]["ratio"], FLAT, False),
             "streams of many clients, against one": (result["clients"]["streams"]["ratio"], CLIENTS, True)}
    found = {name: {"value": number["median"], "spread": number["spread"], "bound": bound, "at_least": at_least,
                    "holds": number["median"] >= bound if at_least else number["median"] <= bound, "busy": is_busy or number["spread"] > BUSY}
             for name, (number, bound, at_least) in parts.items()}
    if grown is not None:
        found["bytes grown over all short streams"] = {"value": grown, "spread": None, "bound": GROWTH_BYTES, "at_least": False,
                                                       "holds": grown <= GROWTH_BYTES, "busy": False}
    return found


def text_of(guard, n_tokens):
    """Harmless text of about n tokens."""
    return guard.detector.tokenizer.decode(guard.detector.template.encode(FILLER * (n_tokens // 40 + 1))[:n_tokens])


def streamed(guard, text, question=QUESTION):
    """Guard a text word by word, as a model's client gets it; returns the verdict."""
    return list(guard.stream(question, re.findall(r"\s*\S+", text)))[-1].verdict


def flat(guard, sizes, rounds):
    """Milliseconds of a token in a short stream and in a long one."""
    texts = {f"{n} tokens": text_of(guard, n) for n in (sizes.short, sizes.long)}

    def ms_per_token(text):
        return lambda: 1e3 * seconds(lambda: streamed(guard, text)) / len(guard.detector.template.encode(text))

    values = in_turns({name: ms_per_token(text) for name, text in texts.items()}, rounds)
    short, long = map(np.array, values.values())
    return {"ms_per_token": {name: described(value) for name, value in values.items()}, "ratio": described(long / short)}


def generation(guard, sizes, rounds, threads):
    """The base model writes an answer, and the guard scores it as it comes: each token's two times, in turns.

    held_tokens: how many tokens were written and not yet shown at the moments at which text was let out, that text among them.
    """
    bare = Bare(_Weights.of(base_path(), -1), threads)  # where the guard's layers are
    template, tokenizer = guard.detector.template, guard.detector.tokenizer
    prompt = template.prefix(template.encode(QUESTION))

    def answer():
        state, written_s, scored_s, longest_s = StreamGuard(guard, QUESTION), 0.0, 0.0, 0.0
        pieces, ends, n_chars, held = [], [], 0, []  # of each token: text, end in characters; characters released before; tokens held
        begun_s = seconds(state.begin)
        bare.read(prompt)
        for _ in range(sizes.answer):
            start = time.perf_counter()
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(bare.pointer, -1), (bare.n_vocab,))
            logits[template.end] = -np.inf  # it has more to say
            token = int(logits.argmax())
            bare.step([token])
            written = time.perf_counter()
            piece = tokenizer.decode([token])
            pieces.append(piece)
            state.push(piece)
            pushed_s = time.perf_counter() - written
            written_s, scored_s, longest_s = written_s + written - start, scored_s + pushed_s, max(longest_s, pushed_s)
            ends.append(len(piece) + (ends[-1] if ends else 0))
            if state.released > n_chars:
                held.append(len(ends) - bisect_right(ends, n_chars))
                n_chars = state.released
        finished_s = seconds(state.finish)
        waited_s = max(finish_s(guard, pieces[:len(pieces) - n_less]) for n_less in range(min(STEP_TOKENS, len(pieces))))
        viewed_s = finish_s(guard, ["\N{NO-BREAK SPACE}", *pieces])
        return written_s, begun_s + scored_s + finished_s, begun_s, longest_s, waited_s, viewed_s, *((np.median(held), max(held)) if held else (np.nan, np.nan))

    written_s, scored_s, begun_s, longest_s, waited_s, viewed_s, median_held, most_held = np.array(in_turns({"answer": answer}, rounds)["answer"]).T
    step_s = written_s / sizes.answer
    return {"written_tokens_per_s": described(1 / step_s), "scored_ms_per_token": described(1e3 * scored_s / sizes.answer),
            "share": described(scored_s / written_s), "wait_steps": described(waited_s / step_s), "wait_ms": described(1e3 * waited_s),
            "view_wait_steps": described(viewed_s / step_s), "push_steps": described(longest_s / step_s),
            "begin_steps": described(begun_s / step_s),
            "held_tokens": {"median": float(np.median(median_held)), "largest": float(most_held.max())}}


def finish_s(guard, pieces):
    """Seconds that a stream of these pieces waits at its end."""
    state = StreamGuard(guard, QUESTION)
    for piece in pieces:
        state.push(piece)
    return seconds(state.finish)


def clients(guard, sizes, rounds):
    """Tokens a second of one client and of many, each in a thread: streams, and whole answers."""
    text = text_of(guard, sizes.client)
    n = len(guard.detector.template.encode(text))

    def rate(work, n_clients):
        def measured():
            with ThreadPoolExecutor(n_clients) as pool:
                return n * sizes.clients / seconds(lambda: list(pool.map(lambda _: work(text), range(sizes.clients))))

        return measured

    found = {}
    for name, work in (("streams", lambda text: streamed(guard, text)), ("whole_answers", lambda text: guard.guard(QUESTION, text))):
        values = in_turns({"one": rate(work, 1), "many": rate(work, sizes.clients)}, rounds)
        one, many = map(np.array, values.values())
        found[name] = {"tokens_per_s": {key: described(value) for key, value in values.items()}, "ratio": described(many / one)}
    return {"clients": sizes.clients, **found}


def in_a_row(guard, n):
    """Resident bytes before and after n short streams."""
    def several(count):
        for i in range(count):
            streamed(guard, f"The tram number {i} stops here.", "")
        gc.collect()
        return resident_bytes()

    before = several(max(n // 20, 2))  # what is allocated once
    took_s = -time.monotonic()
    after = several(n)
    return {"streams": n, "ms_each": 1e3 * (took_s + time.monotonic()) / n, "before_bytes": before, "after_bytes": after,
            "grown_bytes": None if before is None else after - before}


def resident_bytes():
    """Memory of this process that is in RAM, or None where the system doesn't say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return None


def main(argv=None):
    run(parsed(StreamBenchConfig, "protector.bench_stream", __doc__, argv))


if __name__ == "__main__":
    main()
