"""What a server may do wrong, and when it is left alone: on loopback, with a server that says what it is told."""
import socket
import threading
import time

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
    assert "The other 6 weren't made" in said and "asking: 22 answers are missing for their images. The first: image 1\n" in said


def test_an_answer_between_keeps_the_server(capsys):
    def silent_but_for_each_12th(number):
        if number % 12 != 11:
            raise endpoint.SilentError("chat: the server must answer, got nothing.")
        return number

    answers = endpoint.in_parallel(silent_but_for_each_12th, range(36), workers=1)
    assert [answer for answer in answers if answer is not None] == [11, 23, 35] and "must answer" not in capsys.readouterr().err


@pytest.mark.parametrize("reply", [400, "", b'{"choices": [{"message": {"content": null}}]}'])
def test_a_server_that_refuses_requests_or_answers_junk_is_asked_on(server, capsys, reply):
    server.replies = [reply] * 15 + ["A cup."]
    answers = endpoint.in_parallel(ask(connect(server, attempts=1)), range(16), workers=1)
    assert answers == 15 * [None] + ["A cup."] and "must answer" not in capsys.readouterr().err
