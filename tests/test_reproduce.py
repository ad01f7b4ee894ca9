"""reproduce.sh with a Python that says what it is asked for instead of doing it."""
import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(tmp_path):
    """A function of (stages, variables): the finished script, whose output has a line for each command."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    wanted = subprocess.run("cat setup.py reproduce.sh csrc/* | cksum", shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (tmp_path / "venv/.installed").write_text(wanted)
    plain = {name: value for name, value in os.environ.items() if name not in ("DATA", "RUNS", "RESULTS", "MOST", "QUESTIONS")}

    def run(*stages, **variables):
        return subprocess.run(["bash", "reproduce.sh", *stages], cwd=ROOT, capture_output=True, text=True, env={**plain, "VENV": str(tmp_path / "venv"), **variables})

    return run


def test_small_samples_write_the_table_alone_where_the_readme_looks(script, tmp_path):
    runs, out = str(tmp_path / "runs"), str(tmp_path / "out")
    table, everything = script("evaluate", RUNS=runs, RESULTS=out).stdout.splitlines()
    assert f"table --runs {runs} --data {runs}/data --results {out}" in table
    assert f"--most 60 --questions 2 --out {runs}/results --report {runs}/report" in everything
    table, everything = script("evaluate", RUNS=runs, RESULTS=out, DATA="full").stdout.splitlines()
    assert f"--results {out}" in table and f"--data full --most 0 --questions 0 --out {out} --report" in everything


def test_with_data_benches_measure_quality_beside_speed(script, tmp_path):
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "sleep").chmod(0o755)
    quick = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RESULTS": "out"}
    assert "protector.evaluate" not in script("bench", **quick).stdout
    measure = "--measure full/dev_pairs.jsonl.gz --out out --sources beavertails_test_NC pyrit"
    assert script("bench", DATA="full", **quick).stdout.splitlines()[-3:] == [
        f"-m protector.evaluate.shared --train full/train_pairs.jsonl.gz {measure} openai_rbr diasafety --most 60",
        f"-m protector.evaluate.lookup {measure} --most 20",
        f"-m protector.evaluate.depth --train full/train_pairs.jsonl.gz {measure} openai_rbr diasafety msts_english_multimodal"]


def test_models_of_other_data_are_no_column_of_the_table(script, tmp_path):
    assert "--runs runs/reproduce --data runs/reproduce/data " in script("evaluate").stdout
    assert "--runs runs/reproduce-data --data full " in script("evaluate", DATA="full").stdout
    for kind in ("detector", "detoxifier"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "run.json").write_text(json.dumps({"config": {"data": [f"{tmp_path}/data/train.jsonl", "own"]}}))
    assert script("evaluate", RUNS=str(tmp_path)).returncode == 0
    (tmp_path / "train_pairs.jsonl.gz").touch()
    for stage in ("train", "evaluate"):
        refused = script(stage, RUNS=str(tmp_path), DATA=str(tmp_path))
        assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.endswith(
            f"reproduce.sh: {tmp_path}/detector/run.json must name {tmp_path}/train_pairs.jsonl.gz, got other data. Set RUNS to another folder.\n")


def test_too_short_a_training_says_what_to_do(script, tmp_path):
    """Regression: on a busy machine the detector took three steps in its minutes, and every later run ended at its export, too."""
    (tmp_path / "venv/bin/python").write_text('#!/bin/sh\necho "$@"\ncase "$*" in *export*) exit 2; esac\n')
    failed = script("export", RUNS=str(tmp_path / "runs"), MINUTES_DETECTOR="7")
    assert failed.returncode == 1 and failed.stderr.endswith(
        f"7 minutes were too few on this machine, slow or busy. Run: rm -r {tmp_path}/runs/detector; MINUTES_DETECTOR=21 bash reproduce.sh\n")
