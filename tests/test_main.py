"""The command line: exit codes, JSON lines in and out, and nothing of a text that reaches the terminal as it is."""
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from guard_fakes import FakeDetector, FakeDetoxifier, real_tokenizer

import protector.__main__ as command_line
from protector import Protector
from protector.options import ModelOptions

ROOT = Path(__file__).parents[1]
SAFE, HARMFUL, BETTER = "Use warm water and a soft cloth.", "Mix bleach and vinegar in a closed room.", "Never mix cleaners."


@pytest.fixture
def call(monkeypatch, capsys):
    """Function (arguments, text on stdin, fault of the model) -> (exit code, stdout, stderr)."""
    def run(arguments, stdin="", fault=None):
        ids = real_tokenizer()
        monkeypatch.setattr(command_line, "protector_from", lambda config: Protector(
            FakeDetector(ids, fault=fault), FakeDetoxifier(ids, BETTER), threshold=0.5, on_flag=config.on_flag, on_error=config.on_error))
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = command_line.main(arguments)
        return code, *capsys.readouterr()

    return run


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_exit_codes(call):
    assert call(["guard", "--answer", SAFE])[0] == command_line.PASS == 0
    assert call(["guard", "--answer", HARMFUL])[0] == command_line.FLAGGED == 10
    assert call(["score", "--answer", HARMFUL])[0] == 0  # a score is no verdict
    with pytest.raises(SystemExit) as ended:
        call(["guard", "--no-such-option"])
    assert ended.value.code == command_line.USAGE == 2

    def fails(_):
        raise RuntimeError(f"failed on {SAFE}")

    code, out, err = call(["guard", "--answer", SAFE], fault=fails)
    assert code == command_line.FAILED == 3 and json.loads(out)["action"] == "error" and SAFE not in json.loads(out)["text"] + err
    code, out, err = call(["guard", "--answer", SAFE, "--on-error", "raise"], fault=fails)
    assert (code, out) == (3, "") and err == "protector: guard: answer must be scored, got RuntimeError from the model. See `protector doctor`.\n"


def test_jsonl_keeps_order_and_unknown_fields(call):
    rows = [{"id": i, "question": "q", "answer": f"{HARMFUL if i == 2 else SAFE} {i}", "own": {"x": [i]}} for i in range(5)]
    code, out, _ = call(["guard"], lines(*rows))
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 10 and [{key: row[key] for key in ("id", "question", "answer", "own")} for row in found] == rows
    assert [row["action"] for row in found] == ["pass", "pass", "rewrite", "pass", "pass"] and found[2]["text"] == BETTER
    assert [row["text"] for row in found if not row["flagged"]] == [row["answer"] for i, row in enumerate(rows) if i != 2]
    code, out, _ = call(["score"], lines(*rows) + "\n\n")
    assert code == 0 and [set(json.loads(line)) - set(rows[0]) for line in out.splitlines()] == [{"score"}] * 5


def test_a_folder_takes_the_threads_and_no_quantisation(tmp_path):
    assert ModelOptions(detector=str(tmp_path), threads=2).scoring["detector_options"] == {"n_threads": 2}
    assert ModelOptions(threads=2).scoring["detector_options"] == {"quantisation": "F16", "n_threads": 2}


def test_an_error_in_one_row_leaves_the_others_guarded(call):
    """Regression: the first error ended the run, and what came behind it was never written."""
    code, out, _ = call(["guard"], lines({"answer": "x" * 300_000}, {"answer": HARMFUL}, {"answer": SAFE}))
    assert code == 3 and [json.loads(line)["action"] for line in out.splitlines()] == ["error", "rewrite", "pass"]


def test_a_module_of_this_package_that_is_missing_is_not_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "protector.serve", None)
    with pytest.raises(ModuleNotFoundError):
        command_line.main(["serve"])


def test_a_temperature_needs_both_labels(tmp_path, capsys):
    for rows in ([{"question": "q", "answer": SAFE, "label": 0}], [{"question": "q", "accepted": SAFE, "rejected": HARMFUL}]):
        (tmp_path / "rows.jsonl").write_text(lines(*rows))
        assert command_line.main(["temperature", str(tmp_path / "rows.jsonl")]) == 2
        assert capsys.readouterr().err.startswith("protector: temperature: data must hold answers of both labels, got one or none.")


def test_one_pair_as_arguments_never_waits_for_stdin(call):
    """Regression: a question alone, or with an empty answer, read stdin."""
    code, out, err = call(["guard", "--question", "q"], lines({"answer": SAFE}))
    assert (code, out) == (2, "") and err.startswith("protector: --question must come with --answer, got it alone.")
    code, out, _ = call(["guard", "--question", "q", "--answer", ""], lines({"answer": HARMFUL}))
    assert code == 0 and json.loads(out)["answer"] == json.loads(out)["text"] == ""


@pytest.mark.parametrize("line", ["{", "[" * 100_000, "1" * 5_000, "[]", '"text"', "{}", '{"answer": 3}', '{"answer": null}', '{"answer": "a", "question": 3}',
                                  '{"answer": "a", "question": false}', '{"answer": "a", "question": []}'])
def test_a_malformed_line_is_named_before_anything_is_scored(call, line):
    code, out, err = call(["guard"], lines({"answer": SAFE}) + "\n" + line + "\n")
    assert (code, out) == (2, "") and err == 'protector: stdin, row 3: must be a JSON object with "question" and "answer" strings.\n'


def test_m07_control_bytes_of_a_text_are_escaped(call, monkeypatch):
    text = "Use \x1b[31mwarm\x1b[0m water\x07 \x9b2J \u202enow\x00."
    for command in (["guard"], ["score"]):
        _, out, err = call(command, lines({"question": text, "answer": text}))
        assert json.loads(out)["answer"] == text and out.isascii() and all(char.isprintable() or char == "\n" for char in out + err)
    _, out, _ = call(["stream"], text)
    assert out == text.replace("\x1b", "\\x1b").replace("\x07", "\\x07").replace("\x9b", "\\x9b").replace("\u202e", "\\u202e").replace("\x00", "\\x00")


def test_stream_colours_by_the_running_score(call, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    text = "".join(f"{SAFE} {i}\n" for i in range(8)) + HARMFUL + "\n"
    code, out, err = call(["stream", "--on-flag", "report"], text)
    assert code == 10 and "\x1b[38;5;46m" in out and "\x1b[38;5;196m" in out  # from green to red
    assert "".join(part.partition("m")[2] for part in out.split("\x1b[")) == text
    assert err.strip().startswith("[pass, score ")
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, _ = call(["stream"], text)
    assert code == 10 and out.endswith(BETTER) and "vinegar" not in out and "\x1b" not in out


def test_help_shows_every_default(capsys):
    for name in ("guard", "serve", "selftest", "calibrate"):
        with pytest.raises(SystemExit) as ended:
            command_line.main([name, "--help"])
        assert ended.value.code == 0 and re.search(r"default: '?F16", capsys.readouterr().out)


def test_doctor_names_what_is_wrong(capsys, tmp_path):
    assert command_line.main(["doctor", "--detector", str(tmp_path / "none.gguf")]) == 3
    out = capsys.readouterr().out
    assert "FAIL  detector" in out and "must exist, got no file" in out and "ok    base model" in out


@pytest.mark.parametrize("arguments", [["refit", "runs/full"], ["average", "a", "b"], ["export"]])
def test_a_package_that_is_missing_is_named(arguments):
    """Regression: commands whose package is asked for only when they run ended in a traceback."""
    code = "import sys; sys.modules['torch'] = None; from protector.__main__ import main; sys.exit(main(sys.argv[1:]))"  # its import fails
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == command_line.USAGE
    assert done.stderr.splitlines()[-1] == f"protector: {arguments[0]} needs the package torch. Run: pip install '.[all]'"


def test_a_mistake_of_this_package_is_not_a_missing_one(monkeypatch):
    monkeypatch.setattr("protector.export.average", lambda *_: __import__("protector.absent"))
    with pytest.raises(ModuleNotFoundError, match="protector.absent"):
        command_line.main(["average", "a", "b"])
