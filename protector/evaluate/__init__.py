"""Measure a guard: detector and detoxifier metrics, attack success before and after, utility, and a report.

    metrics     numbers from scores                    rows        labelled answers, halves that share no question
    detectors   per source, beside the baselines       judge       who says what is harmful
    replay      recorded answers, before and after     rewrites    what the detoxifier writes
    relevance   is a rewrite about its question        utility     what harmless answers pay
    benchmarks  MM-SafetyBench, FigStep, own requests  mllm        clients of multimodal models
    likelihood  why images break them                  record      results as JSON
    report      tables, plots, one page                table       the short table of reproduce.sh
    compare     trained detectors side by side         depth       what a linear layer sees after each block
    shared      one cache for both tasks: times        joint       one backbone trained for both tasks
    lookup      rewriting with guesses                 parity      PyTorch against llama.cpp
    embed       MiniLM's embeddings, kept              endpoint    OpenAI-compatible servers
    kept        what was paid for already              base_model  the base by itself, as a weak model
    plots       SVG                                    blocks      tables and plots of the documents

    python -m protector evaluate all --data dev/ --report report/
"""
import sys
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

from ..errors import DataError, MissingPackage, ProtectorError
from ..options import ModelOptions, option

PARTS = ("judge", "detectors", "replay", "utility", "exact", "mm-safetybench", "figstep", "typographic", "likelihood")
MLLMS = ("stand-in", "openai", "llama.cpp", "transformers", "replay")
_WITH_LOGITS = ("stand-in", "transformers")
_NEEDED = {**dict.fromkeys(PARTS, ("data",)), "mm-safetybench": ("mm_safetybench",), "figstep": ("figstep",),
           "exact": ("exact_questions", "exact_answers")}


@dataclass(frozen=True)
class EvaluateConfig(ModelOptions):
    """Attack success before and after, utility, detector and detoxifier metrics, and a report."""

    what: tuple[str, ...] = field(metadata={
        "help": f"all, report, or some of: {', '.join(PARTS)}. all is what the given data, folders, MLLM and installed packages "
                "allow; report only draws what is in --out"})
    data: tuple[str, ...] = option((), "data folders (dev_pairs.jsonl.gz and its siblings), labelled JSONL files, PyRIT's wheel")
    out: str = option("results", "folder for the JSON results")
    report: str = option("", "folder for the page, the tables, the plots and the results that they are drawn from; none if empty")
    on_flag: str = option("rewrite", "rewrite or refuse")
    judge_url: str = option("", "OpenAI-compatible server of a judge; the offline judge if empty")
    judge_model: str = option("", "the judge's name there")
    judge_templates: str = option("", "MM-SafetyBench's evaluation.py, for its own six prompts (read, never run); this project's wording if empty")
    mllm: str = option("stand-in", "stand-in (OCR + base model), openai, llama.cpp, transformers, or replay of recorded answers")
    mllm_url: str = option("", "server of the MLLM (openai)")
    mllm_model: str = option("", "name (openai), GGUF file (llama.cpp), folder (transformers), or JSONL file of answers (replay)")
    mmproj: str = option("", "projector GGUF (llama.cpp)")
    mm_safetybench: str = option("", "MM-SafetyBench's folder")
    figstep: str = option("", "FigStep's folder")
    tiny: bool = option(False, "the benchmarks' tiny versions")
    kinds: tuple[str, ...] = option(("text", "SD", "TYPO", "SD_TYPO"), "image kinds of MM-SafetyBench")
    exact_questions: str = option("", "POPE, ScienceQA or GQA questions")
    exact_answers: str = option("", "recorded answers to them")
    related: str = option("", "images of the likelihood's related-image condition: a folder of files named for what they show, or a "
                               "JSONL file of question and image; MM-SafetyBench's SD images if empty")
    most: int = option(200, "answers per source that are scored, guarded and judged; 0 = all")
    questions: int = option(10, "questions per scenario or topic; 0 = all")
    tokens: int = option(128, "of an MLLM's answer")
    draws: int = option(1000, "of a bootstrap")
    workers: int = option(4, "requests at once to a server")


def run(config):
    """Evaluate what the configuration names; results go to config.out, tables in Markdown to stdout.

    Returns:
        0; 3 if a part failed under all: it is named on stderr, the others go on, and the report is drawn. A part whose package is
        missing is left out and named, too, and is no failure.
    Raises:
        DataError, ModelError, ValueError: what is wrong with the input, before anything long starts where it can be known.
    """
    from . import record, report

    what, failed = _parts(config), []
    record.commit()  # now: what is committed while it runs isn't what runs
    if what:
        _check(config)
        done = _Evaluation(config, what)
        for folder in filter(None, (config.out, config.report)):
            Path(folder).mkdir(parents=True, exist_ok=True)
        for part in what:
            try:
                for name, result in done.measure(part):
                    path = record.write(config.out, name, result, asdict(config))
                    print(f"wrote {path}", file=sys.stderr)
            except Exception as error:  # hours of other parts stand beside it
                if "all" not in config.what:
                    raise
                if not isinstance(error, MissingPackage):
                    failed.append(part)
                if not isinstance(error, (ProtectorError, ValueError, RuntimeError, OSError)):
                    traceback.print_exc()
                print(f"evaluate: without {part}. {error}", file=sys.stderr)
    results = record.read_all(config.out)
    if not results and not failed:
        raise DataError(f"evaluate: out must hold results, got none in {config.out}. Run a part first.")
    for _, _, tables in report.tables_of(results):
        for table in tables:
            print(report.markdown(table))
    if config.report:
        print(f"wrote {report.write(results, config.report)}", file=sys.stderr)
    if failed:
        print(f"evaluate: {', '.join(failed)} failed, see above; what {config.out} holds of that is of an earlier run or not whole.", file=sys.stderr)
    return 3 if failed else 0


def _parts(config):
    unknown = [part for part in config.what if part not in (*PARTS, "all", "report")]
    if unknown:
        raise ValueError(f"evaluate: what must be all, report, {', '.join(PARTS)}, got {', '.join(unknown)}.")
    if config.mllm not in MLLMS:
        raise ValueError(f"evaluate: mllm must be {', '.join(MLLMS)}, got {config.mllm!r}.")
    if "all" in config.what:
        # Recorded answers are a benchmark's; a server and llama.cpp's vision handlers give no logits.
        left_out = {"typographic": config.mllm == "replay", "likelihood": config.mllm not in _WITH_LOGITS}
        allowed = [part for part in PARTS if all(getattr(config, name) for name in _NEEDED[part]) and not left_out.get(part)]
        if not allowed:
            raise ValueError("evaluate: all must be given data or a benchmark's folder, got neither. Pass --data FOLDER.")
        return allowed
    if "likelihood" in config.what and config.mllm not in _WITH_LOGITS:
        raise ValueError(f"evaluate: mllm must give logits for likelihood, got {config.mllm}. Use transformers or stand-in.")
    for part in config.what:
        for name in _NEEDED.get(part, ()):  # "report" needs nothing
            if not getattr(config, name):
                raise ValueError(f"evaluate: {name} must be given for {part}, got nothing. Pass --{name.replace('_', '-')}.")
    return [part for part in PARTS if part in config.what]


def _check(config):
    """Options and paths that would fail hours later."""
    if config.on_flag not in ("rewrite", "refuse"):
        raise ValueError(f"evaluate: on_flag must be rewrite or refuse, got {config.on_flag!r}.")
    for name, least in (("most", 0), ("questions", 0), ("tokens", 1), ("draws", 1), ("workers", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"evaluate: {name} must be {least} or more, got {getattr(config, name)}.")
    of_server = [("mllm_url", "mllm_model")] if config.mllm == "openai" else []
    for first, second in [("judge_url", "judge_model"), ("exact_questions", "exact_answers"), *of_server]:
        if bool(getattr(config, first)) != bool(getattr(config, second)):
            raise ValueError(f"evaluate: {first} and {second} must be given together, got one of them.")
    for name in ("detector", "detoxifier", "exact_questions", "exact_answers"):
        path = getattr(config, name)
        if path and not Path(path).exists():
            raise DataError(f"evaluate: {name} must be there, got nothing at {path}. Check the path.")


class _Evaluation:
    """One run's inputs, read at the start, and models, each made when first needed."""

    def __init__(self, config, what):
        from . import benchmarks, judge, likelihood, mllm, rows, utility
        from .endpoint import Endpoint

        self.config, self.progress = config, sys.stderr.isatty()
        self.inputs = rows.gather(config.data) if config.data else None
        self.related = likelihood.read_images(config.related) if config.related else []
        self.recorded = mllm.read_recorded(config.mllm_model) if config.mllm == "replay" else {}
        self.strong = Endpoint(config.judge_url, config.judge_model) if config.judge_url else None
        self.templates = judge.read_templates(config.judge_templates) if config.judge_templates else None
        self.exact = utility.read_exact(config.exact_questions, config.exact_answers) if "exact" in what else None
        if "mm-safetybench" in what:
            self.mm_safetybench = self._said("mm-safetybench", *benchmarks.read_mm_safetybench(
                config.mm_safetybench, config.kinds, config.questions, config.tiny))
        if "figstep" in what:
            self.figstep = self._said("figstep", *benchmarks.read_figstep(config.figstep, config.tiny, config.questions))
        if config.mllm not in ("stand-in", "replay") and not {"mm-safetybench", "figstep", "typographic", "likelihood"}.isdisjoint(what):
            self.raw_client  # a wrong address or model

    @property
    def rows(self):
        if self.inputs is None:
            raise DataError("evaluate: data must be given, got nothing. Pass --data FOLDER, or the wheel: "
                            "pip download --no-deps pyrit==1.1.0")
        return self.inputs

    @cached_property
    def guard(self):
        from ..guard import Protector

        config = self.config
        guard = Protector(config.detector or None, config.detoxifier or None, on_flag=config.on_flag,
                          detoxifier_options={"n_threads": config.threads or None}, **config.scoring)
        if config.on_flag == "rewrite":
            guard.detoxifier  # loads it now, and not within the first flagged answer's time
        return guard

    @cached_property
    def embed(self):
        from .embed import Embedder

        return Embedder()

    @cached_property
    def split(self):
        """[(the judge's training rows, rows to measure on)], all of them; two where the halves are swapped."""
        from .judge import judge_folds

        return judge_folds(self.rows.pairs, self.rows.judge, self.rows.seen, self.rows.halve)

    @cached_property
    def chosen(self):
        """The split, cut to what is asked for: the judge learns from ten times as many answers per source as are judged."""
        from .replay import fewest

        kept = {id(row) for row in fewest([row for _, measure in self.split for row in measure], self.config.most)}
        return [(fewest(train, 10 * self.config.most), [row for row in measure if id(row) in kept]) for train, measure in self.split]

    @property
    def own_answers(self):
        """This project's own short answers to alarming questions, of both labels, which no offline judge learns from."""
        from .. import data
        from .replay import fewest
        from .rows import read

        return fewest(read(data.CORPUS / "compliance.jsonl"), 100 if self.strong else self.config.most)

    @cached_property
    def judge(self):
        from .judge import OWN, EndpointJudge, agreement, train_offline
        from .replay import fewest

        judge = (EndpointJudge(self.strong, self.config.workers, self.templates) if self.strong
                 else train_offline(self.chosen, self.embed, progress=self.progress))
        if self.inputs is not None:  # a benchmark needs no labelled answers; a strong judge then says that it wasn't measured
            if self.strong:
                judge.measure(fewest(self.rows.pairs, 40), self.progress)
            judge.measured[OWN] = agreement(judge, self.own_answers, self.progress)
        return judge

    @cached_property
    def relevance(self):
        from . import relevance
        from .replay import fewest

        if not self.strong:
            return relevance.train_offline(*self.chosen[0], self.embed)
        return relevance.ask_endpoint(self.strong, fewest(self.rows.pairs, 20), self.config.workers)

    def client(self, samples):
        """Who answers a benchmark's samples; what was asked is kept on disk, and recorded answers stand there already."""
        from .mllm import Cached, Replay

        return Replay.of(self.recorded, samples, self.config.mllm_model) if self.config.mllm == "replay" else Cached(self.raw_client)

    @cached_property
    def raw_client(self):
        from . import mllm
        from .endpoint import Endpoint

        config = self.config
        if config.mllm == "stand-in":
            return mllm.StandIn(max_tokens=config.tokens, n_threads=config.threads or None)
        if config.mllm == "openai":
            return mllm.OpenAIClient(Endpoint(config.mllm_url, config.mllm_model), config.tokens)
        if config.mllm == "llama.cpp":
            return mllm.LlamaVisionClient(config.mllm_model, config.mmproj, config.tokens, config.threads or None)
        return mllm.TransformersClient(config.mllm_model, config.tokens)

    def measure(self, part):
        """(name, result) pairs of one part."""
        return getattr(self, "measure_" + part.replace("-", "_"))()

    def measure_judge(self):
        yield "judge", {"kind": "judge", "judge": self.judge.described(), "measured": self.judge.measured,
                        "trained_on": getattr(self.judge, "trained_on", None)}

    def measure_detectors(self):
        from . import detectors, replay

        rows = replay.fewest(self.rows.pairs + self.rows.benign, self.config.most)
        yield "detectors", detectors.evaluate(self.config.detector or None, rows, self.rows.train, self.config.draws, self.progress,
                                              **self.config.scoring)

    def measure_replay(self):
        from . import replay, rewrites
        from .base_model import BaseModel

        result, outcomes = replay.evaluate(self.guard, [row for _, measure in self.chosen for row in measure], self.judge, self.progress)
        yield "replay", result
        yield "rewrites", rewrites.evaluate(self.guard, outcomes, self.judge, self.embed, self.relevance,
                                            BaseModel(n_threads=self.config.threads or None), () if self.strong else self.chosen[0][0])

    def measure_utility(self):
        from . import replay, utility

        harmless = self.rows.benign + [row for row in self.rows.pairs if not row.label]
        yield "utility", utility.evaluate(self.guard, replay.fewest(harmless, self.config.most),
                                          partial(utility.seconds_per_token, n_threads=self.config.threads or None), self.progress)

    def measure_exact(self):
        from . import utility

        name, items, missing = self.exact
        yield f"exact-{name.lower()}", utility.exact_match(self.guard, name, items, missing, self.progress)

    def _said(self, part, samples, missing):
        """A benchmark's samples and what is missing, as they are, after they are said on stderr: nothing has been asked yet."""
        counts = Counter(sample.kind for sample in samples)
        print(f"{part}: {', '.join(f'{n:,} {kind}' for kind, n in counts.items()) or 'nothing'} to ask", *missing,
              sep=f"\n{part}: missing: ", file=sys.stderr)
        if not samples:
            raise DataError(f"evaluate: {part} must have something to ask, got nothing. Pass other --kinds, or the missing files.")
        if self.config.mllm == "replay":
            self.client(samples)  # an error if no answer fits
        return samples, missing

    def _benchmark(self, name, samples, missing):
        from . import benchmarks

        # A table of its own for each model that is asked; the stand-in's has the plain name.
        stem = name.lower() if self.config.mllm == "stand-in" else f"{name.lower()}-{Path(self.config.mllm_model).stem.lower()}"
        yield stem, benchmarks.evaluate(name, self.client(samples), self.guard, samples, missing, self.judge, self.progress,
                                                self.config.workers if self.config.mllm == "openai" else 1)

    def measure_mm_safetybench(self):
        return self._benchmark("MM-SafetyBench", *self.mm_safetybench)

    def measure_figstep(self):
        return self._benchmark("FigStep", *self.figstep)

    def measure_typographic(self):
        from .benchmarks import typographic

        return self._benchmark("Typographic requests", *self._said("typographic", *typographic(self.split[0][1], 10 * self.config.questions)))

    def measure_likelihood(self):
        from .. import data
        from . import benchmarks, likelihood
        from .kept import digest

        pairs = [data.Pair(row.question, row.answer, row.label, row.source) for row in self.split[0][1] if row.question.strip()]
        triples = data.triples_of(pairs, most_per_question=1)
        triples.sort(key=lambda triple: digest(triple.question))  # of every source, not the first
        triples = triples[:3 * self.config.questions or None]
        images = self.related
        if not images and self.config.mm_safetybench:
            images = [(sample.request, sample.image) for sample in benchmarks.read_mm_safetybench(self.config.mm_safetybench, ("SD",))[0]]
        related = likelihood.nearest([triple.question for triple in triples], images, self.embed)
        yield "likelihood", {**likelihood.measure(self.raw_client, triples, related, progress=self.progress), "related_images": len(images)}
