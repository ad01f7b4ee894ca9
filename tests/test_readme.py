"""The README's Python blocks and command lines run as they stand, and its tables are those of results/."""
import doctest
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_print_what_the_readme_says():
    text = "\n".join(blocks("python"))
    assert ">>> import protector" in text
    test = doctest.DocTestParser().get_doctest(text, {}, "README", "README.md", 0)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    failures = []
    runner.run(test, out=failures.append)
    assert runner.tries > 5 and runner.failures == 0, "".join(failures)


@pytest.mark.parametrize("block", blocks("console"))
def test_command_lines_print_what_the_readme_says(block):
    lines = block.splitlines()
    commands = [i for i, line in enumerate(lines) if line.startswith("$ ")]
    assert commands
    for number, at in enumerate(commands):
        end = commands[number + 1] if number + 1 < len(commands) else len(lines)
        words = shlex.split(lines[at][2:])
        assert words[0] == "protector", "the README shows this program's commands"
        done = subprocess.run([sys.executable, "-m", "protector", *words[1:]], capture_output=True, text=True, cwd=ROOT,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode in (0, 10), done.stderr
        want = "\n".join(lines[at + 1:end]) + "\n"
        assert doctest.OutputChecker().check_output(want, done.stdout, FLAGS), f"{lines[at]}\nwant: {want}\ngot: {done.stdout}"


def test_tables_are_those_of_the_results():
    from protector.evaluate import blocks

    texts = {str(path.relative_to(ROOT)): path.read_text() for path in blocks.DOCUMENTS}
    assert len(texts) > 4 and blocks.BLOCK.search(README) and [
        name for name, text in texts.items() if blocks.fill(text) != text] == [], "python -m protector.evaluate.blocks"


def test_plots_are_those_of_the_results():
    from protector.evaluate import blocks

    drawn = blocks.figures()
    assert len(drawn) > 4 and [path.name for path, svg in drawn.items() if path.read_text() != svg] == [], "python -m protector.evaluate.blocks"


def test_every_file_that_the_readme_names_is_there():
    files = [name for line in README.splitlines() if line.startswith("| `") for name in re.findall(r"`([^`]+)`", line.split("|")[1])]
    missing = [name for name in files if "/" in name and not (ROOT / name).exists()]
    assert not missing


def test_cost_by_hand():
    from protector.evaluate import blocks

    median = lambda value: {"values": {"guard": {"median": value}}}  # noqa: E731
    result = {"threads": 2, "busy": [], "run": {"cpu": "x", "cores": 2},
              "guarding": {"guard_s": {"median": 0.36}, "answer_tokens": 200, "streamed_percent": {"median": 20.0}, "generate_s": {"median": 2.5}},
              "compared": {"first rewritten token": median(200.0), "rewriting, token by token": median(100.0)}}
    table = blocks._cost(result)
    # a rewrite: 0.2 s + 40 / 100 s + 0.36 s x 40 / 200 = 0.672 s
    assert "| 0 % | 360 | 200 | 8,333 |" in table and "| 100 % | 1032 | 573 | 23,889 |" in table
    assert "| 0 %, as streams | 500 | 278 | 11,574 |" in table


def test_a_stale_table_is_drawn_anew():
    from protector.evaluate import blocks

    empty = "<!-- from results/parity.json -->\n<!-- end -->\n"
    assert blocks.fill(empty + "between\n" + empty).count("| F16 |") == 2 and "between" in blocks.fill(empty + "between\n" + empty)
    stale = "a\n<!-- from results/parity.json -->\n| old |\n<!-- end -->\nb\n"
    fresh = blocks.fill(stale)
    assert fresh != stale and blocks.fill(fresh) == fresh and "| F16 |" in fresh and fresh.startswith("a\n") and fresh.endswith("-->\nb\n")
    with pytest.raises(FileNotFoundError):
        blocks.fill("<!-- from results/nowhere.json -->\n<!-- end -->")
