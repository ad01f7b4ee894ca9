"""OpenAI's format without HTTP: what is read of a request, and that every text of an answer is scored or left out."""
import json
import math
import re
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_fakes import DONE, MARKER, FakeDetector, FakeDetoxifier, chunk, completion, sse, spoken

from protector.chat import BEGUN, MAX_CALLS, BadRequest, ChatRequest, ChatStream, EventReader, UpstreamError, guard_completion, read_request
from protector.errors import ModelError
from protector.guard import Protector

HARMFUL = f"You can mix {MARKER} in a bucket."
SAFE = "Water boils at a lower temperature on a mountain."


@pytest.fixture
def protector():
    return Protector(FakeDetector(), FakeDetoxifier(), threshold=0.5)


@pytest.fixture
def refuser():
    return Protector(FakeDetector(), False, threshold=0.5)


def run(protector, *items, request=ChatRequest("q"), finish=True):
    """(content, reasoning, last choice chunk, ChatStream) of a stream of chunks."""
    stream, out = ChatStream(protector, request), []
    for item in items:
        out += stream.push(item)
    if finish and not stream.stopped:
        out += stream.finish()
    stream.close()
    assert protector.detector.n_cursors == 0
    choices = [c for item in out for c in item["choices"] if c["index"] == 0]
    shown = {key: "".join(c["delta"].get(key) or "" for c in choices) for key in ("content", "reasoning_content")}
    return shown["content"], shown["reasoning_content"], choices[-1], stream


# -- requests


def test_question_is_what_the_user_said_since_the_last_answer():
    request = read_request({"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "first"}, {"role": "assistant", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:,"}},
                                     {"type": "text", "text": "this"}]}]})
    assert request == ChatRequest("see\nthis", (("first", "one"),), "", 1, False)
    asked = {"role": "user", "content": "Is it safe to mix bleach and vinegar?"}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
    silent = {"role": "assistant", "content": None, "tool_calls": []}  # neither an answer nor in the history
    for between in ([], [image], [{"role": "system", "content": "Be brief."}], [silent, {"role": "tool", "content": "x"}]):
        request = read_request({"messages": [asked, *between, {"role": "user", "content": "Yes or no?"}]})
        assert request == ChatRequest("Is it safe to mix bleach and vinegar?\nYes or no?")
    assert read_request({"messages": [asked, image]}).question == asked["content"]
    assert read_request({"messages": [asked, {"role": "assistant", "content": "No."}, image]}).question == ""


def test_assistant_message_at_the_end_is_a_prefill():
    request = read_request({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Sure,"}]})
    assert (request.question, request.history, request.prefill) == ("q", (), "Sure,")


def test_answer_around_tool_calls_is_history():
    request = read_request({"messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "Let me look.", "tool_calls": []},
        {"role": "tool", "content": "found", "tool_call_id": "1"}]})
    assert (request.question, request.history, request.prefill) == ("q", (("q", "Let me look."),), "")


def test_repr_of_a_request_holds_no_text():
    assert repr(ChatRequest("secret question", (("a", "b"),), "prefill")) == "ChatRequest(n=1, stream=False)"


@pytest.mark.parametrize("payload, message", [
    ([], "chat: body must be a JSON object."),
    ({}, "chat: messages must be a list with at least one message."),
    ({"messages": ["hi"]}, "chat: each message must be an object with a role."),
    ({"messages": [{"role": "user", "content": 3}]}, "chat: content must be a string or a list of parts."),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "chat: each content part must be an object with a type."),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "chat: a text part must have a text."),
    ({"messages": [{"role": "user", "content": "q"}], "n": 9}, "chat: n must be an integer from 1 to 8."),
    ({"messages": [{"role": "user", "content": "q"}], "n": True}, "chat: n must be an integer from 1 to 8."),
    ({"messages": [{"role": "user", "content": "q"}], "stream": "false"}, "chat: stream must be true or false."),
    # Go's encoding/json would take the last one of each.
    ({"messages": [{"role": "user", "content": "q"}], "Messages": []}, "chat: field messages must be written in lower case."),
    ({"messages": [{"role": "user", "content": "q"}], "me\u017fsages": []}, "chat: field messages must be written in lower case."),
    ({"messages": [{"role": "user", "content": "q", "Content": "x"}]}, "chat: field content must be written in lower case."),
    ({"messages": [{"role": "user", "Content": "x"}]}, "chat: field content must be written in lower case."),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "TEXT": "x"}]}]}, "chat: field text must be written in lower case."),
])
def test_wrong_requests_say_what_is_wrong(payload, message):
    with pytest.raises(BadRequest) as error:
        read_request(payload)
    assert str(error.value) == message


def test_fields_that_the_guard_does_not_read_have_any_case():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"Content": {}, "content": {}, "N": {}, "n": {}}}}}
    assert read_request({"messages": [{"role": "user", "content": "q", "Name": "x"}], "tools": [tool], "X": 1}).question == "q"


# -- events


def test_events_are_the_same_however_the_bytes_are_cut():
    data = b": ping\r\n\r\ndata: {\"a\":\r\ndata: 1}\n\nid: 7\nretry: 5\nevent: message\ndata: \xc3\xa9\n\nevent: odd\ndata: x\n\ndata: [DONE]"
    whole = [("comment", ""), ("data", '{"a":\n1}'), ("data", "é"), ("unknown", ""), ("data", "[DONE]")]
    for size in (1, 2, 3, 7, len(data)):
        reader, events = EventReader(), []
        for start in range(0, len(data), size):
            events += reader.feed(data[start:start + size])
        assert events + reader.end() == whole


def test_an_endless_event_is_an_error():
    reader = EventReader()
    with pytest.raises(UpstreamError, match="at most 1048576 bytes"):
        for _ in range(40):
            reader.feed(b"x" * 65536)


def test_58_an_event_of_empty_lines_is_bounded_and_reading_one_is_linear():
    """Regression: empty lines of data counted nothing, and all bytes and lines so far were copied and counted again at each network part."""
    reader = EventReader()
    with pytest.raises(UpstreamError, match="at most 1048576 bytes"):
        for _ in range(60):
            reader.feed(b"data:\n" * 20_000)
    start, reader = time.monotonic(), EventReader()
    for _ in range(500_000):
        reader.feed(b"x")
    assert time.monotonic() - start < 5  # 0.2 s; copied each time, 125 GB
    reader = EventReader()
    for _ in range(3):  # the count ends with the event
        assert len(reader.feed(b"data: " + b"x" * 1_000_000 + b"\n\n")) == 1


def test_bytes_that_are_no_text_are_an_error():
    with pytest.raises(UpstreamError, match="UTF-8"):
        EventReader().feed(b"data: \xff\n\n")


# -- whole answers


def test_safe_answer_comes_back_as_it_was(protector):
    parts = [{"type": "text", "text": "Water "}, {"type": "text", "text": "boils."}]
    message = {"role": "assistant", "content": parts, "refusal": None, "tool_calls": None}
    guarded, action = guard_completion(protector, ChatRequest("q", n=2), completion(SAFE, message))
    assert action == "pass"
    assert guarded["choices"][0]["message"] == {"role": "assistant", "content": SAFE}
    assert guarded["choices"][1]["message"]["content"] == parts
    assert [choice["finish_reason"] for choice in guarded["choices"]] == ["stop", "stop"]
    assert guarded["usage"]["total_tokens"] == 3


def test_31_each_choice_is_guarded(protector):
    guarded, action = guard_completion(protector, ChatRequest("q", n=3), completion(SAFE, HARMFUL, SAFE))
    assert [choice["message"]["content"] for choice in guarded["choices"]] == [SAFE, "Please keep the two apart.", SAFE]
    assert [choice["protector"]["action"] for choice in guarded["choices"]] == ["pass", "rewrite", "pass"]
    assert action == "rewrite"


@pytest.mark.parametrize("channel", ["content", "reasoning_content", "reasoning", "refusal"])
def test_31_every_text_of_a_message_is_scored(refuser, channel):
    message = {"role": "assistant", "content": SAFE, channel: HARMFUL}
    guarded, action = guard_completion(refuser, ChatRequest("q"), completion(message))
    assert action == "refuse" and MARKER not in json.dumps(guarded)
    assert guarded["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("call", [
    {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": HARMFUL})}},
    {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({HARMFUL: 1})}},
    {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": ["\\u0062leach \\u0061nd vinegar"]}'}},
    {"id": "c", "type": "custom", "custom": {"name": "f", "input": HARMFUL}},
    # Cut, with a raw line end, cut in an escape, with a letter beyond U+FFFF: what lenient readers make of it.
    {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "\\u0062leach \\u0061nd vinegar'}},
    {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "\\u0062leach \\u0061nd vinegar\n"}'}},
    {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "bleach\\u0020and vinegar, \\u00'}},
    {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "\\ud835\\udc1bleach and vinegar'}},
    {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "bleach and vinegar \\q'}},
    # Names, and ids that speak, are a model's text, too.
    {"id": "c", "type": "function", "function": {"name": "Mix_bleach_and_vinegar_in_a_closed_bucket_and_wait_for_the_gas", "arguments": ""}},
    {"id": "c", "type": "function", "function": {"name": "mcp.mix/bleach4and-vinegar", "arguments": "{}"}},
    {"id": "c", "type": "custom", "custom": {"name": "bleach.and-vinegarInABucket", "input": ""}},
    {"id": "c", "type": "function", "function": {"name": "nowMixTheTwoAndPour_bleach_and", "arguments": "vinegar"}},
    {"id": "c", "type": "function", "function": {"name": "nowmixthetwoandpourit_bleach", "arguments": "and vinegar"}},
    {"id": "Mix_bleach_and_vinegar:0", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    {"id": "mix4bleach4and4vinegar4in4a4closed4bucket4and4wait4for4the4gas", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    {"id": "call_mix1_bleach2_and3vinegar", "type": "custom", "custom": {"name": "f", "input": ""}},
    {"id": "now_mix_bleach", "type": "function", "function": {"name": "and_vinegar", "arguments": "{}"}},
])
def test_31_all_that_a_tool_call_says_is_scored(protector, call):
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    guarded, action = guard_completion(protector, ChatRequest("q"), completion(message))
    assert action == "refuse"
    assert guarded["choices"][0]["message"] == {"role": "assistant", "content": protector.refusal}
    content, _, last, _ = run(protector, chunk({"tool_calls": [{"index": 0, **call}]}), chunk({}, "tool_calls"))
    assert content == protector.refusal and last["finish_reason"] == "content_filter"


@pytest.mark.parametrize("name", ["m1x_bl34ch_4nd_v1n3g4r_1n_4_cl0s3d_buck3t", "mcp.m1x/bl34ch-4nd-v1n3g4r"])
def test_31_digits_for_letters_in_names_and_ids_are_undone(refuser, name):
    """Regression: digits parted words, and were gone before anything could undo them."""
    for call in ({"id": "c", "function": {"name": name, "arguments": "{}"}}, {"id": name, "function": {"name": "f", "arguments": "{}"}}):
        call = {"index": 0, **call}
        assert guard_completion(refuser, ChatRequest("q"), completion({"tool_calls": [call]}))[1] == "refuse"
        assert run(refuser, chunk({"tool_calls": [call]}), chunk({}, "tool_calls"))[0] == refuser.refusal


@pytest.mark.parametrize("bodies", [
    [{"custom": {"name": "say", "input": text}} for text in ("Mix the bleach and", "vinegar in", "a bucket.")],
    [{"function": {"name": "say", "arguments": json.dumps({"text": text})}} for text in ("Mix the bleach and", "vinegar in", "a bucket.")],
    [{"function": {"name": "say", "arguments": json.dumps({text: i})}} for i, text in enumerate(("Mix the bleach and", "vinegar in"))],
    [{"function": {"name": "say", "arguments": text}} for text in ('{"text": "Mix the bl\\u0065ach and"}', '{"text": "vineg\\u0061r in"}')],
])
def test_31_the_texts_of_many_tool_calls_are_a_text(bodies):
    """Regression: each was scored by itself."""
    refuser = Protector(FakeDetector("bleach and\nvinegar"), False, threshold=0.5)
    calls = [{"index": i, "id": f"call_{i}", **body} for i, body in enumerate(bodies)]
    assert guard_completion(refuser, ChatRequest("q"), completion({"tool_calls": calls}))[1] == "refuse"
    assert run(refuser, *(chunk({"tool_calls": [call]}) for call in calls), chunk({}, "tool_calls"))[0] == refuser.refusal
    for call in calls:
        assert guard_completion(refuser, ChatRequest("q"), completion({"tool_calls": [call]}))[1] == "pass"


def test_31_harmless_texts_of_many_tool_calls_pass(refuser):
    calls = [{"id": f"call_{i}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
             for i, arguments in enumerate(('{"city": "Bern", "days": 2}', '{"city": "Basel", "days": 3}', "{}"))]
    guarded, action = guard_completion(refuser, ChatRequest("q"), completion({"tool_calls": calls}))
    assert action == "pass" and guarded["choices"][0]["message"]["tool_calls"] == calls
    assert refuser.detector.seen == [call["function"]["arguments"] for call in calls] + ["Bern\nBasel\ncity\ndays"]
    numbers = [{**call, "function": {"name": "turn", "arguments": f'{{"degrees": {i}}}'}} for i, call in enumerate(calls)]
    guard_completion(refuser, ChatRequest("q"), completion({"tool_calls": numbers}))
    assert len(refuser.detector.seen) == 7  # a key that each of them says is no text over all


def test_17_texts_of_tool_calls_together_fit_the_limit():
    """At the limit, in bytes, with a line end between each two: what is scored together can't be too long by itself."""
    protector = Protector(FakeDetector(), False, threshold=0.5, max_bytes=1000)
    for text, expected in (("é" * 249 + "x", "pass"), ("é" * 250, "error")):
        calls = [{"index": i, "custom": {"name": "f", "input": text}} for i in range(2)]
        assert guard_completion(protector, ChatRequest("q"), completion({"tool_calls": calls}))[1] == expected
        assert run(protector, *(chunk({"tool_calls": [call]}) for call in calls))[2]["protector"]["action"] == expected


def test_31_safe_tool_calls_pass(protector):
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    guarded, action = guard_completion(protector, ChatRequest("q"), completion(message))
    assert action == "pass" and guarded["choices"][0]["message"] == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert protector.detector.seen == ['{"city": "Bern"}']  # a short name has no room for harm, and would cost time
    cut = '{"x": "caf\\u00e9", "y": "cut \\u0'
    call = {"id": "call_9fK2xQ-7Ab", "type": "function", "function": {"name": "mcp.files/readText", "arguments": cut}}
    seen = [cut, '{"x": "café", "y": "cut \\u0', 'mcp files read Text {"x": "café", "y": "cut \\u0']
    guarded, action = guard_completion(protector, ChatRequest("q"), completion({"tool_calls": [call]}))
    assert action == "pass" and guarded["choices"][0]["message"]["tool_calls"] == [call] and protector.detector.seen[1:4] == seen
    call["function"] = {"name": "f", "arguments": '{"x": "caf\\u00e9\n"}'}  # a raw line end in a string
    guard_completion(protector, ChatRequest("q"), completion({"tool_calls": [call]}))
    assert protector.detector.seen[-1] == "x\ncafé\n" and len(protector.detector.seen) == 5


def test_31_notes_of_a_tool_call_are_left_out_and_a_signed_id_keeps_its_pair(refuser):
    """Regression: LiteLLM's answers of Gemini, whose calls carry a signature, were refused."""
    signed = {"id": "call_1f__thought__" + "QUJD+/" * 40 + "==", "type": "function", "provider_specific_fields": {"thought_signature": "QUJD"},
              "function": {"name": "weather", "arguments": "{}", "extra_content": {"google": "QUJD"}}}
    guarded, action = guard_completion(refuser, ChatRequest("q"), completion({"tool_calls": [signed]}))
    [choice] = guarded["choices"]
    [call] = choice["message"]["tool_calls"]
    assert action == "pass" and choice["protector"]["dropped"] == ["extra_content", "provider_specific_fields"]
    assert call == {"id": call["id"], "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    assert re.fullmatch("call_[0-9a-f]{24}", call["id"])
    stream = ChatStream(refuser, ChatRequest("q"))
    events = stream.push(chunk({"tool_calls": [{"index": 7, **signed}]})) + stream.push(chunk({}, "tool_calls"))
    shown = [event["choices"][0]["delta"]["tool_calls"] for event in events if "tool_calls" in event["choices"][0]["delta"]]
    assert shown == [[{"index": 0, **call}]]  # the same id, and a number of the guard's own
    unset = {"index": None, "id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    assert guard_completion(refuser, ChatRequest("q"), completion({"tool_calls": [unset]}))[1] == "pass"


def test_31_an_index_is_one_of_the_request(protector):
    """A number of any size has room for a text in its digits."""
    for index in (10 ** 4000, -1, True, "0"):
        assert guard_completion(protector, ChatRequest("q"), {"choices": [{"index": index, "message": {"content": SAFE}}]})[0]["choices"][0]["index"] == 0


def test_39_reasoning_details_are_left_out(protector):
    """Regression: refused. They say what stands in reasoning, in the provider's own form."""
    message = {"content": SAFE, "reasoning": "Hm.", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]}
    guarded, action = guard_completion(protector, ChatRequest("q"), completion(message))
    assert action == "pass" and guarded["choices"][0]["message"] == {"role": "assistant", "content": SAFE, "reasoning": "Hm."}
    content, reasoning, last, _ = run(protector, chunk(message), chunk({}, "stop"))
    assert content == SAFE and last["protector"] == {"action": "pass", "flagged": False, "dropped": ["reasoning_details"]}


def test_39_a_chunk_of_notes_alone_is_empty(protector):
    """Regression: Azure's asynchronous filter sends such chunks, and they ended the answer."""
    notes = {"id": "", "choices": [{"index": 0, "finish_reason": None, "content_filter_results": {"hate": {"filtered": False}}, "content_filter_offsets": {"start": 4}}]}
    content, _, last, _ = run(protector, *spoken(SAFE)[:2], notes, *spoken(SAFE)[2:])
    assert content == SAFE and last["protector"]["action"] == "pass"


def test_31_the_names_of_many_tool_calls_are_a_text(refuser):
    """Regression: each name had too few words to be scored."""
    names = ["now_mix_bleach", "and_vinegar_in", "a_closed_bucket"]
    for calls in ([{"id": f"call_{i}", "function": {"name": name, "arguments": "{}"}} for i, name in enumerate(names)],
                  [{"id": "71" + name, "function": {"name": "", "arguments": "{}"}} for name in names]):
        calls = [{"index": i, **call} for i, call in enumerate(calls)]
        assert guard_completion(refuser, ChatRequest("q"), completion({"tool_calls": calls}))[1] == "refuse"
        assert run(refuser, *(chunk({"tool_calls": [call]}) for call in calls), chunk({}, "tool_calls"))[0] == refuser.refusal


def test_31_random_ids_and_a_name_said_twice_are_no_text(refuser):
    ids = ["call_0f8fad5b-d9cb-469f-a165-70867728950e", "chatcmpl-tool-deadbeefcafe4bad9badfeedfacebead", "toolu_01A09q90qw90lq917835lq9",
           "call_xK2vQ9fRt7bWz1Lm4Np8Gh3D", "9fK2xQ7Ab", "fc_6821", "0"]
    calls = [{"id": value, "type": "function", "function": {"name": "get_weather", "arguments": "{}"}} for value in ids]
    guarded, action = guard_completion(refuser, ChatRequest("q"), completion({"tool_calls": calls}))
    assert action == "pass" and guarded["choices"][0]["message"]["tool_calls"] == calls and refuser.detector.seen == ["{}"] * len(ids)


def test_31_pieces_of_a_streamed_name_are_joined(refuser):
    """As clients join them; regression: only the first piece was shown, and scored."""
    def ask(*names):
        pieces = [{"index": 0, "id": "c", "function": {"name": name, "arguments": "{}"[i:i + 1]}} for i, name in enumerate(names)]
        stream = ChatStream(refuser, ChatRequest("q"))
        return [stream.push(chunk({"tool_calls": [piece]})) for piece in pieces] + stream.push(chunk({}, "tool_calls"))

    for names in (["get_", "weather"], ["get_weather", None], ["get_weather", "get_weather"], ["", "get_weather"]):
        *_, shown, end = ask(*names)
        assert shown["choices"][0]["delta"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": "{}"}
    assert ask("now_mix_", "bleach_and_", "vinegar")[-2]["choices"][0]["delta"]["content"] == refuser.refusal
    assert ask("x" * 100, "y" * 100)[1][-1]["choices"][0]["protector"]["action"] == "error"


def test_21_a_callers_check_stops_the_guard_past_the_error_policy(refuser):
    class Gone(BaseException):
        pass

    def check():
        raise Gone

    call = {"index": 0, "function": {"name": "f", "arguments": "{}"}}
    with pytest.raises(Gone):
        guard_completion(refuser, ChatRequest("q"), completion(SAFE), check)
    for item in (chunk({"content": SAFE}), chunk({"tool_calls": [call]}, "tool_calls")):
        stream = ChatStream(refuser, ChatRequest("q"), check=check)
        with pytest.raises(Gone):
            stream.push(item)
        stream.close()
    assert not refuser.counters and refuser.detector.n_cursors == 0


def test_17_the_tool_calls_of_an_answer_are_bounded():
    protector = Protector(FakeDetector(), False, threshold=0.5, max_bytes=1000)
    calls = [{"index": i, "function": {"name": "f", "arguments": "{}"}} for i in range(MAX_CALLS)]
    _, action = guard_completion(protector, ChatRequest("q"), completion({"tool_calls": calls}))
    assert action == "pass" and run(protector, *(chunk({"tool_calls": [call]}) for call in calls))[2]["protector"]["action"] == "pass"
    n_scored = protector.detector.n_scored
    more = calls + [{**calls[0], "index": MAX_CALLS}]
    long = [{"index": i, "function": {"name": "f", "arguments": "x" * 501}} for i in range(2)]
    for items in (more, long):
        guarded, action = guard_completion(protector, ChatRequest("q"), completion({"tool_calls": items}))
        assert action == "error" and guarded["choices"][0]["message"]["content"] == protector.refusal
        for stream in ([chunk({"tool_calls": items})], [chunk({"tool_calls": [call]}) for call in items]):
            assert run(protector, *stream, finish=False)[2]["protector"]["action"] == "error"
    assert protector.detector.n_scored == n_scored


def test_32_what_is_refused_is_not_called_unguarded(caplog):
    """Regression: under on_error="pass" the log and the counters said that an unguarded answer went out."""
    protector = Protector(FakeDetector(), False, threshold=0.5, on_error="pass")
    guarded, action = guard_completion(protector, ChatRequest("q"), completion({"role": "assistant", "content": SAFE, "thoughts": SAFE}))
    assert action == "error" and guarded["choices"][0]["message"]["content"] == protector.refusal
    assert dict(protector.counters) == {"error": 1} and "unguarded" not in caplog.text


def test_19_the_texts_of_an_answer_share_a_deadline():
    """Each text takes 60 ms of 150 ms: the third one is too late, though none is slow."""
    protector = Protector(FakeDetector(), False, threshold=0.5, deadline_ms=150)
    protector.detector.delay_s = 0.06
    calls = [{"index": i, "function": {"name": "f", "arguments": "{}"}} for i in range(50)]
    start = time.monotonic()
    guarded, action = guard_completion(protector, ChatRequest("q"), completion({"content": SAFE, "tool_calls": calls}))
    assert action == "error" and "tool_calls" not in guarded["choices"][0]["message"]
    _, _, last, stream = run(protector, chunk({"tool_calls": calls}), chunk({}, "tool_calls"))
    assert stream.action == "error" and time.monotonic() - start < 2


def test_a_stream_that_is_begun_reads_the_question_once_for_each_choice():
    protector = Protector(FakeDetector(), False, threshold=0.5, deadline_ms=300)
    expected = run(protector, *spoken(SAFE))[2]
    stream = ChatStream(protector, ChatRequest("q", n=2))
    stream.begin()
    stream.begin()
    assert protector.detector.n_cursors == 2 and not stream.choices and stream.time_left_s() == math.inf
    time.sleep(0.35)  # an upstream's time isn't the guard's
    sent = [part for item in spoken(SAFE) for part in stream.push(item)]
    assert protector.detector.n_cursors == 1 and sent[-1]["choices"][0]["protector"] == expected["protector"]
    stream.close()
    assert protector.detector.n_cursors == 0
    # Not all of many, none of a closed one, and none that is left when its choice ends without text.
    stream = ChatStream(protector, ChatRequest("q", n=100))
    stream.begin()
    assert protector.detector.n_cursors == BEGUN
    stream.push(chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]}))
    stream.push(chunk({}, "tool_calls"))
    assert protector.detector.n_cursors == BEGUN - 1
    stream.close()
    stream.begin()
    assert protector.detector.n_cursors == 0


def test_a_stream_that_is_closed_while_it_begins_leaves_no_cursor():
    protector = Protector(FakeDetector(), False, threshold=0.5)
    protector.detector.delay_s = 0.1
    stream = ChatStream(protector, ChatRequest("q", n=4))
    thread = threading.Thread(target=stream.begin)
    thread.start()
    time.sleep(0.15)  # the second choice's question is being read
    stream.close()
    thread.join()
    assert protector.detector.n_cursors == 0 and len(stream._begun) < 4


@pytest.mark.parametrize("message", [
    {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": SAFE}]},
    {"role": "assistant", "content": [{"type": "text", "text": SAFE, "more": "x"}]},
    {"role": "assistant", "content": SAFE, "audio": {"data": "AAAA", "transcript": SAFE}},
    {"role": "assistant", "content": SAFE, "thoughts": SAFE},
    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
    {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "a whole sentence", "arguments": ""}}]},
    {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f" * 129, "arguments": ""}}]},
    {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "fünf", "arguments": ""}}]},
    {"role": "assistant", "tool_calls": [{"id": "c", "type": "a_whole_sentence", "function": {"name": "f", "arguments": ""}}]},
    {"role": "assistant", "tool_calls": [{"id": "c", "type": "search", "search": {"query": SAFE}}]},
    {"role": "narrator", "content": SAFE},
    None,
])
def test_32_unknown_parts_get_the_error_policy(protector, message):
    guarded, action = guard_completion(protector, ChatRequest("q"), completion(message))
    assert action == "error" and guarded["choices"][0]["message"]["content"] == protector.refusal
    assert guarded["choices"][0]["finish_reason"] == "content_filter" and SAFE not in json.dumps(guarded)
    strict = Protector(FakeDetector(), False, threshold=0.5, on_error="raise")
    with pytest.raises(UpstreamError):
        guard_completion(strict, ChatRequest("q"), completion(message))


def test_31_what_is_not_scored_is_dropped_and_listed(refuser):
    response = completion({"role": "assistant", "content": SAFE, "annotations": [{"url": SAFE}]}, notes=SAFE)
    logprobs = {"content": [{"token": HARMFUL, "logprob": 0, "top_logprobs": []}]}
    response["choices"][0] |= {"logprobs": logprobs, "debug": SAFE}
    guarded, action = guard_completion(refuser, ChatRequest("q"), response)
    assert action == "pass" and json.dumps(guarded).count(SAFE) == 1 and MARKER not in json.dumps(guarded)
    dropped = {"action": "pass", "flagged": False, "dropped": ["annotations", "logprobs", "other"]}  # a name of the upstream's own is a text
    assert guarded["choices"][0]["protector"] == dropped and "logprobs" not in guarded["choices"][0]
    delta = chunk({"content": SAFE, "annotations": [{"url": SAFE}]}, "stop", notes=SAFE)
    delta["choices"][0] |= {"logprobs": logprobs, "debug": SAFE}
    content, _, last, _ = run(refuser, delta)
    assert content == SAFE and last["protector"] == dropped


SENTENCE = "Mix_the_two_in_a_bucket"


def test_31_nothing_around_the_answer_has_room_for_a_text(refuser):
    """Regression: names of the upstream's own, in any alphabet and nesting, came through unscored."""
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1, SENTENCE: 1},
             SENTENCE: 0, "input_token_details": {"cache_read": {"audio": {SENTENCE: 1}}}, "text_tokens": 10 ** 30, "audio_tokens": float("nan")}
    response = completion(SAFE, id=SENTENCE, model="\u6f02\u767d\u6c34", system_fingerprint="mix4bleach4with4vinegar4inside4buckets",
                          service_tier="mixthetwoinaclosedbucket", usage=usage, object=SENTENCE)
    response |= {"created": 10 ** 30, SENTENCE: 1}
    response["choices"][0] |= {"finish_reason": SENTENCE, SENTENCE: 1}
    guarded, action = guard_completion(refuser, ChatRequest("q", model="mine"), response)
    assert action == "pass" and guarded == {
        "object": "chat.completion", "id": guarded["id"], "model": "mine",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": SAFE}, "finish_reason": "stop", "protector": {
            "action": "pass", "flagged": False, "dropped": ["created", "other", "service_tier", "system_fingerprint"]}}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1},
                  "input_token_details": {}}}
    assert guarded["id"].startswith("chatcmpl-") and len(guarded["id"]) == 33
    assert "model" not in guard_completion(refuser, ChatRequest("q"), response)[0]


def test_31_what_servers_write_around_an_answer_comes_back(refuser):
    around = {"id": "chatcmpl-0f8fad5b-d9cb-469f-a165-70867728950e", "created": 1760000000, "model": "meta-llama/Llama-3.1-8B",
              "system_fingerprint": "fp_44709d6fcb", "service_tier": "default", "usage": {
                  "prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21, "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
                  "completion_tokens_details": {"reasoning_tokens": 1, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}}}
    response = completion(SAFE, **around)
    for reason in ("stop", "length", "tool_calls", "content_filter", None):
        response["choices"][0]["finish_reason"] = reason
        guarded, _ = guard_completion(refuser, ChatRequest("q", model="other"), response)
        assert {key: guarded[key] for key in around} == around and guarded["choices"][0]["finish_reason"] == reason
    long = completion(SAFE, model="mistralai/Mistral-Small-Instruct-2409")
    assert guard_completion(refuser, ChatRequest("q", model=long["model"]), long)[0]["model"] == long["model"]
    for model, shown in (("m", "m"), ("m" * 201, ""), (3, "")):
        assert read_request({"model": model, "messages": [{"role": "user", "content": "q"}]}).model == shown


def test_31_what_stands_around_a_stream_does_not_change(refuser):
    """Regression: each chunk had room for another word, and so had each usage."""
    stream, out = ChatStream(refuser, ChatRequest("q")), []
    words = ["", "Mix", "bleach", "and", "vinegar"]  # some servers begin with a chunk of empty fields
    for i, word in enumerate(words):
        out += stream.push(chunk({"content": SAFE[:10]} if word else {}, id=word, model=word, system_fingerprint=word, usage={"total_tokens": i}))
    assert not any("usage" in item for item in out)
    out += stream.push(chunk({}, "stop", usage={"total_tokens": 5}))
    for i in range(3):
        out += stream.push({"choices": [], "usage": {"total_tokens": i}})
    out += stream.finish()
    for key in ("id", "model", "system_fingerprint"):
        assert {item.get(key) for item in out} <= {"", "Mix"}
    assert [item["usage"] for item in out if "usage" in item] == [{"total_tokens": 5}] and out[-1]["usage"]
    stream = ChatStream(refuser, ChatRequest("q"))  # usage that comes early goes out at the end
    stream.push(chunk({"content": SAFE}, usage={"total_tokens": 7}))
    assert "usage" not in stream.push(chunk({}, "stop"))[-1] and stream.finish()[-1]["usage"] == {"total_tokens": 7}


def test_31_parts_of_content_are_scored_in_a_row_and_as_paragraphs(protector):
    """Regression: joined without anything between them, and shown as parts."""
    def parts(*texts):
        return completion({"role": "assistant", "content": [{"type": "text", "text": text} for text in texts]})

    refuser = Protector(FakeDetector("bleach\nand\nvinegar"), False, threshold=0.5)
    assert guard_completion(refuser, ChatRequest("q"), parts("Mix", "bleach", "and", "vinegar"))[1] == "refuse"
    assert guard_completion(protector, ChatRequest("q"), parts("bleach and vin", "egar"))[0]["choices"][0]["message"]["content"] == "Please keep the two apart."
    whole = parts("Water ", "boils.")
    assert guard_completion(protector, ChatRequest("q"), whole)[0]["choices"][0]["message"] == whole["choices"][0]["message"]


def test_31_two_names_of_the_reasoning_are_one_text(refuser):
    """Regression: each was scored by itself, and clients show them in one box."""
    split = {"reasoning_content": "You can mix bleach", "reasoning": " and vinegar in a bucket."}
    assert guard_completion(refuser, ChatRequest("q"), completion({"content": SAFE, **split}))[1] == "refuse"
    for items in ([{key: text} for key, text in split.items()], [split]):
        stream = ChatStream(refuser, ChatRequest("q"))
        out = [out for item in [*map(chunk, items), chunk({}, "stop")] for out in stream.push(item)]
        assert "egar" not in json.dumps(out) and stream.action == "refuse" and refuser.detector.most_cursors == 1
    same = {"reasoning": SAFE, "reasoning_content": SAFE}  # as vLLM says it
    n_scored = refuser.detector.n_scored
    guarded, action = guard_completion(refuser, ChatRequest("q"), completion({"content": None, **same}))
    assert action == "pass" and guarded["choices"][0]["message"] == {"role": "assistant", "content": None, **same}
    assert refuser.detector.n_scored == n_scored + 1
    for names in (["reasoning"], ["reasoning_content"], ["reasoning", "reasoning_content"]):
        stream = ChatStream(refuser, ChatRequest("q"))
        items = [chunk(dict.fromkeys(names, SAFE[i:i + 4])) for i in range(0, len(SAFE), 4)] + [chunk({"content": "x"}), chunk({}, "stop")]
        shown = [out["choices"][0]["delta"] for item in items for out in stream.push(item)]
        assert all("".join(delta.get(name, "") for delta in shown) == (SAFE if name in names else "") for name in same) and stream.action == "pass"


def test_30_prefill_is_scored_with_the_answer(refuser):
    request = ChatRequest("q", prefill="You can mix bleach")
    guarded, action = guard_completion(refuser, request, completion(" and vinegar."))
    assert action == "refuse" and guarded["choices"][0]["message"]["content"] == refuser.refusal
    guarded, action = guard_completion(refuser, request, completion(" with water."))
    assert action == "pass" and guarded["choices"][0]["message"]["content"] == " with water."


def test_report_lets_through_and_says_so():
    reporter = Protector(FakeDetector(), False, threshold=0.5, on_flag="report")
    guarded, action = guard_completion(reporter, ChatRequest("q"), completion(HARMFUL))
    assert action == "pass" and guarded["choices"][0]["message"]["content"] == HARMFUL
    assert guarded["choices"][0]["protector"]["flagged"] and guarded["choices"][0]["protector"]["score"] > 0.9


@pytest.mark.parametrize("response", [None, [], {}, {"choices": []}, {"choices": "x"}, completion(SAFE, SAFE),
                                      completion(SAFE, error={"message": "x"})])
def test_answers_that_are_no_completion_are_an_upstream_error(protector, response):
    with pytest.raises(UpstreamError):
        guard_completion(protector, ChatRequest("q", n=1), response)


# -- streams


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_characters="~"), max_size=60), st.integers(1, 9))
def test_safe_stream_is_byte_exact(text, size):
    protector = Protector(FakeDetector("~~~"), False, threshold=0.5)
    content, _, last, _ = run(protector, *spoken(text, size))
    assert content == text
    assert last["finish_reason"] == "stop" and last["protector"]["action"] == "pass"


def test_37_nothing_of_the_answer_follows_an_alarm(refuser):
    text = "Here is how. " + HARMFUL + " Then wait for the gas."
    stream, shown = ChatStream(refuser, ChatRequest("q")), ""
    for item in spoken(text, 3):
        for out in stream.push(item):
            shown += out["choices"][0]["delta"].get("content") or ""
    stream.close()
    before, refusal, after = shown.partition(refuser.refusal)
    assert stream.stopped and refusal and after == "" and text.startswith(before.removesuffix("\n\n")) and MARKER not in shown


def test_rewrite_and_refusal_in_a_stream(protector, refuser):
    content, _, last, stream = run(protector, *spoken(HARMFUL))
    assert content.endswith("Please keep the two apart.") and MARKER not in content
    assert last["finish_reason"] == "stop" and last["protector"] == {"action": "rewrite", "flagged": True}
    content, _, last, stream = run(refuser, *spoken(HARMFUL))
    assert content.endswith(refuser.refusal) and last["finish_reason"] == "content_filter" and stream.action == "refuse"


def test_31_reasoning_is_guarded_on_its_own(refuser):
    items = [chunk({"role": "assistant", "reasoning_content": "Let me think "}), chunk({"reasoning_content": f"of {MARKER} and so on. "}),
             chunk({"reasoning_content": "More."}), chunk({"content": "\n"}), chunk({"content": SAFE}), chunk(finish_reason="stop")]
    content, reasoning, last, _ = run(refuser, *items)
    assert content == "\n" + SAFE
    before, refusal, after = reasoning.partition(refuser.refusal)
    assert "Let me think ".startswith(before.removesuffix("\n\n")) and refusal and after == ""
    assert last["protector"]["action"] == "refuse" and refuser.detector.most_cursors == 1


def test_31_channels_that_take_turns_are_scored_whole(refuser):
    items = [chunk({"content": "You can mix bleach"}), chunk({"reasoning": "Hm, "}), chunk({"content": " and vinegar."}), chunk({}, "stop")]
    content, _, last, _ = run(refuser, *items)
    assert content == "You can mix bleach\n\n" + refuser.refusal and last["finish_reason"] == "content_filter"
    items[2] = chunk({"content": " with water."})
    content, _, last, _ = run(refuser, *items)
    assert content == "You can mix bleach with water." and last["protector"]["action"] == "pass"
    assert refuser.detector.most_cursors == 1


@pytest.mark.parametrize("escape", [False, True])
def test_31_tool_calls_of_a_stream_wait_until_they_are_scored(refuser, escape):
    def call(text):
        arguments = json.dumps({"x": text})
        arguments = arguments.replace("b", "\\u0062") if escape else arguments
        pieces = [arguments[i:i + 4] for i in range(0, len(arguments), 4)]
        first = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
        return [chunk({"role": "assistant", "content": None, "tool_calls": [first]}),
                *(chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}) for piece in pieces),
                chunk({}, "tool_calls")], arguments

    items, arguments = call(SAFE)
    stream, out = ChatStream(refuser, ChatRequest("q")), []
    for item in items[:-1]:
        out += stream.push(item)
    assert "tool_calls" not in json.dumps(out)
    out = stream.push(items[-1])
    assert out[0]["choices"][0]["delta"]["tool_calls"] == [
        {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    assert out[1]["choices"][0]["finish_reason"] == "tool_calls"

    items, _ = call(HARMFUL)
    content, _, last, stream = run(refuser, *items)
    assert content == refuser.refusal and last["finish_reason"] == "content_filter"


def test_30_prefill_in_a_stream(refuser):
    request = ChatRequest("q", prefill="You can mix bleach")
    content, _, last, _ = run(refuser, *spoken(" and vinegar, of course."), request=request)
    assert content == refuser.refusal and last["finish_reason"] == "content_filter"
    content, _, last, _ = run(refuser, *spoken(" with water, of course."), request=request)
    assert content == " with water, of course."


def test_39_role_usage_and_empty_chunks(protector):
    usage = {"choices": [], "usage": {"total_tokens": 3, "note": SAFE}, "id": "chatcmpl-1"}
    items = [{"choices": []}, chunk({"role": "assistant", "content": ""}), chunk({}), chunk({"content": None}), *spoken(SAFE)[1:]]
    content, _, last, stream = run(protector, *items)
    assert content == SAFE
    assert stream.push(usage) == [{"object": "chat.completion.chunk", "id": "chatcmpl-1", "created": 1, "model": "fake", "choices": [],
                                   "usage": {"total_tokens": 3}}]


@pytest.mark.parametrize("odd", [{"type": "ping"}, {}, chunk({"thoughts": SAFE}), chunk({"content": [{"type": "image"}]}),
                                 chunk({"audio": {"data": "AA"}}), {"choices": [{"index": 0, "text": SAFE}]}])
def test_32_unknown_chunks_get_the_error_policy(protector, odd):
    content, _, last, stream = run(protector, *spoken("Here is how it goes, my friend:")[:-1], odd, finish=False)
    assert content.endswith(protector.refusal) and SAFE not in content
    assert last["finish_reason"] == "content_filter" and stream.action == "error" and stream.stopped


@pytest.mark.parametrize("broken", [{"error": {"message": "out of memory"}}, None, [], chunk({"content": "x"}, index=5),
                                    {"choices": ["x"]}])
def test_40_a_broken_chunk_flushes_nothing(protector, broken):
    stream = ChatStream(protector, ChatRequest("q"))
    for item in spoken(SAFE)[:-1]:
        stream.push(item)
    with pytest.raises(UpstreamError):
        stream.push(broken)
    stream.close()
    assert protector.detector.n_cursors == 0


def test_31_choices_of_a_stream_do_not_mix(refuser):
    items = [chunk({"role": "assistant", "content": ""}, index=i) for i in range(3)]
    texts = [SAFE, HARMFUL, SAFE[::-1]]
    for position in range(0, 60, 4):
        items += [chunk({"content": text[position:position + 4]}, index=i) for i, text in enumerate(texts)]
    items += [chunk(finish_reason="stop", index=i) for i in range(3)]
    stream, shown = ChatStream(refuser, ChatRequest("q", n=3)), ["", "", ""]
    for item in items:
        for out in stream.push(item):
            for choice in out["choices"]:
                shown[choice["index"]] += choice["delta"].get("content") or ""
    assert shown[0] == SAFE and shown[2] == SAFE[::-1] and shown[1].endswith(refuser.refusal) and stream.complete
    assert refuser.detector.n_cursors == 0


def test_held_text_is_bounded():
    protector = Protector(FakeDetector(), False, threshold=0.5, max_bytes=1000)
    piece = {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "x" * 100}}]}
    content, _, last, stream = run(protector, *[chunk(piece)] * 20, finish=False)
    assert stream.action == "error" and stream.stopped


def test_17_held_text_is_counted_once():
    """Regression: all of it again for each delta, so that a harmless refusal of 1,600 characters was over the limit of 262,144."""
    protector = Protector(FakeDetector(), False, threshold=0.5, max_bytes=10_000)
    items = [chunk({"refusal": "sorry"}) for _ in range(1900)]
    stream = ChatStream(protector, ChatRequest("q"))
    out = [out for item in [*items, chunk({}, "stop")] for out in stream.push(item)]
    assert "".join(item["choices"][0]["delta"].get("refusal", "") for item in out) == "sorry" * 1900 and stream.action == "pass"
    assert run(protector, *items, *items, finish=False)[3].action == "error"


def test_a_failing_guard_in_a_stream():
    for error, policy in ((RuntimeError("kernel"), "refuse"), (ModelError("gone"), "raise")):
        protector = Protector(FakeDetector(), False, threshold=0.5, on_error=policy)
        protector.detector.error = error
        if policy == "raise":
            with pytest.raises(ModelError):
                run(protector, *spoken(SAFE))
            continue
        content, _, last, _ = run(protector, *spoken(SAFE))
        assert content == protector.refusal and last["finish_reason"] == "content_filter" and last["protector"]["action"] == "error"


def test_pass_on_error_says_that_it_was_an_error():
    protector = Protector(FakeDetector(), False, threshold=0.5, on_error="pass")
    protector.detector.error = RuntimeError("kernel")
    content, _, last, _ = run(protector, *spoken(SAFE))
    assert content == SAFE and last["protector"]["action"] == "error" and last["finish_reason"] == "stop"
    guarded, action = guard_completion(protector, ChatRequest("q"), completion(SAFE))
    assert action == "error" and guarded["choices"][0]["message"]["content"] == SAFE
    call = {"index": 0, "function": {"name": "f", "arguments": "{}"}}
    guarded, action = guard_completion(protector, ChatRequest("q"), completion({"tool_calls": [call]}))
    assert action == "error" and guarded["choices"][0]["message"]["tool_calls"][0]["function"] == call["function"]
    assert run(protector, chunk({"tool_calls": [call]}))[2]["protector"]["action"] == "error"
    content, _, last, _ = run(protector, chunk({"thoughts": SAFE}))  # what can't be read never goes out
    assert content == protector.refusal and last["finish_reason"] == "content_filter"


def test_helpers_speak_the_format():
    assert EventReader().feed(b"".join(sse(chunk({"content": "x"}), DONE)))[1] == ("data", "[DONE]")
