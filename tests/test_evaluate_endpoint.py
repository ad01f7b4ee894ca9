"""What a server may do wrong, and when it is left alone: on loopback, with a server that says what it is told."""
import io
import json
import socket
import threading
import time
import urllib.error

import pytest
from evaluate_fakes import connect, server  # noqa: F401 (a fixture)

from protector.evaluate import endpoint


class Cut(bytes):
    """A body that ends before its Content-Length."""

    def __len__(self):
        return 1000


def ask(link):
    return lambda number: link.chat([{"role": "user", "content": str(number)}], accept=lambda text: text if text.strip() else None)


@pytest.mark.parametrize("first", [Cut(b'{"choices": ['), b"[" * 100000])
def test_a_cut_body_and_nested_junk_are_tried_again(server, first):
    server.replies = [first, "A cup."]
    assert ask(connect(server))(0) == "A cup." and len(server.requests) == 2
    server.replies = [first]
    assert endpoint.in_parallel(ask(connect(server)), [0]) == [None]


@pytest.mark.parametrize("backoff_s, headers, waits", [
    (1, [{}] * 5, [1, 2, 4, 8]), (40, [{}] * 5, [40, 60, 60, 60]), (1, [ConnectionResetError()] * 5, [1, 2, 4, 8]),
    (1, [{}, {"Retry-After": "7"}, {}, {}, {}], [1, 7, 14, 28]),  # longer than its own 2: it doubles from there
    (1, [{"Retry-After": "600"}] * 5, [60] * 4), (4, [{"Retry-After": "3"}] * 5, [4, 8, 16, 32]),
    (1, [{"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}] * 5, [1, 2, 4, 8])])
def test_waits_double_up_to_a_minute_and_are_never_shorter_than_the_server_asks(monkeypatch, backoff_s, headers, waits):
    def refuse(request, timeout):
        said = left.pop(0)
        raise said if isinstance(said, Exception) else urllib.error.HTTPError(request.full_url, 503, "", said, io.BytesIO(b"{}"))

    left, waited = list(headers), []
    monkeypatch.setattr(endpoint.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(endpoint.time, "sleep", waited.append)
    link = endpoint.Endpoint("http://127.0.0.1:9", "strong", backoff_s=backoff_s)
    with pytest.raises(endpoint.SilentError, match="must answer within 5 attempts"):
        ask(link)(0)
    assert waited == waits and not left and link.counters == {"requests": 5, "retries": 4, "failed": 1}


def test_a_hanging_server_is_given_up_and_the_rest_is_missing(capsys):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:  # it takes connections and never says a word
        link = endpoint.Endpoint(f"http://127.0.0.1:{mute.getsockname()[1]}", "strong", timeout_s=0.05, attempts=2, backoff_s=0.01)
        answers = endpoint.in_parallel(ask(link), range(40), workers=1, desc="asking")
    assert answers == 40 * [None] and link.counters == {"requests": 24, "retries": 12, "failed": 12}
    assert "asking: the server must answer, got nothing for 12 requests in a row. The other 28 weren't made" in capsys.readouterr().err


@pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n",
                                   b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n270f\r\n"])
def test_a_server_that_trickles_has_the_time_of_one_attempt(begin):
    def trickle():
        with listening.accept()[0] as link:
            try:
                link.sendall(begin)
                for _ in range(60):  # 3 s, a byte each 0.05 s: no wait for one is long
                    link.sendall(b" ")
                    time.sleep(0.05)
            except OSError:  # the other side has hung up, as it should
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=trickle)
        server.start()
        link = endpoint.Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}", "strong", timeout_s=0.3, attempts=1)
        start = time.monotonic()
        with pytest.raises(endpoint.SilentError, match="must answer within 1 attempts of 0.3 s, got TimeoutError at the last"):
            ask(link)(0)
        assert time.monotonic() - start < 1.5
        server.join()


def test_a_response_without_end_is_cut(server, monkeypatch):
    monkeypatch.setattr(endpoint, "_MOST_BYTES", 1000)
    server.replies = ["x" * 1000, "A cup."]
    assert ask(connect(server))(0) == "A cup." and len(server.requests) == 2
    server.replies = ["x" * 1000]
    with pytest.raises(endpoint.SilentError, match="got ValueError at the last"):
        ask(connect(server))(0)


def test_an_image_that_cannot_be_read_says_nothing_of_the_server(capsys):
    def ask_about(number):
        raise endpoint.ImageError(f"image {number}") if number % 3 else endpoint.SilentError("nothing")

    assert endpoint.in_parallel(ask_about, range(40), workers=1, desc="asking") == 40 * [None]
    said = capsys.readouterr().err  # the 12th silence comes at the 34th question, the images between don't hide it
    assert "The other 6 weren't made" in said and "asking: 22 answers are missing. The first: image 1\n" in said
    assert "asking: 12 answers are missing. The first: nothing\n" in said and said.count("asking: an answer is missing. ") == 2


def test_an_answer_between_keeps_the_server(capsys):
    def silent_but_for_each_12th(number):
        if number % 12 != 11:
            raise endpoint.SilentError("chat: the server must answer, got nothing.")
        return number

    answers = endpoint.in_parallel(silent_but_for_each_12th, range(36), workers=1)
    assert [answer for answer in answers if answer is not None] == [11, 23, 35] and "weren't made" not in capsys.readouterr().err


@pytest.mark.parametrize("reply", [400, "", b'{"choices": [{"message": {"content": null}}]}'])
def test_a_server_that_refuses_requests_or_answers_junk_is_asked_on(server, capsys, reply):
    server.replies = ["A cup."] + [reply] * 15 + ["A cup."]
    answers = endpoint.in_parallel(ask(connect(server, attempts=1)), range(17), workers=1)
    said = capsys.readouterr().err
    assert answers == ["A cup."] + 15 * [None] + ["A cup."] and "weren't made" not in said
    assert said.count("asking: an answer is missing. chat: ") == 1 and "asking: 15 answers are missing. The first: chat: " in said


def refusal(**said):
    return 400, json.dumps({"error": {"message": "private words", **said}}).encode()


@pytest.mark.parametrize("reply, said", [
    (401, "status 401"), (refusal(type="invalid_request_error", code="unsupported_parameter", param="seed"),
                          r"status 400 \(invalid_request_error, unsupported_parameter, seed\)"),
    (refusal(type="BadRequestError", code=400, param=None), r"status 400 \(BadRequestError\)"), (refusal(type="private words"), "status 400"),
    ((404, b"private words"), "status 404"), ((400, b"[" * 100000), "status 400"), ((400, b'{"error": "private"}'), "status 400"),
    ((403, Cut(b'{"error": ')), "status 403")])
def test_a_server_that_refuses_every_request_from_the_start_is_left_and_says_why(server, capsys, reply, said):
    server.replies = [reply]
    said = rf"^judging: a request must be taken, got 12 refusals and no answer. chat: http.* must take the request, got {said}. Check address"
    with pytest.raises(endpoint.RefusedError, match=said) as error:
        endpoint.in_parallel(ask(connect(server)), range(40), workers=1, desc="judging")
    assert len(server.requests) == 12 and "private" not in str(error.value) + capsys.readouterr().err


def test_a_model_that_takes_neither_max_tokens_nor_a_temperature_is_asked_as_it_likes(server, capsys):
    unsupported = [refusal(type="invalid_request_error", code=f"unsupported_{what}", param=param) for what, param in (("parameter", "max_tokens"), ("value", "temperature"))]
    server.replies = [*unsupported, "A cup."]
    link = connect(server, attempts=1)
    assert [ask(link)(number) for number in (0, 1)] == ["A cup.", "A cup."]
    sent = [{name: request[name] for name in ("max_tokens", "max_completion_tokens", "temperature") if name in request} for request in server.requests]
    assert sent == [{"max_tokens": 512, "temperature": 0}, {"max_completion_tokens": 512, "temperature": 0}, *[{"max_completion_tokens": 512}] * 2]
    said = capsys.readouterr().err
    assert said == ("chat: strong doesn't take max_tokens; it is asked with max_completion_tokens.\n"
                    "chat: strong doesn't take temperature; it is asked without it.\n")


def test_what_is_refused_again_or_for_its_value_is_an_error(server):
    server.replies = [refusal(code="unsupported_parameter", param="max_tokens")]
    with pytest.raises(endpoint.RefusedError, match=r"got status 400 \(unsupported_parameter, max_tokens\)"):
        ask(connect(server))(0)
    assert len(server.requests) == 2
    server.replies = [refusal(code="decimal_above_max_value", param="temperature")]
    with pytest.raises(endpoint.RefusedError, match=r"got status 400 \(decimal_above_max_value, temperature\)"):
        ask(connect(server))(0)
    assert len(server.requests) == 3


def test_a_refusal_of_one_prompt_or_of_several_kinds_is_none_of_them_all(server, capsys):
    server.replies = [refusal(code="content_filter")] * 15 + ["A cup."]  # it is about what was asked
    assert endpoint.in_parallel(ask(connect(server)), range(16), workers=1) == 15 * [None] + ["A cup."]
    server.replies = [404] + [401] * 15 + ["A cup."]
    assert endpoint.in_parallel(ask(connect(server)), range(17), workers=1) == 16 * [None] + ["A cup."]
    said = capsys.readouterr().err
    assert all(f"asking: {n} answers are missing. The first: chat: " in said for n in (1, 15)) and "(content_filter)" in said


def test_an_overloaded_server_says_why(server):
    server.replies = [(429, refusal(code="insufficient_quota")[1])]
    with pytest.raises(endpoint.SilentError, match=r"got status 429 \(insufficient_quota\) at the last"):
        ask(connect(server))(0)
