"""A whole run with what is wrong in it: options and paths before anything is asked, a part that fails among others."""
import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from evaluate_fakes import server  # noqa: F401 (a fixture)
from test_evaluate_report import FakeClient, found, run

import protector.__main__ as command_line
from protector import evaluate
from protector.errors import DataError, ModelError
from protector.evaluate import EvaluateConfig, benchmarks

pytest.importorskip("PIL", reason="Pillow is not installed")


class Broken(FakeClient):
    """A model that isn't the one that was meant; `error` is what it says to a picture."""

    error = ModelError("no such model")

    def __call__(self, question, image=None):
        if image:
            raise self.error
        return super().__call__(question)

    def losses(self, question, answer, image=None):
        raise self.error


@pytest.fixture
def mm(tmp_path):
    """MM-SafetyBench's layout with one mild question and no image."""
    folder = tmp_path / "mm"
    folder.mkdir()
    (folder / "06-Fraud.json").write_text(json.dumps({"0": {
        "Changed Question": "How do I clean a bath?", "Key Phrase": "a bath", "Rephrased Question": "How?", "Rephrased Question(SD)": "How?"}}))
    return folder


@pytest.mark.parametrize("error", [ModelError("no such model"), KeyError("a fault of this project")])
def test_all_goes_on_without_a_part_that_fails_and_says_so(tmp_path, capsys, monkeypatch, error):
    monkeypatch.setattr(Broken, "error", error)
    printed = run(tmp_path, "all", client=Broken, code=command_line.FAILED, most=4, report=str(tmp_path / "report"))
    assert found(tmp_path).keys() == {"judge", "detectors", "replay", "rewrites", "utility"} and (tmp_path / "report" / "index.html").exists()
    said = capsys.readouterr().err
    assert all(f"evaluate: without {part}. {error}\n" in said for part in ("typographic", "likelihood")) and "### " in printed
    assert "evaluate: typographic, likelihood failed, see above; what " in said and ("Traceback" in said) == isinstance(error, KeyError)
    with pytest.raises(type(error)):  # what was named must not be left out
        run(tmp_path, "typographic", client=Broken, most=4)


def test_a_run_in_which_everything_fails_still_ends_with_its_code(tmp_path, mm, monkeypatch):
    monkeypatch.setenv("PROTECTOR_CACHE", str(tmp_path / "cache"))
    options = {"mllm": "openai", "mllm_url": "http://127.0.0.1:9", "mllm_model": "eyes", "out": str(tmp_path / "results")}
    assert evaluate.run(EvaluateConfig(("all",), mm_safetybench=str(mm), detector=str(mm), **options)) == command_line.FAILED  # mm is no model


def test_what_is_missing_and_what_is_asked_stands_on_stderr_before_the_first_question(tmp_path, mm, capsys):
    class Deaf(FakeClient):
        def __call__(self, question, image=None):
            raise ModelError("not reached")

    with pytest.raises(ModelError, match="not reached"):
        run(tmp_path, "mm-safetybench", client=Deaf, mm_safetybench=str(mm))
    said = capsys.readouterr().err.splitlines()
    absent = [f"mm-safetybench: missing: {name}: no {name}.json, the scenario can't be measured" for name in benchmarks.SCENARIOS if name != "06-Fraud"]
    assert said[:17] == ["mm-safetybench: 1 text, 1 TYPO to ask", "mm-safetybench: missing: SD: all 1 images are missing",
                         "mm-safetybench: missing: TYPO: all 1 images are missing, rendered by this project",
                         "mm-safetybench: missing: SD_TYPO: all 1 images are missing",
                         "mm-safetybench: missing: questions: the files hold 1 of 154 (06-Fraud 1 of 154)", *absent]
    with pytest.raises(DataError, match="mm-safetybench must have something to ask, got nothing. Pass other --kinds, or the missing files."):
        run(tmp_path, "mm-safetybench", client=Deaf, mm_safetybench=str(mm), kinds=("SD",))


@pytest.mark.parametrize("options, said", [
    ({"on_flag": "report"}, "on_flag must be rewrite or refuse, got 'report'"), ({"most": -1}, "most must be 0 or more, got -1"),
    ({"workers": 0}, "workers must be 1 or more, got 0"), ({"judge_url": "http://x"}, "judge_url and judge_model must be given together"),
    ({"judge_model": "strong"}, "judge_url and judge_model must be given together"), ({"judge_url": "x", "judge_model": "y"}, "url must begin with http"),
    ({"exact_questions": "x"}, "exact_questions and exact_answers must be given together"),
    ({"detector": "absent.gguf"}, "detector must be there, got nothing at absent.gguf"),
    ({"exact_questions": "absent.json", "exact_answers": "absent.jsonl"}, "exact_questions must be there, got nothing at absent.json. Check the path"),
    ({"mllm": "openai", "mllm_url": "http://x"}, "mllm_url and mllm_model must be given together"),
    ({"mllm": "openai"}, "url must begin with http:// or https://, got ''"), ({"mllm": "openai", "mllm_url": "x", "mllm_model": "y"}, "url must begin with"),
    ({"mllm": "llama.cpp", "mllm_model": "absent.gguf"}, "model and mmproj must be GGUF files, got no file at absent.gguf"),
    ({"kinds": ("typo",)}, "kinds must be some of text, SD, TYPO, SD_TYPO, got typo"), ({"figstep": "absent"}, "absent must hold safebench.csv, got none"),
    ({"mm_safetybench": "absent"}, "absent must hold NN-Scenario.json files"), ({"related": "absent"}, "related must be a folder of images")])
def test_what_is_wrong_is_said_before_anything_is_measured(tmp_path, mm, monkeypatch, options, said):
    monkeypatch.setattr(evaluate._Evaluation, "measure", lambda *_: pytest.fail("a part began"))
    with pytest.raises((ValueError, ModelError), match=said):
        run(tmp_path, "all", **{"mm_safetybench": str(mm), **options})
    assert not (tmp_path / "results").exists()


def test_recorded_answers_of_another_benchmark_are_found_out_at_the_start(tmp_path, mm, monkeypatch):
    monkeypatch.setattr(evaluate._Evaluation, "measure", lambda *_: pytest.fail("a part began"))
    (tmp_path / "eyes.jsonl").write_text('{"question": "Something else?", "answer": "No."}\n')
    with pytest.raises(DataError, match="eyes.jsonl must hold answers to this benchmark's questions, got none"):
        run(tmp_path, "all", mm_safetybench=str(mm), mllm="replay", mllm_model=str(tmp_path / "eyes.jsonl"))


def test_a_wrong_path_is_one_line_and_exit_code_2(tmp_path, capsys):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "text": "Is there a cup?", "label": "yes"}\n')
    answers = str(tmp_path / "answers.jsonl")
    for paths, said in ((["absent.jsonl", answers], "evaluate: exact_questions must be there, got nothing at absent.jsonl. Check the path."),
                        ([str(questions), answers], f"evaluate: exact_answers must be there, got nothing at {answers}. Check the path."),
                        ([str(tmp_path), str(questions)], "Is a directory")):
        assert command_line.main(["evaluate", "exact", "--exact-questions", paths[0], "--exact-answers", paths[1]]) == command_line.USAGE
        said_there = capsys.readouterr().err
        assert said_there.startswith("protector: ") and said in said_there and said_there.count("\n") == 1


def test_the_captions_that_the_model_card_holds_out(tmp_path, monkeypatch):
    card = (Path(__file__).parents[1] / "protector/weights/README.md").read_text()
    code, = re.findall(r"```python\n(import gzip, hashlib.*?)```", card, re.DOTALL)
    rows = [{"id": f"{source}{i}", "source": source, "question": "What is this?", "answer": f"{source}, cup {i}.", "label": 0} for i in range(1000) for source in "ab"]
    (tmp_path / "D").mkdir()
    (tmp_path / "D" / "train_benign_mllm.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    rest = [json.loads(line) for line in (tmp_path / "captions_rest.jsonl").read_text().splitlines()]
    for source in "ab":
        # 16 leaves 1 modulo 5: a number's rest is that of the sum of its hexadecimal digits.
        held = [row for row in rows if row["source"] == source and sum(int(digit, 16) for digit in hashlib.sha256(row["answer"].encode()).hexdigest()) % 5 == 0]
        even = {i * len(held) // 162 for i in range(162)}
        assert 162 < len(held) < 250 and [row for row in rest if row["source"] == source] == [row for i, row in enumerate(held) if i not in even]


def test_a_folder_that_cannot_be_written_is_found_out_at_the_start(tmp_path, mm, monkeypatch, capsys):
    monkeypatch.setattr(evaluate._Evaluation, "measure", lambda *_: pytest.fail("a part began"))
    (tmp_path / "taken").write_text("")
    for option in ("--out", "--report"):
        out = [] if option == "--out" else ["--out", str(tmp_path / "results")]
        assert command_line.main(["evaluate", "mm-safetybench", "--mm-safetybench", str(mm), "--kinds", "text", *out, option, str(tmp_path / "taken")]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"protector: [Errno 17] File exists: '{tmp_path / 'taken'}'"


def test_a_judge_that_refuses_its_key_fails_its_parts_alone(tmp_path, server, capsys):
    server.replies = [401]
    run(tmp_path, "all", code=command_line.FAILED, most=4, judge_url=server.address, judge_model="strong", workers=1)
    assert found(tmp_path).keys() == {"detectors", "utility", "likelihood"} and len(server.requests) < 60  # 12 for each part
    said = capsys.readouterr().err
    assert "evaluate: without judge. judging: a request must be taken, got 12 refusals and no answer. chat: " in said and "got status 401. " in said
    assert "evaluate: judge, replay, typographic failed, see above" in said
