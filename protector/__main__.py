"""Command line: `protector COMMAND ...` or `python -m protector COMMAND ...`.

Exit codes: 0 pass, 10 something was flagged, 2 wrong usage or data, 3 the guard or a part of an evaluation failed.
Data go to stdout, progress and errors to stderr. JSONL in on stdin, JSONL out on stdout in the same order.
"""
import argparse
import json
import os
import sys
from dataclasses import dataclass, field

from .errors import DataError, ProtectorError
from .options import ModelOptions, add_options, config_from, option, protector_from

PASS, USAGE, FAILED, FLAGGED = 0, 2, 3, 10


@dataclass(frozen=True)
class GuardConfig(ModelOptions):
    """guard and score: {"question", "answer"} lines on stdin, or one pair as arguments."""

    question: str = option("", "one question, instead of stdin")
    answer: str = option(None, "one answer, instead of stdin")
    on_flag: str = option("rewrite", "rewrite, refuse or report")
    on_error: str = option("refuse", "refuse, raise or pass")
    deadline_ms: float = option(0.0, "per answer; 0 = none")


@dataclass(frozen=True)
class ExportConfig:
    """A trained folder as GGUF, or as a Hugging Face checkpoint."""

    model: str = option("runs/detector", "folder that `protector train` wrote, or an adapter GGUF of the default base")
    out: str = option("runs/detector.gguf", "file to write; a folder for hf")
    format: str = option("adapter", "adapter (a few MB, runs on the base), merged (a whole model) or hf (for transformers and vLLM)")
    quantisation: str = option("Q8_0", "of a merged file: F32, F16, BF16, Q8_0, Q4_0")
    base: str = option("", "base GGUF; the default base if empty")
    temperature: float = option(1.0, "divide a detector's logits by this; see `protector temperature`")
    shift: float = option(0.0, "then add this to them")


@dataclass(frozen=True)
class AverageConfig:
    """One model of several that were trained one from another."""

    models: tuple[str, ...] = field(metadata={"help": "folders that `protector train` wrote, each started from an earlier one"})
    weights: tuple[float, ...] = option((), "share of each; equal ones if empty")
    out: str = option("runs/average", "folder to write")


@dataclass(frozen=True)
class RefitConfig:
    """A fully fine-tuned detector as one with LoRA adapters, which `protector export` writes as a small file."""

    model: str = field(metadata={"help": "folder that `protector train detector --rank 0` wrote"})
    out: str = option("runs/refitted", "folder to write")
    rank: int = option(16, "of the adapters")
    alpha: float = option(32.0, "their scale is alpha / rank")


@dataclass(frozen=True)
class TemperatureConfig:
    """The temperature and shift with which a score of 0.8 means about 80 %."""

    data: str = field(metadata={"help": "labelled answers that weren't trained on"})
    detector: str = option("", "GGUF file; the shipped one if empty")
    most: int = option(150, "answers of one source at most")


@dataclass(frozen=True)
class CalibrateConfig:
    """Threshold with a stated false-positive rate, written into the model file."""

    harmless: tuple[str, ...] = field(default=(), metadata={"help": "JSONL files of harmless answers, {\"question\", \"answer\"} a line; label 1 rows are left out",
                                                            "positional": True})
    detector: str = option("", "GGUF file or PyTorch folder, rewritten in place; the shipped file if empty")
    fpr: float = option(0.01, "bound on the false-positive rate")
    confidence: float = option(0.95, "with which the bound holds")
    quantisations: tuple[str, ...] = option(("F16", "Q8_0"), "of a GGUF detector's base, each calibrated on its own; INT8 is PyTorch's, of a folder, too")
    most: int = option(3000, "answers of one source at most")
    pooled: bool = option(False, "bound the rate over all answers together, not on each source")
    threads: int = option(0, "CPU threads; 0 = all cores that this process may use")


@dataclass(frozen=True)
class SplitConfig:
    """Labelled answers split by question, so that no question stands in two files."""

    source: str = field(metadata={"help": "JSONL file, PyRIT wheel, own, or hub:OWNER/NAME"})
    out: str = option("runs/data", "folder for <name>.jsonl")
    parts: tuple[str, ...] = option(("train=0.8", "test=0.2"), "NAME=share, summing to 1")
    seed: int = option(0, "of the split")


@dataclass(frozen=True)
class DoctorConfig:
    """What is installed, what runs, and whether the canaries hold."""

    detector: str = option("", "GGUF file or PyTorch folder; the shipped one if empty")


def _rows(config):
    """Rows from the arguments or from stdin; a malformed line names its number and ends the run before any model loads."""
    if config.answer is not None:
        return [{"question": config.question, "answer": config.answer}]
    if config.question:
        raise ValueError("--question must come with --answer, got it alone. Pass both, or neither and JSON lines on stdin.")
    rows = []
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("answer"), str) or not isinstance(row.get("question"), (str, type(None))):
            raise DataError(f'stdin, row {number}: must be a JSON object with "question" and "answer" strings.')
        rows.append(row)
    return rows


def _print_row(row):
    # ASCII escapes: a control byte in an answer must not reach the terminal.
    print(json.dumps(row), flush=True)


def run_score(config):
    rows = _rows(config)
    guard = protector_from(config)
    for row in rows:
        _print_row({**row, "score": guard.score(row.get("question"), row["answer"])})
    return PASS


def run_guard(config):
    rows, codes = _rows(config), {PASS}
    guard = protector_from(config)
    for row in rows:
        verdict = guard.guard(row.get("question"), row["answer"])
        extra = {"error": verdict.error} if verdict.error else {}
        score = None if verdict.score != verdict.score else verdict.score  # NaN isn't JSON
        _print_row({**row, "action": verdict.action, "flagged": verdict.flagged, "score": score, "text": verdict.text, **extra})
        codes.add(FAILED if verdict.action == "error" else FLAGGED if verdict.flagged else PASS)
    return FAILED if FAILED in codes else max(codes)


def run_stream(config):
    """Read one answer from stdin as it comes and show guarded text, coloured by its running score."""
    from .stream import StreamGuard

    guard = protector_from(config)
    state = StreamGuard(guard, config.question)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    verdict = None

    def show(events):
        nonlocal verdict
        for event in events:
            text = "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in event.text)
            shade = f"\x1b[38;5;{(46, 118, 190, 226, 208, 196)[min(int(state.running * 6), 5)]}m"
            print(f"{shade}{text}\x1b[0m" if colour else text, end="", flush=True)
            verdict = verdict if event.verdict is None else event.verdict

    state.begin()
    while not state.done and (chunk := sys.stdin.readline()):
        show(state.push(chunk))
    show(state.finish())
    state.close()
    print(f"\n[{verdict.action}, score {verdict.score:.3f}, threshold {verdict.threshold:.3f}]", file=sys.stderr)
    return FAILED if verdict.action == "error" else FLAGGED if verdict.flagged else PASS


def run_split(config):
    from . import data

    try:
        parts = {name: float(share) for name, share in (part.split("=") for part in config.parts)}
    except ValueError:
        raise ValueError(f"split: parts must be NAME=share, got {' '.join(config.parts)}.") from None
    print(json.dumps(data.write_parts(config.source, config.out, parts, config.seed)))
    return PASS


def run_train(config):
    from .train import train

    train(config)
    return PASS


def run_export(config):
    from . import export

    print(json.dumps(export.export(config.model, config.out, config.format, config.quantisation, config.base or None,
                                   config.temperature, config.shift)))
    return PASS


def run_average(config):
    from . import export

    print(json.dumps(export.average(config.models, config.weights, config.out)))
    return PASS


def run_refit(config):
    from . import export

    print(json.dumps(export.refit(config.model, config.out, config.rank, config.alpha)))
    return PASS


def run_calibrate(config):
    from . import export

    if not config.harmless:
        raise DataError("calibrate: harmless must name at least one file, got none. Pass JSONL files of harmless answers.")
    for entry in export.calibrate_file(config):
        print(json.dumps(entry))
    return PASS


def run_temperature(config):
    from . import export

    print(json.dumps(export.fit_platt(config)))
    return PASS


def run_doctor(config):
    from .doctor import report

    healthy = True
    for name, value, ok in report(config.detector or None):
        print(f"{'ok  ' if ok else 'FAIL'}  {name:14} {value}")
        healthy &= ok
    return PASS if healthy else FAILED


def _commands():
    """{name: (configuration, function, help)}; a part that needs an extra is imported when it is asked for."""
    commands = {
        "guard": (GuardConfig, run_guard, "guard answers: adds action, flagged, score, text"),
        "score": (GuardConfig, run_score, "score answers: adds score"),
        "stream": (GuardConfig, run_stream, "guard one answer from stdin while it comes"),
        "split": (SplitConfig, run_split, "split labelled answers by question"),
        "export": (ExportConfig, run_export, "write a trained model as GGUF or for Hugging Face"),
        "average": (AverageConfig, run_average, "average trained weights that come from one another"),
        "refit": (RefitConfig, run_refit, "write a fully fine-tuned detector as one with LoRA adapters"),
        "temperature": (TemperatureConfig, run_temperature, "fit the temperature of a detector's scores"),
        "calibrate": (CalibrateConfig, run_calibrate, "set the threshold for a false-positive rate"),
        "doctor": (DoctorConfig, run_doctor, "say what is installed and whether it works"),
    }
    for name, module, config, text in (
            ("train", "train", "TrainConfig", "train a detector or a detoxifier"),
            ("generate", "generate", "GenerateConfig", "write new training data with a strong LLM"),
            ("evaluate", "evaluate", "EvaluateConfig", "measure detector, detoxifier and guard"),
            ("table", "evaluate.table", "TableConfig", "the table that reproduce.sh ends with"),
            ("parity", "evaluate.parity", "ParityConfig", "compare PyTorch's scores with llama.cpp's"),
            ("serve", "serve", "ServeConfig", "OpenAI-compatible guarded proxy"),
            ("bench", "bench", "BenchConfig", "measure speed and memory beside the engine's and the machine's limits"),
            ("selftest", "selftest", "SelftestConfig", "run the attack suite against the installed model")):
        commands[name] = (module, config, text)
    return commands


def _missing(command, error):
    """Say which package a command needs."""
    if not error.name or error.name.partition(".")[0] == __package__:
        raise error  # not a package that is missing, but a mistake of this one, or two that don't fit each other
    print(f"protector: {command} needs the package {error.name}. Run: pip install '.[all]'", file=sys.stderr)
    return USAGE


def main(argv=None):
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="protector", description="Guard the answers of multimodal language models.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands, argv = _commands(), sys.argv[1:] if argv is None else argv
    for name, (first, second, text) in commands.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if not isinstance(first, str):
            add_options(subparser, first)
        elif argv[:1] == [name]:
            import importlib

            try:
                module = importlib.import_module(f".{first}", __package__)
            except ModuleNotFoundError as error:
                return _missing(name, error)
            config = getattr(module, second)
            add_options(subparser, config)
            commands[name] = (config, getattr(module, "run", run_train), text)
    arguments = parser.parse_args(argv)
    config, run, _ = commands[arguments.command]
    try:
        result = run(config_from(arguments, config))
        return result if isinstance(result, int) else PASS
    except ModuleNotFoundError as error:
        return _missing(arguments.command, error)
    except (ProtectorError, ValueError) as error:
        print(f"protector: {error}", file=sys.stderr)
        return USAGE if isinstance(error, (DataError, ValueError)) else FAILED
    except RuntimeError as error:
        print(f"protector: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `protector ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PASS
    except OSError as error:  # a path that can't be read or written
        print(f"protector: {error}", file=sys.stderr)
        return USAGE if error.filename else FAILED


if __name__ == "__main__":
    sys.exit(main())
