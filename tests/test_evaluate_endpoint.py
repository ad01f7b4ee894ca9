"""What a server may do wrong, and when it is left alone: on loopback, with a server that says what it is told."""
import socket

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
