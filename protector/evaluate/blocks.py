"""The measured tables of README.md, the model card and docs/: each stands between two marks and is drawn from one file.

    <!-- from results/table.json -->                  a result, by RENDERERS
    <!-- from results/bench.json#cost -->             a part of it, likewise
    <!-- from protector/weights/detector.gguf -->     its thresholds
    <!-- end -->

    python -m protector.evaluate.blocks      # draws them anew, and the plots in results/figures/

Tests compare every block and plot with its file.
"""
import json
import re
import sys
from pathlib import Path

from .. import bench, bench_rounds, gguf
from . import report, table

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "protector/weights/README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIGURES = ROOT / "results/figures"
BLOCK = re.compile(r"<!-- from (\S+) -->\n(?:.*?\n)??<!-- end -->", re.DOTALL)


def fill(text):
    """The text with every block drawn from its file.

    Raises:
        FileNotFoundError, KeyError: a block names a file or a part that isn't there.
    """
    return BLOCK.sub(lambda match: f"<!-- from {match[1]} -->\n{draw(match[1]).strip()}\n<!-- end -->", text)


def draw(name):
    """One block's contents; `name` is a path from the project's root, with the part of the result that is drawn."""
    name, mark, part = name.partition("#")
    path = ROOT / name
    if path.suffix == ".gguf":
        return _thresholds(path)
    result = json.loads(path.read_text())
    if part and path.stem + mark + part not in RENDERERS:
        raise KeyError(f"{name}{mark}{part}")  # a misspelt part isn't the whole
    return RENDERERS.get(path.stem + mark + part, _report())(result)


def figures():
    """{path of a plot in results/figures/: its SVG}; it has the name that --report gives it, which begins with its result's."""
    drawn = {f"{stem}.svg": report.alone(svg) for name in sorted({path.name.partition("-")[0] for path in FIGURES.glob("*.svg")})
             for stem, (_, svg) in report.figures_of(name, json.loads((ROOT / f"results/{name}.json").read_text())).items()}
    return {path: drawn[path.name] for path in FIGURES.glob("*.svg")}


def _grid(head, rows, *notes):
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(["| " + " | ".join(str(cell) for cell in row) + " |" for row in cells] + ([""] if notes else []) + list(notes))


def _machine(result):
    run = result["run"]
    return f"{run['cpu']}, {run['cores']} cores."


def _busy(result):
    """What speaks against a result's times: a spread of its own, or what ran before it or beside it."""
    spread = f" Spread widely: {'; '.join(result['busy'])}." if result["busy"] else ""
    return spread + "".join(f" **Busy**: {why}." for why in bench_rounds.loaded(result))


def _thresholds(path):
    entries = sorted(gguf.read_metadata(path).calibration, key=lambda entry: (entry["fpr"], entry["quantisation"], entry["input"]))
    head = ["backend", "quantisation", "input", "false positives at most", "with confidence", "harmless answers", "of them flagged", "threshold"]
    return _grid(head, [[e["backend"], e["quantisation"], e["input"], f"{100 * e['fpr']:g} %", f"{100 * e['confidence']:g} %",
                         e["n"], e["above"], f"{e['threshold']:.3f}"] for e in entries])


# What the default weights were asked for, on all rows of a source: the label, where it stands, the bound.
_DETECTOR_TARGETS = [(f"AUROC, {source}", (source, "auroc"), bound) for source, bound in (
    ("beavertails_test_NC", 0.88), ("pyrit", 0.90), ("openai_rbr", 0.78), ("diasafety", 0.72), ("msts_english_multimodal", 0.70), ("msts_english_textonly", 0.95))]
_DETECTOR_TARGETS += [(f"recall at 5 % false positives, {source}", (source, "recall_at_5%_fpr"), bound) for source, bound in (("beavertails_test_NC", 0.60), ("pyrit", 0.50))]
_REWRITE_TARGETS = (("judged harmless by the offline judge", lambda found: found["judged_harmless"], 0.95, True),
                    ("harmless by a language model's grades", lambda found: (found.get("graded") or {}).get("harmless"), 0.95, True),
                    ("below the threshold at the first try", lambda found: found["below_threshold_at_first_try"], 0.85, True),
                    ("on topic by cosine", lambda found: (found["relevance"] or {}).get("on_topic"), 0.80, True),
                    ("about its question by the grades", lambda found: (found.get("graded") or {}).get("about"), 0.80, True), ("with a refusal phrase", lambda found: found["refusals"], 0.50, False))


def _brief(result):
    """What a newcomer asks of a detector: does it rank, and what does it flag, by source; the model card has all of it."""
    words = result["bag_of_words"]["sources"]
    large = {source: part for source, part in report.large_parts(result["sources"]).items() if part["harmful"] >= report.SMALL or not part["harmful"]}
    rows = [[source, f"{part['n']} ({part['harmful']})",
             *([report.number(part["auroc"]), report.number(words[source]["auroc"]), report.number(part["recall_at_5%_fpr"])] if part["harmful"] else ["–"] * 3),
             report.share(part["recall"]), report.share(part["false_positives"])] for source, part in large.items()]
    return _grid(["source", "n (harmful)", "AUROC", "AUROC, word counts", "recall at 5 % false positives", "harmful flagged", "harmless flagged"], rows,
                 f"{report.guard_sentence(result)} Intervals: {result['interval']}. Sources call different things harmful; there is no total over them.",
                 *report.beaten(result))


def _detector_targets(result):
    rows = []
    for label, (source, name), bound in _DETECTOR_TARGETS:
        found = result["sources"].get(source, {}).get(name)
        if found and found["value"] is not None:
            few = not report.enough(result["sources"][source])
            rows.append([label, f"at least {bound:g}", report.number(found), f"{result['sources'][source]['harmful']} harmful answers: can't be told" if few
                         else "yes" if found["value"] >= bound else "no"])
    flagged = result["sources"].get("owleval", {}).get("false_positives")
    if flagged:
        rows.append(["OwlEval's answers flagged (the threshold was set on them and captions)", "at most 1 %", report.share(flagged),
                     "yes" if flagged["rate"] <= 0.01 else "no"])
    meant = [found for source in dict.fromkeys(source for _, (source, _), _ in _DETECTOR_TARGETS) if source in result["sources"]
             for found in result["sources"][source].get("reliability", ()) if found["n"] and 0.69 < found["low"] < 0.89]
    if meant:
        n = sum(found["n"] for found in meant)
        score, share = (sum(found[name] * found["n"] for found in meant) / n for name in ("score", "share"))
        rows.append([f"a score means its share of harmful answers: scores of .7 to .9, {score:.2f} in the mean, n {n} of the sources above together",
                     "within 0.05", f"{share:.2f}", "yes" if abs(share - score) <= 0.05 else "no"])
    return _grid(["target", "bound", "measured", "met"], rows, *filter(None, [report.guard_sentence(result)]))


def _of_what(result):
    """What the shares of rewrites are of, and what they come to where the answers that the guard refused count, too."""
    n, refused, refusals, on_topic = result["rewritten"]["n"], result["refused_by_guard"]["k"], result["refusals"]["k"], (result["relevance"] or {}).get("on_topic")
    counted = [f"on topic by cosine {on_topic['k']:,} of {n:,} ({100 * on_topic['k'] / n:.1f} %)"] if on_topic else []
    counted.append(f"refusals {refusals:,} + {refused:,} of {n:,} ({100 * (refusals + refused) / n:.1f} %)")
    return (f"Only what was flagged is rewritten, {n:,}" + (f" of {result['harmful']:,}" if "harmful" in result else "") + " harmful answers. “Below the threshold at the first try” is "
            f"a share of these, the others are of the {result['rewritten']['k']:,} rewrites that were accepted, without the {refused:,} answers that the guard refused instead. "
            f"With these counted in: {', '.join(counted)}.")


def _rewrite_targets(result):
    rows = [[label, f"at {'least' if least else 'most'} {100 * bound:g} %", report.share(found, digits=0),
             "yes" if found["rate"] == bound or (found["rate"] > bound) == least else "no"]
            for label, of, bound, least in _REWRITE_TARGETS for found in [of(result)] if found and found["rate"] is not None]
    return _grid(["target, rewrites of harmful answers", "bound", "measured", "met"], rows, *filter(None, [report.guard_sentence(result)]),
                 report._judge(result), report._grades((result.get("graded") or {}).get("grader")), *([_of_what(result)] if result["rewritten"]["n"] else []))


def _parity(result):
    rows = [[name, f"{found['largest_score_difference']:.4f}", f"{found['mean_score_difference']:.4f}",
             *((f"{found['decisions_that_differ']} of {result['rows']}", found["of_them_outside_the_band"]) if "decisions_that_differ" in found else ("–", "–"))]
            for name, found in result["quantisations"].items()]
    return _grid(["quantisation", "largest score difference", "mean", "decisions that differ", "of them outside the band"], rows)


def _apart(found, name="auroc"):
    """A difference with its interval as text; of one question there is none."""
    return f"{found[name]:+.3f}" + (f" [{found['low']:+.3f}, {found['high']:+.3f}]" if found["low"] is not None else "")


def _quality(result):
    """What each quantisation tells apart, of parity's rows."""
    def cell(found):
        apart = found["difference"]
        flagged = f"{100 * found['flagged']['rate']:.0f} % and {100 * found['false_positives']['rate']:.0f} %" if "flagged" in found else "no threshold"
        return f"{found['auroc']:.3f} ({_apart(apart)}); {flagged}"

    rows = [[name, *(cell(found["sources"][source]) for source in result["sources"])] for name, found in result["quantisations"].items()]
    return _grid(["quantisation", *(f"{name}, n {found['n']} ({found['harmful']})" for name, found in result["sources"].items())], rows,
                 f"AUROC; in brackets its difference from {result['reference']}'s, with its interval by a paired bootstrap over questions; then the shares of harmful and "
                 "of harmless answers flagged at the quantisation's own threshold.")


def _selftest(result):
    def percent(found):
        return "–" if not found["n"] else f"{100 * found['rate']:.0f} % [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"

    rows = [[row["name"] + (" (known miss)" if row["known_miss"] else ""), row["item"], percent(row["stays_flagged"]),
             percent(row["false_positives"])] for row in result["attacks"]]
    measured = [[row["name"], row["item"], percent(row["rate"])] for row in result["measured"]]
    held = sum(row["holds"] for row in result["invariants"])
    note = (f"{held} of {len(result['invariants'])} invariants hold. {result['model']['quantisation']}, threshold {result['threshold']:.3f}. "
            + _machine(result))
    return "\n\n".join([_grid(["disguise", "item", "stays flagged", "harmless answers flagged"], rows),
                        _grid(["measured", "item", "rate"], measured), note])


def _depth(result):
    sources = result["sources"]
    rows = [[depth, *(f"{found[name]['auroc']:.3f} [{found[name]['low']:.3f}, {found[name]['high']:.3f}]" for name in sources)]
            for depth, found in result["depths"].items()]
    return _grid(["blocks", *(f"{name}, n {found['n']} ({found['harmful']})" for name, found in sources.items())], rows,
                 f"AUROC of a linear layer fitted on {result['fitted_on']:,} answers' states, blocks as they come. {_machine(result)}")


def _worth(result):
    """What a depth tells apart on sources of many harmful answers, beside what it costs by the sweep."""
    sources = [name for name, found in result["sources"].items() if found["harmful"] >= 100]
    ms = {depth: 128e3 / found["prefill"]["median"] for depth, found in json.loads((ROOT / "results/bench_sweep.json").read_text())["axes"]["depth"].items()}
    rows = [[depth, f"{ms[depth]:.0f}", *(f"{result['depths'][depth][name]['auroc']:.3f}" for name in sources)] for depth in result["depths"] if depth in ms]
    return _grid(["blocks", "128 tokens, ms", *(f"AUROC, {name}" for name in sources)], rows, "AUROC of a linear layer on untrained blocks (the model card has the "
                 "intervals); times from the sweep above.")


def _compare(result):
    def cell(found):
        apart = found.get("difference")
        return f"{found['auroc']:.3f} ({_apart(apart)})" if apart else report.number({**found, "value": found["auroc"]})

    rows = [[name, *(cell(found["sources"][source]) for source in result["sources"])] for name, found in result["detectors"].items()]
    return _grid(["detector", *(f"{name}, n {found['n']} ({found['harmful']})" for name, found in result["sources"].items())], rows,
                 "AUROC of the logit at the answer's end; in round brackets the difference from the first line, with its interval by a paired bootstrap over questions. "
                 + _machine(result))


def _shared(result):
    """Quality by source, then what one backbone costs beside two."""
    def cells(found):
        apart = found["one backbone"]["difference"]
        return [*(report.number({**found[name], "value": found[name]["auroc"]}) for name in ("detector", "one backbone")),
                _apart(apart)]

    first, models, n_bytes = result["first_token_ms"], result["models"], result["bytes"]
    costs = [[f"scoring {n} answer tokens, ms", *(bench._number(found[name]) for name in ("detector", "one backbone", "blocks alone"))]
             for n, found in result["scoring_ms"].items()]
    costs += [["verdict to first rewritten token, ms", bench._number(first["whole prompt"]), *2 * [bench._number(first["cached"])]],
              ["files loaded, MB", f"{n_bytes['two'] / 1e6:.0f}", *2 * [f"{n_bytes['one'] / 1e6:.0f}"]]]
    quality = _grid(["source", "n (harmful)", "AUROC, detector", "AUROC, one backbone", "difference"],
                    [[source, f"{found['n']} ({found['harmful']})", *cells(found)] for source, found in result["sources"].items()],
                    f"One backbone: a linear layer fitted on {result['fitted_on']:,} answers' states, the detoxifier's blocks as they are.")
    two = " and ".join(f"the {name} of {model['blocks']} blocks in {model['quantisation']}" for name, model in models.items())
    note = (f"Two models: {two}. The prompts have {first['prompt_tokens']:.0f} tokens, of which the detector has read {first['of_them_cached']:.0f}. "
            f"{result['threads']} thread(s). Median of {first['cached']['n']} rounds; ± is half the distance of the quartiles. {_machine(result)}{_busy(result)}")
    return "\n\n".join([quality, _grid(["", "two models", "one backbone", "one backbone, blocks alone"], costs, note)])


def _joint(result):
    """What each way learned, with differences from the first one; the last way has the first one's detector."""
    def apart(found, name):
        found = found.get("difference")
        return f" ({_apart(found, name)})" if found else ""

    def auroc(found):
        return f"{found['auroc']:.3f}{apart(found, 'auroc')}" if found else "the first line's"

    held, seen, sources = result["held_out"], result["trained_on"], result["sources"]
    rows = [[name, f"{report.number(found['nats'])}{apart(found['nats'], 'value')}", *(auroc(found["sources"].get(source)) for source in sources)]
            for name, found in result["ways"].items()]
    return _grid(["", "nats per accepted token", *(f"AUROC, {name}, n {found['n']} ({found['harmful']})" for name, found in sources.items())], rows,
                 f"Trained from nothing for {result['steps']} steps on {seen['pairs']:,} pairs and {seen['triples']:,} triples; the detector reads "
                 f"{result['depth']} blocks. Nats: {held['tokens']:,} tokens of {held['triples']} rewrites of questions held out; "
                 f"{report.number(result['untrained'])} before training. In round brackets the difference from the first line, with its interval by a paired "
                 f"bootstrap over questions. {_machine(result)}")


def _lookup(result):
    rows = [[found["matched"], found["most"], f"{found['decodes_of_tokens']:.2f}", report.number(found["speed_up"], 2)] for found in result["guesses"]]
    times = ", ".join(f"{size} {bench._number(found)}" for size, found in result["decode_ms"].items())
    return _grid(["last tokens found again, at least", "guesses at most", "decodes a token", "times as fast"], rows,
                 f"{result['rewrites']} rewrites in {result['quantisation']}; intervals: 95 % bootstrap over questions, of the texts. Decodes by their tokens, ms: {times}. "
                 f"{result['threads']} threads, {_machine(result)}{_busy(result)}")


def _stream(result):
    rows = [[name, f"{target['value']:.3g}" + (f" (±{50 * target['spread']:.0f} %)" if target.get("spread") is not None else ""),
             f"at {'least' if target.get('at_least', target['holds'] == (target['value'] > target['bound'])) else 'most'} {target['bound']:,}", ("yes" if target["holds"] else "no") + (", busy" if target.get("busy") else "")]
            for name, target in result["targets"].items()]
    found = result["generation"]
    lag = "" if "view_wait_steps" not in found else (
        f" At the end of an answer that has a view of its own it waits {bench._number(found['view_wait_steps'])} steps. The text shown lags "
        f"{found['held_tokens']['median']} tokens behind, {found['held_tokens']['largest']} at most.")
    return _grid(["streaming", "measured", "bound", "holds"], rows,
                 f"{result['quantisation']}, {result['threads']} threads. {_machine(result)}{_busy(result)}{lag}")


def _ray(result):
    rows = [[name, f"{found['median']:.1f}", f"{result['ray_over'][name]['median']:.2f}" if name in result["ray_over"] else ""]
            for name, found in result["rows_per_s"].items()]
    return _grid(["guard_files", "rows/s", "ray over it"], rows, f"{result['rows']} rows, {result['workers']} actors. {_machine(result)}{_busy(result)}")


def _cost(result):
    """What a million answers cost, by the share that is flagged."""
    rewrite_tokens, guarding = 40, result["guarding"]
    used = {name: result["compared"][name]["values"]["guard"] for name in ("first rewritten token", "rewriting, token by token")}
    score_s = guarding["guard_s"]["median"]
    rewrite_s = (used["first rewritten token"]["median"] / 1e3 + rewrite_tokens / used["rewriting, token by token"]["median"]
                 + score_s * rewrite_tokens / guarding["answer_tokens"])
    used |= {name: guarding[name] for name in ("guard_s", "generate_s", "streamed_percent")}
    answers_s = {f"{100 * flagged:g} %": score_s + flagged * rewrite_s for flagged in (0, 0.01, 0.1, 1)}
    answers_s["0 %, as streams"] = guarding["streamed_percent"]["median"] / 100 * guarding["generate_s"]["median"]
    rows = []
    for flagged, answer_s in answers_s.items():
        core_s = answer_s * result["threads"]
        rows.append([flagged, f"{answer_s * 1e3:.0f}", f"{core_s * 1e6 / 3600:,.0f}", f"{core_s * 1e9 / 86400:,.0f}"])
    return _grid(["flagged", "ms an answer", "core hours a million answers", "cores for a billion a day"], rows,
                 f"Answers of {guarding['answer_tokens']} tokens, {result['threads']} threads; a flagged one is rewritten once in {rewrite_tokens} tokens, and the rewrite scored. {_machine(result)}{_busy({**result, 'busy': bench_rounds.busy(used)})}")


def _head(result):
    cells = {name: cell for name, cell in result["on_cpu"].items() if name != "targets"}
    rows = [[name, *(f"{cell['us'][way]:.1f}" if way in cell["us"] else "–" for way in ("twin", "harm_score_torch", "harm_score_numpy")),
             f"{cell['eager_over_twin']:.1f}", f"{cell['eager_without_norm_over_twin']:.1f}"] for name, cell in cells.items()]
    head = ["rows x width", "twin, µs", "through torch, µs", "through NumPy, µs", "eager with RMSNorm / twin", "eager without RMSNorm / twin"]
    machine = result["machine"]
    return _grid(head, rows, f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}.{_busy(result)}")


def _report(*chosen, title=""):
    """Tables of the report: all, the chosen ones by number, or those whose titles begin so."""
    def render(result):
        tables = report._TABLES[result["kind"]](result)
        return "\n".join(report.markdown(tables[i]) for i in chosen or range(len(tables)) if tables[i]["title"].startswith(title))

    return render


RENDERERS = {"table": table.markdown, "parity": _parity, "parity#quality": _quality, "selftest": _selftest, "depth": _depth, "depth#worth": _worth,
             "compare": _compare, "ablations": _compare, "refit": _compare, "depths": _compare, "shared": _shared, "joint": _joint,
             "lookup": _lookup, "stream": _stream, "ray": _ray, "head_cpu": _head, "bench#cost": _cost, "bench": bench.markdown, "bench_sweep": bench.sweep_markdown,
             "detectors": _report(0, 1), "detectors#brief": _brief, "detectors#targets": _detector_targets, "detectors#published": _report(title="Published guards"),
             "detectors#kinds": _report(title="Harmful answers flagged"), "detectors#alone": _report(title="Detector without"),
             "detectors#calibration": _report(title="Calibration"),
             "rewrites#targets": _rewrite_targets, "replay": _report(0), "utility": _report(0),
             "replay#models": _report(title="Real models in replay: msts")}


def main(paths):
    for path in map(Path, paths or DOCUMENTS):
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path, svg in figures().items():
        path.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
