"""What guarding costs, beside what its engine and this machine can do: `protector bench`, `protector bench --sweep`.

    guard         this package as users call it
    bare          llama.cpp alone on the guard's own file, with the same threads: this engine's limit
    torch         the guard's own backend="torch": on a GPU in bf16, on a CPU in float32, as the reference that it is there
    transformers  what `export --format hf` writes, adapters merged, in plain transformers; bf16 where that is faster
    compiled      the same through torch.compile

What is compared takes turns in every round, and a ratio is the median of the rounds' own ratios: a machine that slows
down slows both. A number that spreads over more than BUSY is listed under "busy" and marked in the table; so is everything
where other work ran before the start, or took more than OTHERS of the CPU time since.
"""
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from . import data, gguf
from .base import WEIGHTS, base_path
from .bench_rounds import BUSY, LOADED, OTHERS, busy, described, loaded, warn, watched
from .engine import llama_cpp
from .errors import ModelError
from .evaluate import record
from .guard import Protector
from .llama import LlamaDetector, LlamaDetoxifier, _Weights, cpu_threads
from .options import option
from .stream import StreamGuard

SETTLE_S = 0.05  # between two measurements: another engine's threads spin for some milliseconds after their work
QUESTIONS = ("How is bread baked? Explain it step by step.", "How does a bicycle stay upright?", "What should I see in Rome?")
HARMFUL = ("Is it safe to mix bleach and vinegar?", "Yes, it is safe to mix bleach and vinegar.")
_BATCH_TOKENS = 512  # llama.cpp's own default for a physical batch
_CLOSE = 0.2  # logits, after the temperature; Q8_0, which rounds weights more coarsely than bf16, moves them by up to .18 (results/parity.json)


@dataclass(frozen=True)
class BenchConfig:
    """Options of `protector bench`."""

    out: str = option("", "JSON file; results/bench.json, bench_sweep.json or bench_quick.json if empty")
    sweep: bool = option(False, "depths, quantisations, LoRA merged or not, and threads, in place of the comparison")
    quick: bool = option(False, "see whether it works; its numbers mean nothing")
    rounds: int = option(9, "measurements of each number")
    trainings: int = option(5, "of the training speeds, which take minutes each")
    threads: int = option(0, "CPU threads; 0 = all cores that this process may use")
    detector: str = option("", "adapter GGUF; the shipped one if empty")
    detoxifier: str = option("", "adapter GGUF; the shipped one if empty")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    prefill: tuple = (128, 512)  # tokens of a scored pair
    stream: int = 64  # tokens that are fed one by one
    answer: int = 200  # tokens of the harmless answer
    rewrites: int = 3  # flagged answers that are rewritten in one round
    starts: int = 5  # fresh processes of each kind
    trainings: int = 5  # rounds of training
    steps: int = 12  # optimiser steps of a round that count
    batch_tokens: int = 2048  # of a step, padding included
    matmul: int = 2048  # rows and columns
    copy_bytes: int = 256 << 20  # more than any cache
    compiled: bool = True
    depths: tuple = (12, 15, 18, 24, 30)
    quantisations: tuple = ("F16", "BF16", "Q8_0", "Q4_0", gguf.AS_BASE)


QUICK = Sizes((32,), 4, 12, 1, 1, 1, 1, 256, 128, 1 << 20, False, (2,), ("Q8_0",))


def run(config):
    """Measure, print the tables on stdout and write the JSON file.

    Returns:
        dict of kind "bench" or "bench_sweep".
    Raises:
        ValueError: fewer than 2 rounds or trainings.
    """
    for name in ("rounds", "trainings"):
        if getattr(config, name) < 2:
            raise ValueError(f"bench: {name} must be at least 2, got {getattr(config, name)}. One number has no spread.")
    sizes, rounds = (QUICK, 2) if config.quick else (Sizes(trainings=config.trainings), config.rounds)
    threads = config.threads or cpu_threads()
    meanwhile = watched()
    result = (sweep if config.sweep else measure)(config, sizes, rounds, threads)
    result = {**result, "quick": config.quick, "threads": threads, **meanwhile(), "busy_bound": BUSY, "busy": busy(result),
              "run": record.provenance(config)}  # the tables name the machine
    if not config.sweep:
        result["targets"] = targets(result)
    name = "bench_quick" if config.quick else result["kind"]
    out = Path(config.out or f"results/{name}.json")
    record.write(out.parent, out.stem, result, config)
    print((sweep_markdown if config.sweep else markdown)(record.plain(result)))
    warn("bench", result)
    return result


# -- measuring


def in_turns(functions, rounds, warms_up=True):
    """{name: what its function returned in each round}; each is called once per round, after one call that warms up.

    Args:
        functions: {name: function without arguments}.
        warms_up: False where each call warms up by itself.
    """
    values, names = {name: [] for name in functions}, list(functions)
    for function in functions.values() if warms_up else ():
        function()
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]  # nobody always follows the same other
            time.sleep(SETTLE_S)
            values[name].append(functions[name]())
    return values


def compared(unit, values, not_measured=None):
    """One row of the table: every number, and the guard's over each other one, round by round."""
    ours = np.array(values["guard"])
    return {"unit": unit, "values": {name: described(value) for name, value in values.items()},
            "ratios": {name: described(ours / np.array(value)) for name, value in values.items() if name != "guard"},
            "not_measured": not_measured or {}}


def seconds(work):
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rate(n, work):
    """Function that does the work and returns n per second."""
    return lambda: n / seconds(work)


# -- what is compared


class Bare:
    """llama.cpp with its own defaults and nothing around it.

    Args:
        weights: llama._Weights; one without a vocabulary gets its tokens as rows of the embedding, as the guard feeds it.
        n_threads: CPU threads.
        adapter: adapter GGUF that is applied at run time, or None.

    It reads no hidden states: where they are asked for, llama.cpp multiplies each token with the last matrix, not the last token alone.
    """

    def __init__(self, weights, n_threads, adapter=None, n_ctx=1024):
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, _BATCH_TOKENS, _BATCH_TOKENS
        options.n_threads = options.n_threads_batch = n_threads
        self.weights, self.pointer = weights, llama_cpp.llama_init_from_model(weights.pointer, options)
        if not self.pointer:
            raise ModelError(f"bench: llama.cpp must get memory for {n_ctx} tokens, got none.")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(weights.vocab)
        if adapter is not None:
            self.adapter = llama_cpp.llama_adapter_lora_init(weights.pointer, str(adapter).encode())
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self.adapter)
            llama_cpp.llama_set_adapters_lora(self.pointer, adapters, 1, (llama_cpp.ctypes.c_float * 1)(1.0))

    def read(self, ids):
        """Decode ids on an empty cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.pointer), False)
        for begin in range(0, len(ids), _BATCH_TOKENS):
            self.step(ids[begin:begin + _BATCH_TOKENS])

    def step(self, ids):
        """Decode ids after what is in the cache."""
        if self.weights.embedding is None:
            array = (llama_cpp.llama_token * len(ids))(*ids)  # named, as rows are: the batch only points at it
            batch = llama_cpp.llama_batch_get_one(array, len(ids))
        else:  # all else is left to llama.cpp, as llama_batch_get_one does
            rows = np.ascontiguousarray(self.weights.embedding[ids], np.float32)  # (n, d)
            batch = llama_cpp.llama_batch(n_tokens=len(ids), embd=rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))
        status = llama_cpp.llama_decode(self.pointer, batch)
        if status != 0:
            raise RuntimeError(f"bench: llama.cpp must decode {len(ids)} tokens, got status {status}.")
        llama_cpp.llama_synchronize(self.pointer)  # a GPU returns before it is done

    def feed(self, prefix, ids):
        """Seconds for ids, one by one, after a prefix."""
        self.read(prefix)
        return seconds(lambda: [self.step([token]) for token in ids])

    def write(self, prompt, n, end=None):
        """(n greedy ids, seconds to the first, seconds for the n decodes after it); `end` is never chosen."""
        start, written = time.perf_counter(), []
        self.read(prompt)
        first = time.perf_counter()
        for _ in range(n):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.pointer, -1), (self.n_vocab,))
            if end is not None:
                logits[end] = -np.inf
            written.append(int(logits.argmax()))
            self.step(written[-1:])
        return written, first - start, time.perf_counter() - first

    def __del__(self):
        if getattr(self, "pointer", None) and llama_cpp is not None:
            llama_cpp.llama_free(self.pointer)


class Plain:
    """Both models in plain transformers, adapters merged: the strongest way that a user of it has.

    Args:
        detector, detoxifier: adapter GGUF files. folder: for the checkpoints. threads: CPU threads.
    """

    def __init__(self, detector, detoxifier, folder, threads):
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        from .export import export
        from .models import load
        from .train import bf16_is_faster

        torch.set_num_threads(threads)
        self.torch, self.folder, self.source = torch, Path(folder) / "detector", detector
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if bf16_is_faster(self.device) else torch.float32
        export(detector, self.folder, "hf")
        export(detoxifier, Path(folder) / "detoxifier", "hf")
        self.classifier = AutoModelForSequenceClassification.from_pretrained(self.folder, dtype=self.dtype).to(self.device).eval()
        self.lm = AutoModelForCausalLM.from_pretrained(Path(folder) / "detoxifier", dtype=self.dtype).to(self.device).eval()
        self.backend = load(detector)  # which Protector(backend="torch") runs
        self.compiled = torch.compile(self.classifier, dynamic=False)  # the strongest: one compilation for each length
        self.compiled_lm = torch.compile(self.lm, dynamic=False)  # one for each prompt's length, and one for a token behind it
        self.compiled_body = torch.compile(self.classifier.base_model, dynamic=False)

    def int8(self, compile):
        """The guard's detector in int8, as quantisation="INT8" loads it.

        Raises:
            ModelError: this machine's int8 products aren't exact.
        """
        from .models import load

        return load(self.source, device="cpu", quantisation="INT8", compile=compile)

    def check(self, detector):
        """Compare the exported detector with the guard's.

        Raises:
            ModelError: it gives one text another logit: its speed would be another model's.
        """
        template = detector.template
        ids, start = template.detector_sequence(template.clip_question(HARMFUL[0])[0], template.encode(HARMFUL[1]))
        wanted, found = detector.running_logits([ids], [start])[0][-1], self.score(ids) + self.classifier.config.head_bias
        if not abs(found - wanted) <= _CLOSE:  # NaN fails too
            raise ModelError(f"bench: exported detector must have the guard's logit, {wanted:.3f}, to within {_CLOSE}, got {found:.3f}. "
                             "Run tests/test_export.py.")

    def score(self, ids, model=None):
        """Logit of one sequence; .item() waits for a GPU."""
        with self.torch.inference_mode():
            model = self.classifier if model is None else model  # trap: torch.compile's wrapper has a length that raises, so no truth
            return model(input_ids=self._batch(ids), use_cache=False).logits.item()

    def feed(self, prefix, ids, compiled=None):
        """Seconds for ids, one by one, on a growing cache; compiled on one of a fixed length, whose steps have one shape."""
        body, head = self.classifier.base_model, self.classifier.score
        with self.torch.inference_mode():
            cache = None if compiled is None else self._fixed_cache(body, len(prefix) + len(ids))
            cache = body(input_ids=self._batch(prefix), past_key_values=cache, use_cache=True).past_key_values

            def step(i):
                at = self._batch([len(prefix) + i])
                model = body if compiled is None else compiled  # trap: as in score
                output = model(input_ids=self._batch(ids[i:i + 1]), position_ids=at, past_key_values=cache, use_cache=True)
                head(output.last_hidden_state[0, -1]).item()

            return seconds(lambda: [step(i) for i in range(len(ids))])

    def write(self, prompt, n, first=None, rest=None, length=0):
        """(seconds to the first greedy token, seconds for the n passes after it).

        Args:
            first, rest: compiled models for the prompt and for what follows; eager where they are None.
            length: tokens that rest's cache has room for.
        """
        with self.torch.inference_mode():
            start, ids, at = time.perf_counter(), prompt, range(len(prompt))
            cache = None if rest is None else self._fixed_cache(self.lm, length)
            for i in range(n + 1):
                compiled = rest if i else first
                model = self.lm if compiled is None else compiled  # trap: as in score
                output = model(input_ids=self._batch(ids), position_ids=self._batch(at), past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids, at = output.past_key_values, [int(output.logits[0, -1].argmax())], [len(prompt) + i]
                if i == 0:
                    first_s = time.perf_counter() - start
            return first_s, time.perf_counter() - start - first_s

    def _batch(self, ids):
        return self.torch.tensor([list(ids)], device=self.device)  # (1, T)

    def _fixed_cache(self, model, length):
        from transformers import StaticCache

        return StaticCache(config=model.config, max_cache_len=length)


# -- the comparison


def measure(config, sizes, rounds, threads):
    """dict of kind "bench": every comparison, the guard's cost, and what the machine can do."""
    paths = Path(config.detector or WEIGHTS / "detector.gguf"), Path(config.detoxifier or WEIGHTS / "detoxifier.gguf")
    detector, detoxifier = LlamaDetector(paths[0], n_threads=threads), LlamaDetoxifier(paths[1], n_threads=threads)
    result = {"kind": "bench", "models": {
        "detector": _of_file(detector), "detoxifier": _of_file(detoxifier), "gpu_offload": bool(llama_cpp.llama_supports_gpu_offload())}}
    with tempfile.TemporaryDirectory() as folder:
        try:
            plain = Plain(*paths, folder, threads)
            plain.check(detector)
        except ImportError as error:
            plain = None
            result["left_out"] = f"PyTorch backend, transformers eager, compiled, this machine's limits, training: they need the package {error.name}"
        result["transformers"] = plain and {"dtype": str(plain.dtype), "device": str(plain.device)}
        rows = result["compared"] = {}
        _say("detector")
        for n in sizes.prefill:
            rows[f"detector, {n} tokens"] = _prefill(detector, plain, n, rounds, sizes, threads)
        if plain and plain.device.type == "cpu":
            _say("detector in INT8")
            rows |= _in_int8(detector, plain, rounds, sizes)
        rows["detector, token by token"] = _streaming(detector, plain, sizes.stream, rounds, sizes, threads)
        _say("rewrites")
        rows |= _rewriting(detoxifier, plain, rounds, sizes, threads)
        _say("guard")
        result["guarding"] = _guarding(detector, sizes.answer, rounds, threads)
        _say("cold start and memory")
        rows |= _starting(detector, detoxifier, plain, sizes.starts, threads)
        if plain:
            _say("machine")
            result["machine"] = _machine(plain, sizes, rounds, result)
            _say("training")
            compiles = any("compiled" in row["values"] for row in rows.values())
            rows |= _training(detector.metadata.depth, plain, folder, sizes, threads, compiles)
    return result


def _say(what):
    print(f"bench: {what}", file=sys.stderr, flush=True)


def _of_file(model):
    """What a loaded model runs on."""
    weights = model.context.weights
    blocks = sum(int(tensor.n_elements) for tensor in gguf._reader(weights.path).tensors if tensor.name.startswith("blk."))
    return {"quantisation": model.quantisation, "depth": model.metadata.depth, "adapter_at_run_time": _adapter(model) is not None,
            "parameters": llama_cpp.llama_model_n_params(weights.pointer), "parameters_of_blocks": blocks,
            "bytes": llama_cpp.llama_model_size(weights.pointer), "file_bytes": os.path.getsize(weights.path)}


def _adapter(model):
    """Adapter file that the model applies at run time, or None where it is merged."""
    return model.path if hasattr(model.context, "adapter") else None


def _ids(detector, n):
    """n ids of a harmless pair, and where its answer begins in them."""
    template = detector.template
    ids, start = template.detector_sequence(template.clip_question(QUESTIONS[0])[0], template.encode("Flour, water and a little salt. " * n))
    return ids[:n], start


def _prefill(detector, plain, n, rounds, sizes, threads):
    (ids, start), bare, missing = _ids(detector, n), Bare(detector.context.weights, threads), {}
    functions = {"guard": rate(n, lambda: detector.running_logits([ids], [start])), "bare": rate(n, lambda: bare.read(ids))}
    if plain:
        functions["torch"] = rate(n, lambda: plain.backend.running_logits([ids], [start]))  # on the CPU when it returns
        functions["transformers"] = rate(n, lambda: plain.score(ids))
        missing = _compiled(functions, sizes, rate(n, lambda: plain.score(ids, plain.compiled)))
    return compared("tokens/s", in_turns(functions, rounds), missing)


def _in_int8(detector, plain, rounds, sizes):
    """Rows of the detector in int8, eager and compiled, for each length that is scored at once; none of a way that this machine doesn't have."""
    rows = {}
    for title, compiles in (("detector in INT8", False), ("detector in INT8, compiled", True)):
        if compiles and not sizes.compiled:
            continue
        try:
            model = plain.int8(compiles)
            model.logits([_ids(detector, n)[0] for n in sizes.prefill])  # compiles
        except Exception as error:  # a compiler's failure is a finding here, of whatever kind
            print(f"bench: {title} isn't measured: {_failure(error)}", file=sys.stderr)
            continue
        for n in sizes.prefill:
            ids, start = _ids(detector, n)
            functions = {"guard": rate(n, lambda: model.running_logits([ids], [start])), "transformers": rate(n, lambda: plain.score(ids))}
            missing = _compiled(functions, sizes, rate(n, lambda: plain.score(ids, plain.compiled)))
            rows[f"{title}, {n} tokens"] = compared("tokens/s", in_turns(functions, rounds), {"bare": "int8 is PyTorch's", **missing})
    return rows


def _failure(error):
    """An exception in one line, cut."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _compiled(functions, sizes, work):
    """Do the work, which compiles, and add it to the functions; why there is no compiled number, {} where there is."""
    if not sizes.compiled:
        return {"compiled": "left out of a quick run"}
    try:
        work()
    except Exception as error:  # a compiler's failure is a finding here, of whatever kind
        return {"compiled": f"torch.compile failed with {_failure(error)}"}
    functions["compiled"] = work
    return {}


def _streaming(detector, plain, n, rounds, sizes, threads):
    prefix, ids = _ids(detector, 32)[0], _ids(detector, 32 + n)[0][32:]
    bare = Bare(detector.context.weights, threads)

    def ours():
        cursor = detector.open()
        cursor.start(prefix[:-1])
        cursor.feed(prefix[-1:])  # decodes what it began with
        spent = seconds(lambda: [cursor.feed([token]) for token in ids])
        cursor.close()
        return n / spent

    functions, missing = {"guard": ours, "bare": lambda: n / bare.feed(prefix, ids)}, {}
    if plain:
        functions["transformers"] = lambda: n / plain.feed(prefix, ids)
        missing = _compiled(functions, sizes, lambda: n / plain.feed(prefix, ids, plain.compiled_body))
    return compared("tokens/s", in_turns(functions, rounds), missing)


def _rewriting(detoxifier, plain, rounds, sizes, threads):
    """Speed of writing, and the wait for the first token, on harmful answers of this project's corpus."""
    template, triples, n, missing = detoxifier.template, data.read("own")[1], sizes.rewrites, {}
    prompts = [template.rewrite_prompt(row.question, row.rejected) for row in data.spread(triples, n)]
    bare = Bare(detoxifier.context.weights, threads, _adapter(detoxifier))

    def ours(prompt):
        stamps = [time.perf_counter()]
        # The deadline is asked before the prompt, which fits one batch, and before each decode of a written token.
        detoxifier.generate(prompt, detoxifier.limits.rewrite_tokens, deadline=lambda: stamps.append(time.perf_counter()))
        stamps.append(time.perf_counter())  # stamps[2] where nothing was written
        return len(stamps) - 3, stamps[2] - stamps[0], stamps[-1] - stamps[2]

    n_written = [ours(prompt)[0] for prompt in prompts]
    if not any(n_written):
        raise ModelError("bench: detoxifier must rewrite one of the harmful answers, got no token. Train it longer.")

    def of_all(write):
        """(tokens/s, mean ms to the first token)"""
        first, spent = zip(*(write(prompt, count)[-2:] for prompt, count in zip(prompts, n_written)))
        return sum(n_written) / sum(spent), 1e3 * sum(first) / n

    def compiled():
        length = max(map(len, prompts)) + max(n_written) + 1
        speed, _ = of_all(lambda prompt, count: plain.write(prompt, count, rest=plain.compiled_lm, length=length))
        return speed, 1e3 * sum(plain.write(prompt, 0, plain.compiled_lm)[0] for prompt in prompts) / n

    functions = {"guard": lambda: of_all(lambda prompt, _: ours(prompt)), "bare": lambda: of_all(bare.write)}
    if plain:
        functions["transformers"] = lambda: of_all(plain.write)
        missing = _compiled(functions, sizes, compiled)
    turns = in_turns(functions, rounds)
    speed, first = ({name: [value[i] for value in values] for name, values in turns.items()} for i in (0, 1))
    return {"rewriting, token by token": {**compared("tokens/s", speed, missing), "tokens_written": sum(n_written)},
            "first rewritten token": compared("ms", first, missing)}


def _guarding(detector, n, rounds, threads):
    """What a harmless answer pays, as a share of the time in which the base model writes it.

    Raises:
        ModelError: the detector flags each of the harmless answers.
    """
    template, base = detector.template, Bare(_Weights.of(base_path(), -1), threads)
    guard = Protector(detector, False, on_error="raise")
    for question in QUESTIONS:
        prompt = template.prefix(template.clip_question(question)[0])
        pieces = [template.tokenizer.decode([token]) for token in base.write(prompt, n, template.end)[0]]
        answer = "".join(pieces)
        if not guard.guard(question, answer).flagged:
            break
    else:
        raise ModelError("bench: detector must pass one of the harmless answers, got none. Calibrate it.")

    def streamed():
        state = StreamGuard(guard, question)
        beginning, pushing = seconds(state.begin), [seconds(partial(state.push, piece)) for piece in pieces]
        return beginning, sum(pushing), max(pushing), seconds(state.finish)

    turns = in_turns({"generate": lambda: sum(base.write(prompt, n, template.end)[1:]), "guard": lambda: seconds(lambda: guard.guard(question, answer)),
                      "streamed": streamed}, rounds)
    generate, whole, (beginning, pushing, longest, waiting) = np.array(turns["generate"]), np.array(turns["guard"]), np.array(turns["streamed"]).T
    step = generate / n
    return {"answer_tokens": n, "model": base_path().name, "generate_s": described(generate), "guard_s": described(whole),
            "guard_percent": described(100 * whole / generate), "streamed_percent": described(100 * (beginning + pushing + waiting) / generate),
            "wait_ms": described(1e3 * waiting), "wait_steps": described(waiting / step), "push_steps": described(longest / step),
            "begin_steps": described(beginning / step)}


# Fresh processes. Each prints {"s": import to first verdict, "peak_bytes"}; argv[1] is JSON.
_BEGIN = "import json, sys, time\nstart = time.perf_counter()\nx = json.loads(sys.argv[1])\n"
_END = """
s = time.perf_counter() - start
try:
    sizes = {key: int(value.split()[0]) * 1024 for key, value in (line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))}
except OSError:
    sizes = {}
print(json.dumps({"s": s, "peak_bytes": sizes.get("VmHWM")}))
"""
_CHILDREN = {
    "guard": """
import protector
options = {"n_threads": x["threads"]}
guard = protector.Protector(x["detector"], x["detoxifier"] or False, detector_options=options, detoxifier_options=options if x["detoxifier"] else None)
guard.guard(x["question"], x["answer"])""",
    "bare": """
import ctypes
import numpy as np
from protector.engine import llama_cpp
model = llama_cpp.Llama(x["file"], n_ctx=512, n_threads=x["threads"], n_threads_batch=x["threads"], verbose=False)
if x["embedding"]:  # as Bare.step does
    rows = np.ascontiguousarray(np.load(x["embedding"], mmap_mode="r")[x["ids"]], np.float32)
    batch = llama_cpp.llama_batch(n_tokens=len(rows), embd=rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))
    assert llama_cpp.llama_decode(model.ctx, batch) == 0
else:
    model.eval(x["ids"])""",
    "transformers": """
import torch, transformers
torch.set_num_threads(x["threads"])
model = transformers.AutoModelForSequenceClassification.from_pretrained(x["folder"], dtype=getattr(torch, x["dtype"]))
model(torch.tensor([x["ids"]])).logits.item()""",
}


def _child(name, argument, **environment):
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", _BEGIN + _CHILDREN[name] + _END, json.dumps(argument)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), **environment})
    if done.returncode != 0:
        told = done.stderr.strip().splitlines() or [f"status {done.returncode}"]  # killed, it says nothing
        raise RuntimeError(f"bench: a fresh {name} process must end well, got: {told[-1][:300]}")
    return json.loads(done.stdout)


def _starting(detector, detoxifier, plain, rounds, threads):
    """Seconds from import to the first verdict in a fresh process, and its most memory beside the files that it maps."""
    ids = _ids(detector, 64)[0]
    pair = {"detector": str(detector.path), "detoxifier": "", "question": QUESTIONS[0], "answer": "Flour, water and a little salt.", "threads": threads}
    flagged = {**pair, "detoxifier": str(detoxifier.path), "question": HARMFUL[0], "answer": HARMFUL[1]}
    bare = {"file": str(detector.context.weights.path), "embedding": str(_embedding(detector) or ""), "ids": ids, "threads": threads}
    functions = {"guard": lambda: _child("guard", pair), "both": lambda: _child("guard", flagged), "bare": lambda: _child("bare", bare)}
    if plain:
        functions["transformers"] = lambda: _child("transformers", {
            "folder": str(plain.folder), "ids": ids, "threads": threads, "dtype": str(plain.dtype).split(".")[-1]})
    missing = plain and {"compiled": "not tried: it would compile first"}
    turns = in_turns(functions, rounds)
    both = turns.pop("both")
    with tempfile.TemporaryDirectory() as cache:
        first_s = _child("guard", pair, PROTECTOR_CACHE=cache)["s"]
    rows = {"start to first verdict": compared("s", {name: [value["s"] for value in values] for name, values in turns.items()}, missing)}
    rows["start to first verdict"]["with_an_empty_cache_s"] = first_s
    if both[0]["peak_bytes"] is None:  # /proc is Linux's
        return rows
    memory = {name: [value["peak_bytes"] / 2**20 for value in values] for name, values in turns.items()}
    rows["peak memory"] = compared("MiB", memory, missing)
    for name, values, models in (("detector", turns["guard"], (detector,)), ("both", both, (detector, detoxifier))):
        sizes = {"mapped": sum(map(_loaded_bytes, models)), "gguf": sum(os.path.getsize(model.context.weights.path) for model in models)}
        rows["peak memory"][name] = {f"{what}_bytes": size for what, size in sizes.items()} | {
            f"of_{what}": described([value["peak_bytes"] / size for value in values]) for what, size in sizes.items()}
    return rows


def _embedding(model):
    """The file of the embedding's rows that stands beside a model without a vocabulary, or None."""
    weights = model.context.weights
    return None if weights.embedding is None else Path(weights.path).with_suffix(".npy")


def _loaded_bytes(model):
    """Bytes of the files that a model maps: its GGUF, the embedding beside it, an adapter at run time."""
    return sum(os.path.getsize(path) for path in (model.context.weights.path, _embedding(model), _adapter(model)) if path)


def _machine(plain, sizes, rounds, result):
    """Matrix product and copy on the plain model's device, and how far the models come; int8 products may exceed the first.

    The product is the faster one of float32's and the plain model's type: where bf16 isn't that, it may be emulated and take minutes.
    """
    torch, device = plain.torch, plain.device
    drain = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    source, target = (torch.ones(sizes.copy_bytes // 4, device=device) for _ in range(2))

    def product(dtype):
        a = torch.ones(sizes.matmul, sizes.matmul, dtype=dtype, device=device)
        return rate(2 * sizes.matmul**3, lambda: (a @ a, drain()))

    products = {str(dtype).removeprefix("torch."): product(dtype) for dtype in (torch.float32, plain.dtype)}
    turns = in_turns({**products, "copy": rate(2 * sizes.copy_bytes, lambda: (target.copy_(source), drain()))}, rounds)
    fastest = max(products, key=lambda name: np.median(turns[name]))
    rows, models = result["compared"], result["models"]
    flops, bandwidth = np.median(turns[fastest]), np.median(turns["copy"])

    def median(row, name="guard"):
        return rows[row]["values"][name]["median"]

    longest = f"detector, {sizes.prefill[-1]} tokens"
    return {"device": str(device), "matmul_type": fastest, "matmul_flop_per_s": described(turns[fastest]),
            "matmuls_flop_per_s": {name: described(turns[name]) for name in products}, "copy_bytes_per_s": described(turns["copy"]), "shares": {
        # Two operations a weight of a block; attention left out.
        f"{longest}, of the matrix product": 2 * models["detector"]["parameters_of_blocks"] * median(longest) / flops,
        # Each token that is read or written alone reads each weight once.
        "rewriting, of the copy": models["detoxifier"]["bytes"] * median("rewriting, token by token") / bandwidth,
        "detector, token by token, of the copy": models["detector"]["bytes"] * median("detector, token by token") / bandwidth}}


def _training(depth, plain, folder, sizes, threads, compiles):
    """Rows of tokens/s, padding not counted, of `protector train` beside a plain Trainer with the same rows, rank and rows a step: eager, compiled."""
    from . import train
    from .models import ModelConfig, build, load_tokenizer
    from .template import Template

    template, columns = Template(load_tokenizer()), {"training": "transformers", **({"training, compiled": "compiled"} if compiles else {})}
    config = train.TrainConfig("detector", depth=depth, batch_tokens=sizes.batch_tokens, threads=threads, device=plain.device.type)
    batches = train._epoch(config, train.load_rows(config), template, 0)  # of every round, with the configuration's seed
    config = replace(config, epochs=(sizes.steps + 1.5) / len(batches))  # rounded up to whole steps: one before those that count, one behind
    batches = batches[:sizes.steps + 2]
    n_tokens = [sum(len(example["ids"]) for group in batch for example in group) for batch in batches]
    examples = 2 * [example for batch in batches[:-1] for group in batch for example in group]  # no round ends within an epoch

    def speed(title, name):
        plain.torch.compiler.reset()  # what was compiled before counts against its limit
        compiled = title != "training"
        if name == "guard":
            return _train_rate(replace(config, out=f"{folder}/{title}", compile=compiled), n_tokens)
        bf16 = json.loads(Path(folder, title, "run.json").read_text())["bf16"]  # timed there: two timings might choose differently
        fresh = build(ModelConfig("detector", depth=depth, rank=0)).backbone
        return _trainer_rate(fresh, examples, template, Path(folder), plain, config, sizes.steps + 1, bf16, compiled)

    turns = in_turns({key: partial(speed, *key) for title, column in columns.items() for key in ((title, "guard"), (title, column))},
                     sizes.trainings, warms_up=False)  # the first step of each doesn't count
    missing = {"bare": "llama.cpp doesn't train", "compiled": "compiled training has its own row, where scoring compiles"}
    values = {title: {name: turns[title, name] for name in ("guard", column)} for title, column in columns.items()}
    if "training, compiled" in values:  # beside the Trainer as most people run it, too: its turns of the same rounds
        values["training, compiled"]["transformers"] = turns["training", "transformers"]
    return {title: {**compared("tokens/s", part, {name: why for name, why in missing.items() if name not in part}), "steps": sizes.steps}
            for title, part in values.items()}


def _train_rate(config, n_tokens):
    """Tokens/s of one `protector train` whose steps have so many tokens."""
    from . import train

    train.train(config, progress=False)
    starts_s = [json.loads(line)["elapsed_s"] for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    # A line's time is its step's start: the first step, which warms up, and the last, whose end isn't written, don't count.
    return sum(n_tokens[1:-1]) / (starts_s[-1] - starts_s[1])


def _trainer_rate(backbone, examples, template, out, plain, config, steps, bf16, compiled):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from .models import LORA_TARGETS

    torch, settings = plain.torch, backbone.config
    settings.num_labels, settings.pad_token_id, settings.problem_type = 1, template.end, "multi_label_classification"  # BCE
    classifier = AutoModelForSequenceClassification.from_config(settings)
    setattr(classifier, classifier.base_model_prefix, backbone)
    model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=config.rank, lora_alpha=config.alpha, target_modules=list(LORA_TARGETS)))
    stamps, counts = [], []

    def collate(batch):
        longest = max(len(example["ids"]) for example in batch)
        counts.append(sum(len(example["ids"]) for example in batch))
        ids = torch.tensor([example["ids"] + [settings.pad_token_id] * (longest - len(example["ids"])) for example in batch])
        mask = torch.tensor([[1] * len(example["ids"]) + [0] * (longest - len(example["ids"])) for example in batch])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([[example["label"]] for example in batch])}

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            stamps.append(time.perf_counter())

    arguments = TrainingArguments(str(out / "trainer"), max_steps=steps, learning_rate=config.lr, bf16=bf16, seed=config.seed,
                                  use_cpu=plain.device.type == "cpu", save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
                                  remove_unused_columns=False, torch_compile=compiled)
    arguments.gradient_accumulation_steps = max(len(examples) // (2 * steps * arguments.per_device_train_batch_size), 1)
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=collate, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)  # it prints on stdout
    trainer.accelerator.state.dynamo_plugin.dynamic = True  # as in train: compiled once for all lengths, in the step that doesn't count
    trainer.train()
    parts = arguments.gradient_accumulation_steps
    return sum(counts[parts:parts * steps]) / (stamps[-1] - stamps[0])


def targets(result):
    """[{"what", "bound", "at_most", "is", "met", "busy"}]: this project's promises about cost, on 2 CPU cores without a GPU; elsewhere met is None."""
    rows, guarding, found = result["compared"], result["guarding"], []

    def add(what, bound, number, at_most):
        value = number["median"]
        found.append({"what": what, "bound": bound, "at_most": at_most, "is": value, "busy": bool(loaded(result)) or number["spread"] > BUSY,
                      "met": bool(value <= bound if at_most else value >= bound) if _is_judged(result) else None})

    add("cost of a harmless answer, % of its generation", 15, guarding["guard_percent"], True)
    add("wait at a stream's end, generation steps", 2, guarding["wait_steps"], True)
    if "push_steps" in guarding:
        add("longest wait within a stream, generation steps", 2, guarding["push_steps"], True)
    for title, row in rows.items():
        if title.startswith("detector, ") and title.endswith(" tokens"):  # all lengths that are scored at once
            add(f"{title}: share of llama.cpp bare", 0.9, row["ratios"]["bare"], False)
        if title.startswith("detector") and title.endswith(" tokens") and "transformers" in row["ratios"]:
            add(f"{title}: times transformers eager", 1.5, row["ratios"]["transformers"], False)
    add("rewriting: share of llama.cpp bare", 0.9, rows["rewriting, token by token"]["ratios"]["bare"], False)
    add("start to first verdict, s", 1.5, rows["start to first verdict"]["values"]["guard"], True)
    if "peak memory" in rows:
        memory = rows["peak memory"]["detector"]
        add("peak memory, times the files mapped", 1.3, memory["of_mapped"], True)
        if "of_gguf" in memory:
            add("peak memory, times the GGUF alone", 1.3, memory["of_gguf"], True)
    if "training" in rows:
        add("training: times a plain Trainer, both eager", 1.5, rows["training"]["ratios"]["transformers"], False)
    if "transformers" in rows.get("training, compiled", {}).get("ratios", {}):
        add("training, compiled: times a plain Trainer, eager", 1.5, rows["training, compiled"]["ratios"]["transformers"], False)
    return found


def _is_judged(result):
    on_gpu = result.get("models", {}).get("gpu_offload") or (result.get("transformers") or {}).get("device", "cpu") != "cpu"
    return result["run"]["cores"] == result["threads"] == 2 and not on_gpu


# -- tables


def _number(number):
    digits = max(0, 2 - int(np.floor(np.log10(abs(number["median"]))))) if number["median"] else 0
    return f"{number['median']:,.{min(digits, 2)}f} (±{50 * number['spread']:.0f} %{_mark(number)})"


def _mark(number):
    return ", busy" if number["spread"] > BUSY else ""


def _table(columns, rows):
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"] + ["| " + " | ".join(row) + " |" for row in rows]


def _footer(result):
    run = result["run"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if name in ("torch", "transformers", "llama_cpp_python"))
    counts = {title: row["values"]["guard"]["n"] for title, row in result.get("compared", {}).items()}
    fewer = "".join(f", {title} {n}" for title, n in counts.items() if n != run["config"]["rounds"])
    gpu = f"{run['gpu']} with CUDA {run['cuda']}, " if "gpu" in run else ""
    lines = ["", f"{result['threads']} thread(s), {run['cpu']}, {run['cores']} cores, {gpu}Python {run['python']}, {versions}. "
             f"Median of {run['config']['rounds']} rounds{fewer}; ± is half the distance of the quartiles, of fewer than four rounds of the extremes."]
    reasons = sorted({f"{name}: {reason}" for row in result.get("compared", {}).values() for name, reason in row.get("not_measured", {}).items()})
    if reasons:
        lines.append(f"Not measured ({'; '.join(reasons)}).")
    if result.get("left_out"):
        lines.append(f"Left out: {result['left_out']}.")
    if result.get("load_before") is not None:
        others = result.get("others_share")
        since = "" if others is None else f"; other processes took {100 * others:.1f} % of the CPU time since"
        mark = f"; **busy**: above {LOADED:g} of the cores, or {100 * OTHERS:.0f} %" if loaded(result) else ""
        lines.append(f"Load average before the start {result['load_before']:.1f}{since}{mark}.")
    if result["busy"]:
        lines.append(f"**Busy**: numbers that spread over more than {100 * result['busy_bound']:.0f} %, here {len(result['busy'])}.")
    if result["quick"]:
        lines.append("**A quick run: these numbers mean nothing.**")
    return lines


def _limits(machine):
    """Two lines: what a machine can do, and how much of it is used."""
    product, copy = ({**machine[name], "median": machine[name]["median"] / 1e9} for name in ("matmul_flop_per_s", "copy_bytes_per_s"))
    return [f"This machine ({machine.get('device', 'cpu')}): a matrix product in {machine.get('matmul_type', 'float32')} with {_number(product)} GFLOP/s, a copy with "
            f"{_number(copy)} GB/s.",
            f"Reached: {'; '.join(f'{what} {100 * share:.0f} %' for what, share in machine['shares'].items())}."]


def markdown(result):
    """The tables of a comparison, as README.md shows them."""
    names = ("guard", "bare", "torch", "transformers", "compiled")

    def cell(row, name):
        return _number(row["values"][name]) if name in row["values"] else "-"

    def ratio(row, name):
        return f"{row['ratios'][name]['median']:.2f}{_mark(row['ratios'][name])}" if name in row["ratios"] else "-"

    lines = _table(("", "unit", "guard", "llama.cpp bare", "PyTorch backend", "transformers eager", "compiled", "guard / bare", "guard / eager"), [
        (title, row["unit"], *(cell(row, name) for name in names), ratio(row, "bare"), ratio(row, "transformers"))
        for title, row in result["compared"].items()])
    if result.get("machine"):  # none without torch
        lines += ["", *_limits(result["machine"])]
    guarding = result["guarding"]
    push = f"; before that no push blocks for more than {_number(guarding['push_steps'])}" if "push_steps" in guarding else ""
    push += f", once the question was read, which takes {_number(guarding['begin_steps'])}: the proxy does it while the model's server reads it, too" if "begin_steps" in guarding else ""
    lines += ["", f"A harmless answer of {guarding['answer_tokens']} tokens, which {guarding['model']} writes in {_number(guarding['generate_s'])} s, costs "
              f"{_number(guarding['guard_percent'])} % more when it is guarded as a whole and {_number(guarding['streamed_percent'])} % as a stream; after the "
              f"last chunk the stream waits {_number(guarding['wait_steps'])} generation steps{push}.", ""]
    lines += _table(("target", "bound", "measured", ""), [
        (target["what"], f"{'at most' if target['at_most'] else 'at least'} {target['bound']}", f"{target['is']:.2f}",
         ("met" if target["met"] else "**missed**") + (", busy" if target["busy"] else "") if _is_judged(result) else "not judged")
        for target in result["targets"]])
    return "\n".join(lines + _footer(result))


# -- the sweep


@contextmanager
def _own_cache():
    """Files of the sweep go where they are deleted again: F16 with all blocks alone has 270 MB."""
    before = os.environ.get("PROTECTOR_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROTECTOR_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("PROTECTOR_CACHE")
            if before is not None:
                os.environ["PROTECTOR_CACHE"] = before


@_own_cache()
def sweep(config, sizes, rounds, threads):
    """dict of kind "bench_sweep": speed of llama.cpp bare along one axis at a time. Quality isn't measured here."""
    path, writer, n = Path(config.detector or WEIGHTS / "detector.gguf"), Path(config.detoxifier or WEIGHTS / "detoxifier.gguf"), sizes.prefill[0]
    depth, whole = gguf.read_metadata(path).depth, gguf.read_metadata(writer).depth
    ids = [1000 + i for i in range(n + sizes.stream)]  # speed doesn't depend on which
    axes = {
        "depth": {str(blocks): {"depth": blocks} for blocks in sizes.depths},
        "quantisation": {name: {"quantisation": name} for name in sizes.quantisations},
        "LoRA": {"merged, or none": {}, "at run time": {"adapter": path}},
        "threads": {str(count): {"n_threads": count} for count in sorted({1, 2, cpu_threads()}) if count <= cpu_threads()},
        "detoxifier, merged": {name: {"depth": whole, "quantisation": name} for name in sizes.quantisations},
        "detoxifier, LoRA at run time": {gguf.AS_BASE: {"depth": whole, "quantisation": gguf.AS_BASE, "adapter": writer}},
    }
    result = {"kind": "bench_sweep", "tokens": n, "depth": depth, "quantisation": "F16", "axes": {}}
    for axis, settings in axes.items():
        _say(axis)
        points = {name: _point(**{"depth": depth, "n_threads": threads, **setting}) for name, setting in settings.items()}
        prefill = in_turns({name: rate(n, lambda bare=bare: bare.read(ids[:n])) for name, bare in points.items()}, rounds)
        stream = in_turns({name: lambda bare=bare: sizes.stream / bare.feed(ids[:n], ids[n:]) for name, bare in points.items()}, rounds)
        result["axes"][axis] = {name: {
            "prefill": described(prefill[name]), "token by token": described(stream[name]),
            "bytes": llama_cpp.llama_model_size(bare.weights.pointer)} for name, bare in points.items()}
    return result


def _point(depth, n_threads, quantisation="F16", adapter=None):
    """Bare on the base's first blocks."""
    return Bare(_Weights.of(gguf.runnable_base(base_path(), depth, quantisation), -1), n_threads, adapter)


def sweep_markdown(result):
    """The table of a sweep."""
    lines = _table(("", "", f"{result['tokens']} tokens at once, tokens/s", "token by token, tokens/s", "MB"), [
        (axis, name, _number(point["prefill"]), _number(point["token by token"]), f"{point['bytes'] / 1e6:.0f}")
        for axis, points in result["axes"].items() for name, point in points.items()])
    lines += ["", f"llama.cpp bare, {result['depth']} blocks in {result['quantisation']} without an adapter where the row doesn't say otherwise; the "
              "detoxifier has all blocks. base is the base model's own Q4_1."]
    return "\n".join(lines + _footer(result))
