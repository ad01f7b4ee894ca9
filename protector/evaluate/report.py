"""Results as a person reads them: Markdown tables, SVG plots and one HTML page that needs nothing but itself."""
import re
from functools import partial
from html import escape
from pathlib import Path

from ..bench_rounds import loaded
from . import plots, record
from .judge import OWN, OfflineJudge, accuracy_text, criteria_of

SMALL = 20  # rows; sources below are left out of tables, and the table says so
GRADER = "a language model (not named: graded during development), from a written brief, blind to which were which"
_INTERVALS = "Intervals: rates 95 % Wilson at the effective number of questions, others 95 % bootstrap over questions."
FEW = 5  # harmful answers, below which F1 and recall are a handful of outcomes, and a bootstrap of them says nothing


def share(value, missing=True, digits=1):
    """A rate as text: "12.3 % [9.1, 16.4], n 340"; missing ones are named.

    Example:
        share(metrics.rate([True, False]))  # '50.0 % [9.5, 90.5], n 2'
    """
    if not value or value["rate"] is None:
        return "–" + (f", {value['missing']} missing" if value and value.get("missing") else "")
    rate, low, high = (f"{100 * value[name]:.{digits}f}" for name in ("rate", "low", "high"))
    text = f"{rate} % [{low}, {high}], n {value['n']}"
    return text + (f", {value['missing']} missing" if missing and value.get("missing") else "")


def number(value, digits=3):
    """A number with its interval as text: "0.912 [0.890, 0.934]"; "–" if undefined."""
    if isinstance(value, dict):
        value = {"value": value.get("median"), **value}  # a median's name in older results
    if value is None or isinstance(value, dict) and value["value"] is None:
        return "–"
    if not isinstance(value, dict):
        return f"{value:.{digits}f}"
    text = f"{value['value']:.{digits}f}"
    return text + (f" [{value['low']:.{digits}f}, {value['high']:.{digits}f}]" if value.get("low") is not None else "")


# -- tables: {"title", "head", "rows", "notes"}; every cell is text


def large_parts(parts):
    """The parts of a result that a table shows."""
    return {name: part for name, part in parts.items() if part["n"] >= SMALL}


def _left_out(parts):
    """A note on the parts that a table doesn't show; none if it shows all."""
    small = [name for name in parts if name not in large_parts(parts)]
    return [f"Left out with fewer than {SMALL} answers: {', '.join(small)}; their numbers are in the JSON."] if small else []


def _models_left_out(sources):
    """A note on the models that have no row, of {source: {model: part}}; none if all have one."""
    told = []
    for source, models in sources.items():
        small = [part["n"] for part in models.values() if part["n"] < SMALL]
        told += [f"{len(small)} of {source} ({sum(small)} answers)"] if small else []
    return [f"Models left out with fewer than {SMALL} answers each: {', '.join(told)}; their numbers are in the JSON."] if told else []


def guard_sentence(result, errors=0):
    """Which guard a result is of, in a sentence, and how many answers it failed on."""
    named = result.get("detector")
    if not named:
        return ""
    text = f"Guard: {model_name(named)}, {named['backend']}, {named['quantisation']}; threshold {named['thresholds']['pair']:.3f}{_detoxifier(result)}."
    return text + (f" **It failed on {errors} answers**, which its error policy answered." if errors else "")


def busy_times(result):
    """Why a result's times aren't to be trusted: a note, if other work ran beside them."""
    return [f"**The times are of a busy machine**: {' and '.join(why)}." for why in [loaded(result)] if why]


def model_name(named):
    """A model's file with the beginning of its hash, of detectors.named; "none" for None."""
    return named["model"] + (f" (sha256 {named['sha256'][:12]})" if named.get("sha256") else "") if named else "none"


def _detoxifier(result):
    """", detoxifier NAME" of a guard that acts; "" of a detector alone."""
    if "detoxifier" in result:
        return f", detoxifier {model_name(result['detoxifier'])}"
    return ", detoxifier not recorded" if result.get("on_flag") == "rewrite" else ""  # of an older run


def guard_name(result):
    """Detector and detoxifier of a result, each by its file and the beginning of its hash."""
    return model_name(result["detector"]) + _detoxifier(result)


def _judge(result):
    """Which judge, and how it does on texts like rewrites where that was measured, in sentences."""
    own = result.get("judge_measured", {}).get(OWN)
    return f"Judge: {result['judge']}." + (f" On {OWN}, which read like rewrites: {accuracy_text(own['accuracy'])}, n {own['n']}." if own else "")


def enough(part):
    """Whether a source has harmful and harmless answers enough for AUROC, F1 and recall to rest on."""
    return min(part["harmful"], part["n"] - part["harmful"]) >= FEW


def beaten(result):
    """A sentence that says where word counts alone tell more than the detector; none if nowhere."""
    words = result["bag_of_words"]["sources"]

    def value(found):
        return found["value"] if isinstance(found, dict) else found  # an older result's is plain

    found = [f"{source} ({name} {number(theirs)} against {number(ours)})" for source, part in large_parts(result["sources"]).items()
             for key, name in (("auroc", "AUROC"), ("auprc", "AUPRC"), ("recall_at_5%_fpr", "recall at 5 % FPR")) if enough(part)
             for ours, theirs in [(part[key], words[source].get(key))]
             if None not in (value(ours), value(theirs)) and value(theirs) > value(ours)]
    return [f"**Word counts alone do better** on {'; '.join(found)}."] if found else []


def detector_tables(result):
    large, words = large_parts(result["sources"]), result["bag_of_words"]["sources"]

    def unless_few(part, *values):
        return [number(value) if enough(part) else "–" for value in values]

    rows = [[source, f"{part['n']} ({part['harmful']})",
             *unless_few(part, part["auroc"], words[source]["auroc"], part["auprc"], words[source]["auprc"], part.get("auprc_always_harmful", part["harmful"] / part["n"]),
                         part["f1"], part["f1_always_harmful"], part["recall_at_1%_fpr"], part["recall_at_5%_fpr"], words[source].get("recall_at_5%_fpr")), number(part["ece"])]
            for source, part in large.items()]
    at = [[source, share(part["recall"]), share(part["false_positives"]), *unless_few(part, part["best_f1"], words[source]["f1"])]
          for source, part in large.items()]
    labelled = {}
    for source, part in large.items():
        labelled.setdefault(", ".join(part["labellers"]) or "not recorded", []).append(source)
    few = [source for source, part in large.items() if part["harmful"] and not enough(part)]
    notes = [f"{guard_sentence(result)} Intervals: {result['interval']}.", "Sources call different things harmful; there is no total over them.",
             "Who labelled: " + "; ".join(f"{', '.join(told)}: {who}" for who, told in labelled.items()) + ".",
             "Always “harmful”: the constant answer, whose AUROC is 0.5 and whose AUPRC is the share of harmful answers.",
             *beaten(result),
             *([f"Without AUROC, F1 and recall, of fewer than {FEW} harmful or harmless answers: {', '.join(few)}."] if few else []), *_left_out(result["sources"])]
    edges = [(i / 10, (i + 1) / 10) for i in range(10)]
    bins = [[source, *(next((f"{row['share']:.2f} ({row['n']})" for row in part["reliability"] if round(10 * row["low"]) == i), "–")
                       for i in range(10))] for source, part in large.items()]
    alone = result.get("answer_only")
    without = [{"title": "Detector without the question",
                "head": ["source", "n (harmful)", "AUROC, answer alone", "AUROC, with the question", "harmful flagged", "harmless flagged"],
                "rows": [[source, f"{part['n']} ({part['harmful']})", *unless_few(part, part["auroc"], part["auroc_with_question"]),
                          share(part["recall"]), share(part["false_positives"])] for source, part in large_parts(alone["sources"]).items()],
                "notes": [f"The same answers scored as if nothing were known of their question, at most {alone['at_most']} of a source, and "
                          f"flagged at the answer-only threshold {alone['threshold']:.3f}. AUROC with the question: of these very answers.",
                          *_left_out(alone["sources"])]}] if alone and alone["sources"] else []
    published = result["published"]
    ours, at_best = _beside_published(large, published["columns"])
    return [
        {"title": "Detector", "rows": rows, "notes": notes,
         "head": ["source", "n (harmful)", "AUROC", "AUROC, word counts", "AUPRC", "AUPRC, word counts", "AUPRC, always “harmful”", "F1 at threshold", "F1, always “harmful”",
                  "recall at 1 % FPR", "recall at 5 % FPR", "recall at 5 % FPR, word counts", "ECE"]},
        {"title": "Detector at its threshold", "head": ["source", "harmful flagged", "harmless flagged", "best F1", "best F1, word counts"],
         "rows": at, "notes": ["Best F1: its threshold was chosen on the same answers, an upper bound."]},
        *without, *_by_kind(result.get("kinds", {}), guard_sentence(result)),
        {"title": "Calibration", "head": ["source", *(f"{low:.1f}–{high:.1f}" for low, high in edges)], "rows": bins,
         "notes": ["Share of harmful answers (n) among those scored in each tenth; a calibrated score has 0.05, 0.15, ... 0.95. "
                   "ECE is the mean distance, weighted by n."]},
        {"title": "Published guards", "head": ["model", *published["columns"]],
         "rows": [[name, *(f"{value:.1f}" for value in values)] for name, values in published["rows"].items()] + ours,
         "notes": [f"{published['unit']}. Source: {published['source']}. On SafeRLHF the constant answer beats most guards.",
                   guard_sentence(result), *at_best]}]


def _by_kind(sources, guard):
    """The table of harmful answers by kind of harm, if there is one: kinds in rows, sources in columns."""
    large = {source: found for source, found in sources.items() if sum(rate["n"] for rate in found.values()) >= SMALL}
    n = {kind: sum(found[kind]["n"] for found in large.values() if kind in found) for found in large.values() for kind in found}
    return [{"title": "Harmful answers flagged, by kind of harm", "head": ["kind", *large],
             "rows": [[kind, *(share(found.get(kind)) for found in large.values())] for kind in sorted(n, key=n.get, reverse=True)],
             "notes": [guard, "People labelled the answers harmful; what their harm is about, a language model (not named: graded during development) told "
                       "from question and answer."]}] if n else []


def _beside_published(sources, columns):
    """(rows of this detector beside published guards', their note): its F1 on BeaverTails, where that was measured."""
    for source, part in sources.items():
        if source.lower().startswith("beavertails") and part["f1"]["value"] is not None:
            percent = {name: 100 * part["f1"][name] for name in ("value", "low", "high") if part["f1"][name] is not None}
            cells = [f"{number(percent, 1)}, n {part['n']}" if column == "BeaverTails" else "–" for column in columns]
            return [["this detector, at its threshold", *cells]], [
                f"This detector: on {source}, a part of that test set; {100 * part['best_f1']['value']:.1f} at the best threshold for these "
                "answers, an upper bound."]
    return [], []


def _points(change):
    """A change as text: "-12.3 points [-20.1, -4.0]"."""
    if change["value"] is None:
        return "–"
    return f"{100 * change['value']:+.1f} points [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"


def _attacks(name, parts):
    """{"head", "rows"} of replayed parts; by human labels also what rests on no judge of rewrites."""
    graded = ["after, rewrites by grades", "after, rewrites all harmless – all harmful"] if any("after_graded" in part for part in parts.values()) else []
    return {"head": [name, "before", "after", *graded, "change", "keywords, before", "keywords, after", "actions"],
            "rows": [[key, share(part["before"]), share(part["after"]), *(_by_grades(part) if graded else ()), _points(part["change"]),
                      share(part["keywords_before"]), share(part["keywords_after"]),
                      ", ".join(f"{action} {n}" for action, n in sorted(part["actions"].items()))] for key, part in parts.items()]}


def _grades(grader):
    """Who graded rewrites, and how that agrees with people where both judged, in a sentence; a grader that wasn't measured is only named."""
    measured = (f"; on the {grader['n']} answers with human labels among these texts: accuracy {share(grader['accuracy'])}, AUROC {number(grader['auroc'], 2)}, "
                f"harmful answers missed {share(grader['harmful_missed'])} (these intervals over answers)") if grader and grader["n"] else ""
    return f"Grades: by {GRADER}{measured}."


def _by_grades(part):
    graded, (least, most) = part["after_graded"], part["after_bounds"]
    if graded["missing"]:
        graded = {"rate": None, "missing": graded["missing"]}  # of the graded ones and what wasn't rewritten it would say too little harm: the bounds say more
    return [share(graded), f"{100 * least['rate']:.1f} – {100 * most['rate']:.1f} % [{100 * least['low']:.1f}, {100 * most['high']:.1f}]"]


def replay_tables(result):
    tables, graded = [], any("after_graded" in part["human"] for part in result["sources"].values())
    notes = [f"{_grades(result.get('grader'))} A rewrite without one is missing. All harmless – all harmful: with the outer ends of both intervals."] if graded else []
    guard = guard_sentence(result, sum(part["human"]["errors"] for part in result["sources"].values()))
    keywords = f"Keywords misjudge: {result['keywords_note']}."
    human = large_parts({source: part["human"] for source, part in result["sources"].items()})
    by_judge = large_parts({source: part["judge"] for source, part in result["sources"].items()})
    for who, parts, told in (("human labels", human, [f"Labels: {result['human_note']}.", *notes]),
                             ("the judge", by_judge, ["Labels: the judge alone, before and after."])):
        tables.append({"title": f"Attack success in replay, by {who}", **_attacks("source", parts),
                       "notes": [guard, *told, _judge(result), keywords, f"Intervals: {result['interval']}.",
                                 *_left_out({source: part["human"] for source, part in result["sources"].items()})]})
    without_table = {}
    for source, models in result["models"].items():
        parts = {name: part["human"] for name, part in models.items()}
        if large_parts(parts):
            tables.append({"title": f"Real models in replay: {source}", **_attacks("model", large_parts(parts)),
                           "notes": [guard_sentence(result), f"Labels: {result['human_note']}. {_judge(result)}", *notes, keywords, f"Intervals: {result['interval']}.",
                                     *_models_left_out({source: parts})]})
        else:
            without_table[source] = parts
    tables[0]["notes"] += _models_left_out(without_table)
    return tables


def rewrite_tables(result):
    relevance, judged, perplexity = result["relevance"], result.get("relevance_judged"), result.get("perplexity")
    runs = result["copied_runs"]
    long_run = next(key for key in runs if key.startswith("at_least"))
    rows = [["rewritten, of flagged harmful answers", share(result["rewritten"])],
            ["below the threshold at the first try", share(result["below_threshold_at_first_try"])],
            ["accepted at the first try", share(result["accepted_at_first_try"])],
            ["refused by the guard", share(result["refused_by_guard"])],
            ["judged harmless, of rewrites", share(result["judged_harmless"])],
            ["with a refusal phrase", share(result["refusals"])]]
    notes = [*filter(None, [guard_sentence(result)]), f"Judge: {result['judge']}.", _INTERVALS]
    on_own = result.get("judge_on_own")
    if on_own:
        rows.insert(5, ["the same judge: harmless answers of this project's own judged harmful", share(on_own["harmless_called_harmful"])])
        rows.insert(6, ["the same judge: harmful answers of this project's own judged harmless", share(on_own["harmful_missed"])])
        notes.append("This project's own: short answers to alarming questions, written for it, which the judge never saw.")
    graded = result.get("graded")
    if graded and graded["harmless"]["n"]:
        rows += [["harmless by a language model's grades", share(graded["harmless"])], ["about its question, by the same", share(graded["about"])],
                 ["nothing but a refusal, by the same", share(graded["refuses"])]]
        notes.append(f"{_grades(graded['grader'])} Texts that weren't graded are missing.")
    if judged:
        rows += [["about its question, by the judge of relevance", share(judged["about_own_question"])],
                 ["about another question, by the same judge", share(judged["about_another_question"])]]
        notes.append(f"Judge of relevance: {judged['judge']}.")
    if relevance:
        rows.append(["on topic by cosine", share(relevance["on_topic"]) + f"; mean cosine {number(relevance['own'], 2)} to its own question, "
                                           f"{number(relevance['shuffled'], 2)} to others"])
        notes.append("On topic: its cosine with its question is above 95 % of all rewrites' cosines with other questions.")
    rows += [[f"copied runs of {long_run.split('_')[2]} words or more", share(runs[long_run]) + f"; longest {runs['longest_words']} words"],
             ["words, median", f"{number(result['words'], 0)}, n {result['judged_harmless']['n'] + result['judged_harmless']['missing']}"]]
    notes.append("Copied runs take “don't” for two words; the guard, which accepts no run of twelve, for one.")
    if perplexity:
        own, recorded = (perplexity[name] for name in ("rewrites", "recorded_harmless_answers"))
        rows.append(["perplexity, median", f"{number(own, 1)}, n {own['n']}; recorded harmless answers {number(recorded, 1)}, "
                                           f"n {recorded['n']}"])
        notes.append(f"Perplexity under {perplexity['model']}: the shipped detoxifier's base, to which greedy text of the "
                     "same base looks fluent.")
    tables = [{"title": "Detoxifier", "head": ["", "share"], "rows": rows, "notes": notes}]
    if judged:
        measured = judged["judge_measured"]
        accuracies = {source: part["accuracy"] for source, part in measured.items()}
        tables.append({"title": "The judge of relevance, judged", "head": ["source", "accuracy", "matching passed", "shuffled passed"],
                       "rows": [[source, *(share(measured[source][name]) for name in ("accuracy", "matching_passed", "shuffled_passed"))]
                                for source in large_parts(accuracies)],
                       "notes": ["Recorded answers with their own question, and with another of their source. Rewrites have no labels: "
                                 "how often they pass for another question stands above.",
                                 "Intervals: 95 % Wilson, of the accuracy at the effective number of questions.", *_left_out(accuracies)]})
    return tables


def utility_tables(result):
    head = ["flagged", "changed", "changed without a flag", "ms, median (95th percentile)", "added time"]

    def row(name, part):
        added = part.get("added_percent")
        return [name, share(part["flagged"]), share(part["changed"]), f"{part['changed_without_flag']} of {part['n']}",
                f"{part['ms']['median']:.0f} ({part['ms']['p95']:.0f})", f"{number(added, 0)} %" if added else "–"]

    notes = [guard_sentence(result, sum(part["errors"]["k"] for part in result["sources"].values()))]
    notes += [f"Added time against {result['time_against']}."] if result["time_against"] else []
    notes.append(f"Changed must equal flagged: nothing else is ever touched. {_INTERVALS}")
    notes += busy_times(result)
    return [{"title": f"Utility on harmless answers, by {name}", "head": [name, *head],
             "rows": [row(key, part) for key, part in large_parts(result[f"{name}s"]).items()], "notes": [*notes, *_left_out(result[f"{name}s"])]}
            for name in ("source", "model") if result[f"{name}s"]]


def exact_tables(result):
    rows = [["accuracy before", share(result["accuracy_before"])], ["accuracy after", share(result["accuracy_after"])],
            ["change", _points(result.get("change", {"value": None}))], ["flagged", share(result["flagged"])], ["changed", share(result["changed"])],
            ["changed without a flag", f"{result['changed_without_flag']} of {result['n']}"]]
    return [{"title": f"Exact match: {result['benchmark']}", "head": ["", "share of answers"], "rows": rows,
             "notes": [guard_sentence(result, result["errors"]["k"]), f"{result['without_answer']} questions have no recorded answer.",
                       "Intervals: rates 95 % Wilson, change 95 % Bonett-Price, over questions."]}]


_POLICY = {"MM-SafetyBench": ("08, 10-13", "legal, financial, health, campaign and government"),
           "FigStep": ("Legal Opinion, Financial Advice, Health Consultation", "legal, financial and health")}  # which, about what
_UNJUDGED = " They are open here: the protocol asks whether an answer declines or says that it isn't qualified. This judge knows harm alone (see --judge-url)."


def _knows_harm_alone(result):
    return result["judge"].startswith(OfflineJudge.name)


def benchmark_tables(result):
    names = {"harm": "harm (01-07, 09)" if result["benchmark"].startswith("MM") else "harm", "policy": "policy scenarios"}

    def cells(cell, policy):
        judged = ["–"] * 3 if policy and _knows_harm_alone(result) else [share(cell["before"]), share(cell["after"]), _points(cell["change"])]
        return [*judged, share(cell["keywords_before"], False), share(cell["keywords_after"], False), str(cell["no_answer"]), str(cell["rendered"])]

    rows = [[names[group], kind, *cells(cell, group == "policy")] for group in names for kind, cell in result[group].items()]
    each = [[name, kind, *cells(cell, criteria_of(name) != "general")] for name, kinds in result["scenarios"].items() for kind, cell in kinds.items()]
    keywords = f"Keywords misjudge: {result['keywords_note']}."
    guard = guard_sentence(result, result.get("errors", 0))
    head = ["kind", "before", "after", "change", "keywords, before", "keywords, after", "no answer", "rendered here"]
    notes = [guard, f"Model: {result['model']}. {_judge(result)} Intervals: {result['interval']}.", keywords]
    if result["benchmark"] in _POLICY:
        which, about = _POLICY[result["benchmark"]]
        notes.append(f"Policy scenarios ({which}) forbid plain {about} advice: a harm detector has no reason to flag it."
                     + (_UNJUDGED if _knows_harm_alone(result) else ""))
    if result.get("added_percent") is not None:
        notes.append(f"Guarding, with the rewriting of what was flagged, took {number(result['added_percent'], 0)} % of the time that the model took to answer, n {result['n_timed']}."
                     + (f" {result['time_note']}." if result.get("time_note") else "")
                     + (" What else ran meanwhile wasn't recorded." if result.get("others_share") is None else ""))
        notes += busy_times(result)
    if result["missing"]:
        more = len(result["missing"]) - 6
        notes.append("Missing: " + "; ".join(line.partition(" (")[0] for line in result["missing"][:6]) + (f"; and {more} more" if more > 0 else "") + ".")
    return [{"title": f"Attack success: {result['benchmark']}", "head": ["scenarios", *head], "rows": rows, "notes": notes},
            {"title": f"{result['benchmark']} by scenario", "head": ["scenario", *head], "rows": each,
             "notes": [guard, f"{_judge(result)} Intervals: {result['interval']}.", keywords]}]


def _conditions(result):
    """Conditions as they are drawn: behind one that lacks questions of text only stands text only on those that it has."""
    parts = {}
    for name, part in result["conditions"].items():
        parts[name] = part
        if "text_only" in part:
            parts[f"text only, questions of {name}"] = part["text_only"]
    return parts


def likelihood_tables(result):
    rows = [[name, str(part["n"]), str(result["left_out"].get(name, "–")), number(part.get("harmful"), 2), number(part.get("harmless"), 2), number(part.get("gap"), 2),
             number(part.get("gap_change"), 2)] for name, part in _conditions(result).items()]
    notes = [f"Model: {result['model']}. {result['unit']}; gap = harmless - harmful, larger is worse. Intervals: {result['interval']}.",
             f"Related image: the nearest of {result['related_images']} to the question, where one is near enough."
             if result.get("related_images") else "Related image: none was given; pass --related.",
             "Left out: questions whose image is absent or can't be read. A condition that lacks some stands beside text only on those that it has."]
    return [{"title": "Likelihood of harmful and harmless answers",
             "head": ["condition", "n", "left out", "harmful", "harmless", "gap", "gap against text only"], "rows": rows, "notes": notes}]


def judge_tables(result):
    rows = [[source, f"{part['n']} ({part['harmful']})", share(part["accuracy"]), number(part["balanced_accuracy"]), number(part["auroc"]),
             share(part["harmful_missed"]), share(part["harmless_called_harmful"])]
            for source, part in large_parts(result["measured"]).items()]
    return [{"title": "The judge, judged", "rows": rows,
             "notes": [f"{result['judge']}. Measured on questions that it never saw. {_INTERVALS}",
                       *_left_out(result["measured"])],
             "head": ["source", "n (harmful)", "accuracy", "balanced", "AUROC", "harmful missed", "harmless called harmful"]}]


_TABLES = {"replay": replay_tables, "benchmark": benchmark_tables, "rewrites": rewrite_tables, "utility": utility_tables,
           "exact": exact_tables, "detectors": detector_tables, "likelihood": likelihood_tables, "judge": judge_tables}  # in this order


def tables_of(results):
    """[(name, result, its tables)] in the report's order; if they are of several guards, each first table says which is whose."""
    known = [(name, result) for name, result in results.items() if result["kind"] in _TABLES]
    known.sort(key=lambda item: (list(_TABLES).index(item[1]["kind"]), item[0]))
    parts = [(name, result, _TABLES[result["kind"]](result)) for name, result in known]
    guards = {name: guard_name(result) for name, result, _ in parts if result.get("detector")}
    # A detector alone says nothing of a detoxifier, nor does an older run.
    several = any(len({model_name(result[kind]) for _, result, _ in parts if kind in result}) > 1 for kind in ("detector", "detoxifier"))
    for name, _, tables in parts if several else ():
        if name in guards and tables:
            tables[0]["notes"].append(f"**Not one guard's results**: {'; '.join(f'{of}: {guard}' for of, guard in guards.items())}.")
    return parts


def markdown(table):
    """One table in Markdown, its notes below."""
    def cells(row):
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    lines = [f"### {table['title']}", "", cells(table["head"]), "|" + "---|" * len(table["head"]), *map(cells, table["rows"]), ""]
    return "\n".join(lines + table["notes"]) + "\n"


def figures_of(name, result):
    """{file stem: (caption, SVG)}; the caption is the plot's title, too, and goes with it where it stands alone."""
    kind, figures = result["kind"], {}  # {file stem: (caption, function of a title)}
    if kind == "detectors":
        drawn = {source: part for source, part in list(result["sources"].items())[:6] if part["n"] >= 100}
        curves = {f"{source} ({part['auroc']['value']:.2f})": part["roc"] for source, part in drawn.items() if part["roc"]}
        if curves:
            figures[f"{name}-roc"] = ("ROC per source, AUROC in brackets; dotted: chance", partial(plots.roc, curves))
        for source, part in drawn.items():
            figures[f"{name}-scores-{_slug(source)}"] = (f"Scores: {source}", partial(
                plots.histogram, part["histogram"]["edges"], part["histogram"]["harmless"], part["histogram"]["harmful"], part["f1"].get("threshold")))
            figures[f"{name}-calibration-{_slug(source)}"] = (f"Calibration: {source}, ECE {number(part['ece'])}",
                                                              partial(plots.reliability, part["reliability"]))
    elif kind == "replay":
        human = large_parts({source: part["human"] for source, part in result["sources"].items()})
        rows = [(source, part["before"], part["after"]) for source, part in human.items()]
        if rows:
            figures[f"{name}-attacks"] = (f"Harmful answers shown, before and after, by human labels; rewrites by {result['judge']}", partial(plots.before_after, rows))
        for source, models in result["models"].items():
            human = large_parts({model: part["human"] for model, part in models.items()})
            rows = [(model, part["before"], part["after"]) for model, part in human.items()]
            if rows:
                figures[f"{name}-models-{_slug(source)}"] = (f"Real models, {source}; rewrites by {result['judge']}", partial(plots.before_after, rows))
    elif kind == "benchmark":
        rows = [(f"{group}, {image}", cell["before"], cell["after"])
                for group in ("harm", *(() if _knows_harm_alone(result) else ("policy",))) for image, cell in result[group].items()]
        figures[f"{name}-attacks"] = (f"{result['benchmark']}, {result['model']}: attacks that worked, by {result['judge']}", partial(plots.before_after, rows))
    elif kind == "likelihood":
        figures[f"{name}-curves"] = (f"Mean loss along the answer: {result['model']}", partial(plots.curves, _conditions(result)))
    guard = f". Guard: {guard_name(result)}" if result.get("detector") else ""
    return {stem: (caption + guard, draw(title=caption + guard)) for stem, (caption, draw) in figures.items()}


def alone(svg):
    """A plot as a file of its own, without the page that names its colours."""
    return re.sub(r"var\(--\w+, (#\w+)\)", r"\1", svg)


def _slug(text):
    return "".join(char if char.isalnum() else "-" for char in text.lower())


_STYLE = """
:root{--ink:#1d2127;--soft:#5b6470;--paper:#fbfaf7;--card:#fff;--rule:#e3e0d8;
 --red:#c0392b;--blue:#2166ac;--grey:#8a8f98;--green:#2e7d4f;--violet:#7b4fa3;--orange:#c77700;--teal:#16808a}
@media (prefers-color-scheme:dark){:root{--ink:#e8e6e1;--soft:#a3abb5;--paper:#15171a;--card:#1d2024;--rule:#33383e;
 --red:#ef7464;--blue:#73b3ee;--grey:#858c95;--green:#6fc492;--violet:#bb95dd;--orange:#eda94a;--teal:#5cc4cd}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:clamp(16px,4vw,48px)}
h1{font-size:clamp(1.7rem,5vw,2.6rem);line-height:1.15;margin:0 0 .3em;letter-spacing:-.02em}
h2{font-size:1.25rem;margin:2.6em 0 .6em}
.lead{color:var(--soft);max-width:68ch;margin:0 0 1.6em}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:14px;margin:1.6em 0}
.tile,figure,.table{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.tile{padding:16px 18px}
.tile b{display:block;font-size:1.75rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.86rem}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.92rem;border-block:1px solid var(--rule);padding:.7em 0}
a{color:var(--blue)}
.table{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:7px 12px;border-bottom:1px solid var(--rule);vertical-align:top}
td{white-space:nowrap}td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:9em}
th{color:var(--soft);font-weight:600}
tbody tr:last-child td{border-bottom:0}
.notes{color:var(--soft);font-size:.84rem;margin:.6em 0 0;max-width:90ch;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:16px;margin:1.2em 0}
figure{margin:0;padding:14px}figure svg{width:100%;height:auto;max-height:520px;display:block}
figcaption{color:var(--soft);font-size:.84rem;margin-top:.5em}
footer{margin-top:3em;color:var(--soft);font-size:.82rem;border-top:1px solid var(--rule);padding-top:1em;overflow-wrap:anywhere}
"""


def _before_after(before, after, what, who):
    """A tile, or none if either rate is undefined."""
    if before["rate"] is None or after["rate"] is None:
        return []
    ends = [f"[{100 * part['low']:.0f}, {100 * part['high']:.0f}]" for part in (before, after)]
    missing = f", {after['missing']} missing" if after["missing"] else ""
    return [(f"{before['rate']:.0%} → {after['rate']:.0%}", f"{what}; {who}, n {before['n']}{missing}, {ends[0]} → {ends[1]}")]


def _judged(result, of_rewrites=False):
    """The judge with its accuracy, for a tile; of rewrites also with that on texts like these."""
    measured = result["judge_measured"]
    found = [accuracy_text(measured[name]["accuracy"]) + where for name, where in (("all", ""), (OWN, " on texts like rewrites"))[:1 + of_rewrites] if name in measured]
    return "the judge" + (f" ({'; '.join(found)})" if found else "")


def _ends(found, digits):
    """A number's lowest and highest source: (their values, the two sources with interval and n); there is no total over sources.

    Example:
        _ends({"a": {"value": 0.8, "low": 0.7, "high": 0.9, "n": 50}}, 2)  # ("0.80", "a 0.80 [0.70, 0.90], n 50")
    """
    ranked = sorted(found.items(), key=lambda item: item[1]["value"])
    ends = dict([ranked[0], ranked[-1]])
    return (" – ".join(f"{part['value']:.{digits}f}" for part in ends.values()),
            "; ".join(f"{source} {number(part, digits)}, n {part['n']}" for source, part in ends.items()))


def _counted(found, least):
    return f"{len(found)} source{'s' * (len(found) > 1)} of {least} answers or more"


def _tiles(results):
    """The few numbers that a reader came for, in the report's order: [(number, what it is, who says so, n and interval)]."""
    tiles = []
    for _, result, _ in tables_of(results):
        kind = result["kind"]
        if kind == "benchmark":
            for image, cell in result["harm"].items():
                tiles += _before_after(cell["before"], cell["after"], f"attacks that work, {result['benchmark']}, {image}",
                                       f"by {_judged(result)}")
        elif kind == "replay" and result["sources"]:
            source, part = max(result["sources"].items(), key=lambda item: item[1]["human"]["before"]["k"])
            tiles += _before_after(part["human"]["before"], part["human"]["after"], f"harmful answers shown, {source}",
                                   f"human labels, rewrites by {_judged(result, of_rewrites=True)}")
        elif kind == "utility":
            changed = {source: {"value": 100 * rate["rate"], "low": 100 * rate["low"], "high": 100 * rate["high"], "n": rate["n"]}
                       for source, part in large_parts(result["sources"]).items() for rate in [part["changed"]]}
            if changed:
                value, ends = _ends(changed, 1)
                tiles.append((f"{value} %", f"of harmless answers changed, {_counted(changed, SMALL)}: {ends}"))
        elif kind == "rewrites" and result["judged_harmless"]["rate"] is not None:
            part = result["judged_harmless"]
            tiles.append((f"{part['rate']:.0%}", f"of {part['n']} rewrites harmless by {_judged(result, of_rewrites=True)}, "
                                                 f"[{100 * part['low']:.0f}, {100 * part['high']:.0f}]"))
        elif kind == "detectors":
            scored = {source: {**part["auroc"], "n": part["n"]} for source, part in result["sources"].items()
                      if enough(part) and part["n"] >= 100}
            if scored:
                value, ends = _ends(scored, 2)
                tiles.append((value, f"AUROC of the detector, {_counted(scored, 100)}: {ends}"))
    return tiles[:8]


def html(results):
    """The whole page as text; no script, no font and no address from elsewhere."""
    parts = tables_of(results)
    titles, body = [], []
    for name, result, tables in parts:
        figures = figures_of(name, result)
        for i, table in enumerate(tables):
            anchor = f"{_slug(name)}-{i}"
            titles.append((anchor, table["title"]))
            head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in table["head"])
            rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table["rows"])
            body.append(f'<h2 id="{anchor}">{escape(table["title"])}</h2>')
            if i == 0 and figures:
                body.append("<div class=figures>" + "".join(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
                                                            for caption, svg in figures.values()) + "</div>")
            body.append(f'<div class=table tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
                        f'<p class=notes>{escape(" ".join(table["notes"]))}</p>')
    tiles = "".join(f"<div class=tile><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in _tiles(results))
    nav = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in titles)
    runs = [result["run"] for result in results.values() if result.get("run")]  # of several commits or machines, maybe: all are named
    foot = " · ".join(dict.fromkeys(filter(None, (said for run in runs for said in (
        run.get("cpu"), f"{run['cores']} cores" if run.get("cores") else "", f"commit {run['commit'][:12]}{run['commit'][40:]}" if run.get("commit") else "",
        ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()))))))
    return ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width,initial-scale=1\">"
            f"<title>MLLM-Protector: evaluation</title><style>{_STYLE}</style><main><h1>What the guard changes</h1>"
            "<p class=lead>Answers of multimodal models before and after MLLM-Protector: attacks that still work, what harmless answers "
            "pay, and how good detector, detoxifier and judge are. Every rate stands with its n and its interval; calibration tables have n alone, their plots the intervals.</p>"
            f"<div class=tiles>{tiles}</div><nav>{nav}</nav>{''.join(body)}<footer>{escape(foot)}</footer></main></html>\n")


def write(results, folder):
    """Write index.html, tables.md, the plots and the results that all of it is drawn from, as NAME.json.

    Args:
        results: {name: result}, as record.read_all gives them.
        folder: made if needed.
    Returns:
        path of index.html.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = record.plain(results)
    drawn = tables_of(results)
    text = "\n".join(markdown(table) for _, _, tables in drawn for table in tables)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    for name, result, _ in drawn:
        record.save(folder, name, result)
        for stem, (_, svg) in figures_of(name, result).items():
            # Alone in a file it has no page around it: each colour becomes its fallback.
            (folder / f"{stem}.svg").write_text(alone(svg), encoding="utf-8")
    path = folder / "index.html"
    path.write_text(html(results), encoding="utf-8")
    return path
