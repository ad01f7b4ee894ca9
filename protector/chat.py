"""OpenAI's chat format: which text of a request is the question, and every text of an answer through the guard.

    request     question = texts of the user since the last answer; history = earlier (user, assistant) pairs;
                prefill = an assistant message at the end: it is scored in front of what the model adds to it
    answer      content, reasoning                       guarded as they stream, each on its own; reasoning_content is the latter's other name
                refusal, tool calls                      held until the choice ends, then scored whole; so are names that say something
                                                         by themselves, all names and ids together, and all arguments together
                what stands around the choices           numbers and short names that say nothing; in a stream those that came first
                logprobs and other extras                dropped, for they could show unscored text, and listed
                anything else                            the error policy

The texts of a whole answer share one deadline; in a stream each text has its own, and what is held until the end shares one.

Nothing here waits or does I/O: the server and the integrations run these functions in threads.
"""
import hashlib
import json
import logging
import math
import re
from dataclasses import dataclass, field

from .errors import ProtectorError
from .guard import HOLD_TOKENS, _checked
from .normalise import normalised
from .stream import StreamGuard, _deadline

logger = logging.getLogger("protector")
ACTIONS = ("pass", "rewrite", "refuse", "error")  # from the mildest
MAX_EVENT_BYTES = 1 << 20  # of one server-sent event
MAX_MODEL_CHARS = 200  # of a request's model, which may be said in each chunk of the answer
BEGUN = 4  # choices whose question is read ahead: an upstream may never send the others
MAX_CALLS = 128  # tool calls of one choice; all they say together has at most the guard's max_bytes
_STREAMED = ("reasoning", "content")  # channels; the others wait for the end
# Field -> channel. Servers name the reasoning one way or the other, or both ways, and clients show it in one box.
_CHANNELS = {"content": "content", "reasoning": "reasoning", "reasoning_content": "reasoning", "refusal": "refusal"}
_ENVELOPE = ("id", "created", "model", "system_fingerprint", "service_tier")
_FINISH_REASONS = ("stop", "length", "tool_calls", "function_call", "content_filter", "abort", "error", "eos_token", "stop_sequence", "end_turn",
                   "max_tokens", "tool_use", "STOP", "MAX_TOKENS")
# Of OpenAI, vLLM, llama.cpp, DeepSeek, Anthropic, LiteLLM and LangChain. A key of the upstream's own choice would be text.
_USAGE = frozenset("""
    prompt_tokens completion_tokens total_tokens prompt_tokens_details completion_tokens_details cached_tokens cache_write_tokens
    reasoning_tokens audio_tokens text_tokens image_tokens video_tokens accepted_prediction_tokens rejected_prediction_tokens
    prompt_cache_hit_tokens prompt_cache_miss_tokens cache_creation_tokens cache_creation_input_tokens cache_read_input_tokens
    input_tokens output_tokens input_tokens_details output_tokens_details input_token_details output_token_details
    audio reasoning cache_read cache_creation ephemeral_5m_input_tokens ephemeral_1h_input_tokens
""".split())
_DROPPED = frozenset("""
    logprobs prompt_logprobs prompt_token_ids token_ids kv_transfer_params timings stop_reason matched_stop native_finish_reason
    provider citations prompt_filter_results content_filter_results
""".split())  # known fields that are left out; "other" stands for the rest
_REPEATS = ("annotations", "provider_specific_fields", "reasoning_details", "thinking_blocks")  # of other fields' text, or notes on it
_CALL_NOTES = {"provider_specific_fields", "extra_content"}  # signatures that some servers put into a tool call; left out
_NOTES = {"index", "finish_reason", "logprobs", "content_filter_results", "content_filter_offsets"}  # a chunk of these alone says nothing
_CALL_TEXTS = (("function", "arguments"), ("custom", "input"))  # kind of a tool call, and its field with text
_NAME = re.compile(r"[A-Za-z0-9_.:/@+-]{0,96}")  # what a server writes around the choices
# Names and ids of tool calls, which a model may write. OpenAI takes [A-Za-z0-9_-]{1,64} only, but other servers pass on what MCP
# allows: dots, slashes, 128 characters. That has room for a sentence, so what looks like one is scored.
_CALL_NAME = re.compile(r"[A-Za-z0-9_.:/@+-]{0,128}")
_SPEAKS = re.compile(r"[A-Za-z]+(?:[^A-Za-z0-9]+[A-Za-z]+){3}|[A-Za-z]{20}")  # four words, or twenty letters in a row
_BORDERS = re.compile(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])")  # between the words of a name
_SIGNS = re.compile(r"[^A-Za-z0-9]+")  # likewise, where digits stand for letters
_ID_START = re.compile(r"^(?:call|tooluse|toolu|chatcmpl-tool|fc)[_-]+")  # of ids that servers make at random
_HEX_ID = re.compile(r"[0-9a-f-]*")
_WORD = re.compile(r"(?=[A-Za-z]{0,3}[aeiouyAEIOUY])(?:[A-Za-z][a-z]{3}|[A-Z]{4})")  # two in five random ids of 24 signs have none
_ESCAPES = re.compile(r'(?:\\(?:u[0-9A-Fa-f]{4}|["\\/bfnrt]))+')  # of JSON; a run, because two make one letter beyond U+FFFF


class BadRequest(ProtectorError, ValueError):
    """The client's request isn't a chat completion request."""


class UpstreamError(ProtectorError, RuntimeError):
    """The model's server failed or sent what no guard can read."""


class _Unreadable(Exception):
    """A part of an answer that can't be scored."""


@dataclass(frozen=True)
class ChatRequest:
    """What the guard needs of a request."""

    question: str = field(default="", repr=False)
    history: tuple = field(default=(), repr=False)  # earlier (question, answer), oldest first
    prefill: str = field(default="", repr=False)  # start of the answer, given by the client
    n: int = 1  # choices
    stream: bool = False
    model: str = field(default="", repr=False)  # shown where the upstream's name for it could be a sentence


@dataclass
class _Parts:
    """A message or a delta, read."""

    texts: dict = field(default_factory=dict)  # channel -> text
    values: dict = field(default_factory=dict)  # channel -> as it came: a str or text parts
    names: dict = field(default_factory=dict)  # channel -> fields that hold its text
    calls: list = field(default_factory=list)  # tool calls, or pieces of them
    dropped: set = field(default_factory=set)


def read_request(payload, max_choices=8):
    """The question, the earlier turns and the form of a chat completion request.

    Args:
        payload: the request's JSON.
        max_choices: largest `n`.
    Returns:
        ChatRequest
    Raises:
        BadRequest: it isn't one; the message holds no text of it.
    Example:
        read_request({"messages": [{"role": "user", "content": "Hi"}]}).question  # 'Hi'
    """
    if not isinstance(payload, dict):
        raise BadRequest("chat: body must be a JSON object.")
    messages, n, stream = payload.get("messages"), payload.get("n"), payload.get("stream")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("chat: messages must be a list with at least one message.")
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= max_choices):
        raise BadRequest(f"chat: n must be an integer from 1 to {max_choices}.")
    if stream is not None and not isinstance(stream, bool):
        raise BadRequest("chat: stream must be true or false.")
    _check_case(payload, "messages", "n", "stream")
    asked, is_answered, history, prefill = [], False, [], ""  # asked: texts of the user since the last answer
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest("chat: each message must be an object with a role.")
        _check_case(message, "role", "content")
        text = _request_text(message.get("content"))
        if message["role"] == "user":
            if is_answered:
                asked, is_answered = [], False
            asked.append(text)
        elif message["role"] == "assistant" and position == len(messages) - 1:
            prefill = text
        elif message["role"] == "assistant" and text:  # without text it is no answer that could part two questions
            history.append((_joined(asked), text))
            is_answered = True
    model = payload.get("model")
    return ChatRequest(_joined(asked), tuple(history), prefill, n or 1, bool(stream),
                       model if isinstance(model, str) and len(model) <= MAX_MODEL_CHARS else "")


def _joined(texts):
    return "\n".join(filter(None, texts))


def _check_case(fields, *names):
    """Refuse fields that some readers take for these: Go's encoding/json matches names without case, and the last one wins."""
    for key in fields:
        if key not in names and key.casefold() in names:
            raise BadRequest(f"chat: field {key.casefold()} must be written in lower case.")


def _request_text(content):
    """Text of a request's message; images and other parts are the model's business."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise BadRequest("chat: content must be a string or a list of parts.")
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise BadRequest("chat: each content part must be an object with a type.")
        _check_case(part, "type", "text")
        if part["type"] in ("text", "input_text"):
            if not isinstance(part.get("text"), str):
                raise BadRequest("chat: a text part must have a text.")
            texts.append(part["text"])
    return _joined(texts)


# -- reading answers


def _read(message):
    """_Parts of a message or a delta; _Unreadable for whatever else might be shown."""
    if not isinstance(message, dict):
        raise _Unreadable
    parts = _Parts()
    for key, value in message.items():
        if key == "role":
            if value not in (None, "", "assistant"):
                raise _Unreadable
        elif key in _CHANNELS:
            if value is not None:
                _read_text(parts, key, value)
        elif value is None or value in ("", [], {}):
            continue
        elif key == "tool_calls":
            if not isinstance(value, list) or len(value) > MAX_CALLS:
                raise _Unreadable
            parts.calls = [_read_call(call, position, parts.dropped) for position, call in enumerate(value)]
        elif key in _REPEATS or key == "function_call" and message.get("tool_calls"):
            parts.dropped.add(key)
        else:
            raise _Unreadable
    return parts


def _read_text(parts, key, value):
    """One channel's text: a second field goes behind the first, unless it says the same."""
    channel, text = _CHANNELS[key], _answer_text(value)
    before = parts.texts.get(channel)
    if not before:
        parts.texts[channel], parts.values[channel], parts.names[channel] = text, value, [key]
    elif text == before:
        parts.names[channel].append(key)
    else:
        parts.texts[channel] = parts.values[channel] = before + text


def _answer_text(value):
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _Unreadable
    for part in value:
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
            raise _Unreadable
        if not isinstance(part["text"], str):
            raise _Unreadable
    return "".join(part["text"] for part in value)


def _read_call(call, position, dropped):
    """A tool call with its known fields only; notes that are left out join `dropped`."""
    if not isinstance(call, dict) or set(call) - {"index", "id", "type", "function", "custom"} - _CALL_NOTES:
        raise _Unreadable
    index, body = position if call.get("index") is None else call["index"], {}
    if not isinstance(index, int) or call.get("type") not in (None, "", "function", "custom"):
        raise _Unreadable
    dropped |= _CALL_NOTES & set(call)
    for kind, text_field in _CALL_TEXTS:
        inner = call.get(kind)
        if inner is None:
            continue
        if not isinstance(inner, dict) or set(inner) - {"name", text_field} - _CALL_NOTES or not isinstance(inner.get(text_field) or "", str):
            raise _Unreadable
        dropped |= _CALL_NOTES & set(inner)
        body[kind] = {"name": _call_name(inner.get("name")), text_field: inner.get(text_field) or ""}
    return {"index": index, "id": _call_id(call.get("id")), "type": call.get("type"), **body}


def _call_id(value):
    """An id, or where it is long or holds signs (LiteLLM puts Gemini's signature there) a digest of it: what a client echoes still pairs."""
    if isinstance(value, str) and not _CALL_NAME.fullmatch(value):
        return "call_" + _digest(value)
    return _call_name(value)


def _digest(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _call_name(value):
    if value is not None and not (isinstance(value, str) and _CALL_NAME.fullmatch(value)):
        raise _Unreadable
    return value


def _n_bytes(call):
    """Bytes of a tool call's text, and one that parts it from the next one's."""
    return 1 + sum(len(call[kind][text_field].encode("utf-8", "surrogatepass")) for kind, text_field in _CALL_TEXTS if kind in call)


def _calls_texts(calls):
    """What tool calls say, in each form that must be scored: arguments or input, again behind names that say something, all of them
    together, all names once, and again where digits stand for letters in them.

    Trap: not only behind them. A harmless name in front hides harm: with "final answer" 20 of the self-test's 40 harmful answers
    were flagged as arguments, without it 25. Nor each name alone: three words of each of many calls are a text.
    """
    scored, all_names, spelled, alone = [], {}, {}, set()
    bodies, all_keys, n_bodies = [], {}, 0  # n_bodies: with words that no earlier one has as a key
    for call in calls:
        texts, body, keys = _unescaped("".join(call[kind][text_field] for kind, text_field in _CALL_TEXTS if kind in call))
        names = [_words(call[kind]["name"] or "") for kind, _ in _CALL_TEXTS if kind in call]
        all_names |= dict.fromkeys(filter(None, [_id_words(call["id"] or ""), *names]))
        spelled |= dict.fromkeys([_id_spelled(call["id"] or ""), *(_spelled(call[kind]["name"] or "") for kind, _ in _CALL_TEXTS if kind in call)])
        # An id as it is: the digits of a random one part no words before its arguments.
        said = _words(" ".join(filter(_SPEAKS.search, [call["id"] or "", *names])))
        alone.add(said)
        scored += texts + [f"{said} {texts[-1]}"] if said else texts
        n_bodies += any(map(str.isalpha, "".join([body, *(key for key in keys if key not in all_keys)])))
        bodies.append(body)
        all_keys |= dict.fromkeys(keys)
    if n_bodies > 1:
        scored.append(_joined([*bodies, *all_keys]))
    joined, spelled = " ".join(all_names), " ".join(filter(None, spelled))
    if _SPEAKS.search(joined) and joined not in alone:
        scored.append(joined)
    view = normalised(spelled)
    return scored + [view] if view != spelled and _SPEAKS.search(view) else scored


def _words(name):
    return _BORDERS.sub(" ", name).strip()


def _id_words(value):
    """The words of an id; none of a random one, which is hexadecimal or has no four letters that could be a word."""
    value = _ID_START.sub("", value)
    return _words(value) if _WORD.search(value) and not _HEX_ID.fullmatch(value) else ""


def _spelled(name):
    return _SIGNS.sub(" ", name).strip()


def _id_spelled(value):
    """An id of four parts or more; a random one has fewer, or is hexadecimal."""
    value = _ID_START.sub("", value)
    return _spelled(value) if len(_SIGNS.split(value)) > 3 and not _HEX_ID.fullmatch(value) else ""


def _strings(text):
    """The strings of JSON in their order, each with whether it is a key; ValueError or RecursionError if it is none."""
    found = []

    def collect(value, is_key=False):
        if isinstance(value, str):
            found.append((value, is_key))
        elif isinstance(value, tuple):  # of an object
            collect(value[0], True)
            collect(value[1])
        elif isinstance(value, list):
            for item in value:
                collect(item)

    collect(json.loads(text, strict=False, object_pairs_hook=list))  # not strict: readers take raw line ends in strings
    return found


def _unescaped(text):
    """(forms to score, what its values say, its keys) of a tool call's text.

    The forms are [text]; where JSON hides letters in escapes, [the strings in it]; where that is broken or cut, [text, text without
    escapes].
    """
    try:
        strings = _strings(text)
    except (ValueError, RecursionError):  # readers may still take what there is of it
        forms = [text, _ESCAPES.sub(lambda match: json.loads(f'"{match[0]}"'), text)] if "\\" in text else [text]
        return forms, forms[-1], []
    forms = ["\n".join(string for string, _ in strings)] if "\\" in text else [text]
    return forms, _joined(string for string, is_key in strings if not is_key), [string for string, is_key in strings if is_key]


def _envelope(response, request, dropped):
    """Fields around the choices: numbers and short names that say nothing; what is left out is listed."""
    kept = {}
    for key, value in response.items():
        if key in ("object", "choices", "usage"):
            continue
        if key in _ENVELOPE and (_is_number(value) or isinstance(value, str) and _NAME.fullmatch(value) and not _speaks(value)):
            kept[key] = value
        elif key == "model" and request.model:
            kept[key] = request.model
        elif key == "id" and isinstance(value, str):
            kept[key] = "chatcmpl-" + _digest(value)
        elif value not in (None, "", [], {}):
            dropped.add(_label(key))
    return kept


def _speaks(name):
    """Whether a name has room for a sentence, its words parted by signs, by digits or not at all."""
    return bool(_SPEAKS.search(name)) or len(_WORD.findall(name)) > 3


def _is_number(value):
    return isinstance(value, (int, float)) and abs(value) < 2 ** 63  # neither NaN nor a number whose digits are a text


def _label(key):
    return key if key in _DROPPED or key in _ENVELOPE else "other"


def _numbers(usage, inner=True):
    """The known numbers of a usage object, and those of objects in it."""
    kept = {key: value for key, value in usage.items() if key in _USAGE and _is_number(value)}
    if inner:
        kept |= {key: _numbers(value, False) for key, value in usage.items() if key in _USAGE and isinstance(value, dict)}
    return kept


def _finish_reason(value):
    return value if value in _FINISH_REASONS else "stop" if value else None


def _unreadable(protector):
    """The error policy for an answer that can't be read; raises if that is the policy. Nothing of the answer goes out."""
    rule = f"chat: an answer must have known parts only, and at most {MAX_CALLS} tool calls of max_bytes together; got another one."
    if protector.on_error == "raise":
        raise UpstreamError(rule)
    logger.error("guard failed: %s", rule)  # whatever the policy is, a refusal goes out
    protector._count("error")


def _worse(first, second):
    return max(first, second, key=ACTIONS.index)


def _note(protector, action, flagged, dropped, score=None):
    """The `protector` field of a choice."""
    note = {"action": action, "flagged": flagged}
    if protector.on_flag == "report" and score is not None and math.isfinite(score):
        note["score"] = score
    if dropped:
        note["dropped"] = sorted(dropped)
    return note


def _guard(protector, request, text, deadline):
    """protector.guard() with a deadline that other texts share."""
    return protector._guard(_checked(request.question, text, request.history), deadline)


def _guard_calls(protector, request, calls, deadline):
    """(whether the calls may go out, action, flagged, score); one bad call is enough: there is no half of what was to be done."""
    kept, action, flagged, score = True, "pass", False, None
    for text in _calls_texts(calls):
        verdict = _guard(protector, request, text, deadline)
        kept = verdict.text == text
        action = _worse(action, verdict.action if kept or verdict.action == "error" else "refuse")
        flagged, score = flagged or verdict.flagged, _larger(score, verdict.score)
        if not kept:
            break
    return kept, action, flagged, score


# -- whole answers


def guard_completion(protector, request, response, check=None):
    """Guard every choice of a chat completion.

    Args:
        protector: guard.Protector.
        request: ChatRequest.
        response: the upstream's JSON.
        check: called between the guard's steps, as a deadline is; raises to stop them.
    Returns:
        (response, action): a new response of known fields, each choice with a `protector` field, and the worst action.
    Raises:
        UpstreamError: it isn't a chat completion. ProtectorError: the guard failed and the policy is to raise.
    """
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not 1 <= len(choices) <= request.n or response.get("error"):
        raise UpstreamError("chat: upstream must send a chat completion with at most n choices, got another answer.")
    dropped, action, guarded = set(), "pass", []
    envelope = {"object": "chat.completion", **_envelope(response, request, dropped)}
    for position, choice in enumerate(choices):
        guarded.append(_guard_choice(protector, request, choice, position, dropped, check))
        action = _worse(action, guarded[-1]["protector"]["action"])
    usage = {"usage": _numbers(response["usage"])} if isinstance(response.get("usage"), dict) else {}
    return {**envelope, "choices": guarded, **usage}, action


def _guard_choice(protector, request, choice, position, dropped, check):
    refused = {"role": "assistant", "content": protector.refusal}
    choice = choice if isinstance(choice, dict) else {}
    index = choice.get("index")
    index = index if type(index) is int and 0 <= index < request.n else position  # any number has room for a text in its digits
    dropped = dropped | {_label(key) for key, value in choice.items()
                         if key not in ("index", "message", "finish_reason") and value not in (None, "", [], {})}
    try:
        parts = _read(choice.get("message"))
        if sum(map(_n_bytes, parts.calls)) > protector.max_bytes:
            raise _Unreadable
    except _Unreadable:
        _unreadable(protector)
        return {"index": index, "message": refused, "finish_reason": "content_filter",
                "protector": _note(protector, "error", False, dropped)}
    dropped |= parts.dropped
    message, action, flagged, filtered, top = {"role": "assistant", "content": None}, "pass", False, False, None
    deadline = _deadline(protector, check)
    for channel, text in parts.texts.items():
        value, views = parts.values[channel], [text]
        if isinstance(value, list) and len(value) > 1:  # clients show parts in a row or as paragraphs
            views.append("\n".join(part["text"] for part in value))
        for view in views:
            whole = (request.prefill if channel == "content" else "") + view
            verdict = _guard(protector, request, whole, deadline)
            kept = verdict.text == whole
            action, flagged, top = _worse(action, verdict.action), flagged or verdict.flagged, _larger(top, verdict.score)
            if not kept:
                break
        filtered = filtered or not kept and verdict.action != "rewrite"
        message |= dict.fromkeys(parts.names[channel], value if kept else verdict.text)
        if channel == "content" and not kept and verdict.action != "rewrite":
            parts.calls = []  # the answer is refused, and what it wanted done with it
    if parts.calls:
        kept, calls_action, calls_flagged, score = _guard_calls(protector, request, parts.calls, deadline)
        action, flagged, top = _worse(action, calls_action), flagged or calls_flagged, _larger(top, score)
        if kept:
            message["tool_calls"] = [{key: value for key, value in call.items() if key != "index" and value is not None}
                                     for call in parts.calls]
        else:
            message, filtered = refused, True
    return {"index": index, "message": message,
            "finish_reason": "content_filter" if filtered else _finish_reason(choice.get("finish_reason")),
            "protector": _note(protector, action, flagged, dropped, top)}


def _larger(first, second):
    return second if first is None or second > first else first


# -- streams


class EventReader:
    """Server-sent events from bytes, however they are cut.

    Example:
        EventReader().feed(b": ping\\n\\ndata: {}\\n\\n")  # [('comment', ''), ('data', '{}')]
    """

    def __init__(self):
        self._parts, self._n_bytes = [], 0  # of the line under way
        self._data, self._n_data, self._event = [], 0, ""  # n_data: characters with their line ends, for a line may be empty

    def feed(self, data):
        """Events that are whole now: ("comment", ""), ("data", text) or ("unknown", "")."""
        *lines, rest = data.split(b"\n")
        events = []
        for line in lines:
            line, self._parts, self._n_bytes = b"".join([*self._parts, line]), [], 0
            events += self._line(line.removesuffix(b"\r"))
        if rest:
            self._parts.append(rest)
            self._n_bytes += len(rest)
        if self._n_bytes + self._n_data > MAX_EVENT_BYTES:
            raise UpstreamError(f"chat: an upstream event must have at most {MAX_EVENT_BYTES} bytes.")
        return events

    def end(self):
        """What the last bytes hold; a server may leave out the last empty line."""
        return self.feed(b"\n\n") if self._parts or self._data else []

    def _line(self, line):
        try:
            line = line.decode()
        except UnicodeDecodeError:
            raise UpstreamError("chat: upstream events must be UTF-8.") from None
        if not line:
            data, event, self._data, self._n_data, self._event = "\n".join(self._data), self._event, [], 0, ""
            if event not in ("", "message"):
                return [("unknown", "")]
            return [("data", data)] if data else []
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "":
            return [("comment", "")]
        if name == "data":
            self._data.append(value)
            self._n_data += len(value) + 1
        elif name == "event":
            self._event = value
        elif name not in ("id", "retry"):
            return [("unknown", "")]
        return []


class ChatStream:
    """Guards a streamed chat completion: begin if its first chunk is still to come, push the upstream's chunks, then finish.

    A choice has one channel open at a time, so one cursor; text of a channel that comes back after another one had its
    turn waits for the end, where the whole channel is scored.

    Args:
        protector: guard.Protector.
        request: ChatRequest.
        hold: scored tokens that are still held back; see stream.StreamGuard.
        check: called between the guard's steps, as a deadline is; raises to stop them.
    """

    def __init__(self, protector, request, hold=HOLD_TOKENS, check=None):
        self.protector, self.request, self.hold, self.check = protector, request, hold, check
        self.choices, self.dropped, self._fields, self._out = {}, set(), {}, []
        self._usage, self._has_usage = {}, False  # the latest, and whether one was sent
        self._begun, self._is_closed = {}, False  # index -> guard of a choice to come

    def begin(self):
        """Read the question while the upstream does, for the first choices: the first text of each then finds it read. Its time starts with that text."""
        for index in range(min(self.request.n, BEGUN)):
            if self._is_closed:
                return
            if index not in self.choices and index not in self._begun:
                guard = self._begun[index] = self._new_guard()
                guard.begin()
                if self._is_closed:  # from another thread, which may not have seen this one
                    guard.close()

    def guard_of(self, index):
        """The guard of a choice's next channel."""
        guard = self._begun.pop(index, None)
        if guard is None:
            return self._new_guard()
        guard.restart_clock()
        return guard

    def _new_guard(self):
        return StreamGuard(self.protector, self.request.question, self.request.history, self.hold, self.check)

    @property
    def stopped(self):
        """Whether nothing more of the upstream can be shown: the guard ended the last of the choices."""
        choices = self.choices.values()
        return len(choices) == self.request.n and all(c.ended for c in choices) and any(c.stopped for c in choices)

    @property
    def complete(self):
        """Whether every choice that began has ended."""
        return bool(self.choices) and all(choice.ended for choice in self.choices.values())

    @property
    def action(self):
        """The worst action so far."""
        return max((choice.action for choice in self.choices.values()), key=ACTIONS.index, default="pass")

    def push(self, chunk):
        """Take one chunk of the upstream (its JSON); returns the chunks to send on.

        Raises:
            UpstreamError: the chunk is an error, or no chunk at all; nothing that is held back leaves.
        """
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise UpstreamError("chat: upstream must send chunks of a chat completion, got an error or another thing.")
        choices, usage = chunk.get("choices"), chunk.get("usage")
        # What came first stays: in fields that change from chunk to chunk there is room for a text. Some first chunks have empty ones.
        self._fields = _envelope(chunk, self.request, self.dropped) | {key: value for key, value in self._fields.items() if value}
        if not isinstance(choices, list) or not choices:
            if not isinstance(usage, dict) and choices != []:
                return self.refuse()
            choices = []
        for choice in choices:
            index = choice.get("index", 0) if isinstance(choice, dict) else None
            if not isinstance(index, int) or not 0 <= index < self.request.n:
                raise UpstreamError("chat: a chunk's choices must be objects with an index below n.")
            if index not in self.choices:
                self.choices[index] = _Choice(self, index)
            self.dropped |= {_label(key) for key, value in choice.items()
                             if key not in ("index", "delta", "finish_reason") and value not in (None, "", [], {})}
            try:
                parts = _read({} if "delta" not in choice and not set(choice) - _NOTES else choice.get("delta"))
                self.dropped |= parts.dropped
                self.choices[index].take(parts, _finish_reason(choice.get("finish_reason")))
            except _Unreadable:
                self.choices[index].refuse()
        if isinstance(usage, dict):
            self._usage = _numbers(usage)
            if self.complete:
                self._send_usage()
        return self._taken()

    def finish(self):
        """The upstream says that it is done: score and release what is left of choices that didn't end.

        Raises:
            UpstreamError: no choice ever began.
        """
        if not self.choices:
            raise UpstreamError("chat: upstream must send at least one choice, got none.")
        for choice in self.choices.values():
            choice.finish("stop")
        self._send_usage()
        return self._taken()

    def refuse(self):
        """End every choice by the error policy: something came that can't be read."""
        for index in range(self.request.n):
            self.choices.setdefault(index, _Choice(self, index)).refuse()
        return self._taken()

    def time_left_s(self):
        """Seconds until the first open guard's deadline; infinite without one."""
        left_s = [choice.guard.time_left_s() for choice in self.choices.values() if choice.guard and not choice.ended]
        return max(min((seconds for seconds in left_s if seconds is not None), default=math.inf), 0.0)

    def expire(self):
        """End every choice by the error policy: the deadline passed while the upstream was silent."""
        for choice in self.choices.values():
            if choice.guard and not choice.ended:
                choice._show(choice.channel, choice.guard.expire())
            choice.refuse()
        return self._taken()

    def close(self):
        """Free the cursors; safe to call at any time, and twice."""
        self._is_closed = True
        for part in (*self.choices.values(), *self._begun.values()):
            part.close()

    def _send_usage(self):
        """Once: with the chunk that ends the answer, or after it."""
        if self._usage and not self._has_usage:
            if not self._out:
                self._send({"choices": []})
            self._out[-1]["usage"], self._has_usage = self._usage, True

    def _send(self, fields):
        self._out.append({"object": "chat.completion.chunk", **self._fields, **fields})

    def _taken(self):
        out, self._out = self._out, []
        return out


class _Choice:
    """One choice of a streamed completion."""

    def __init__(self, stream, index):
        self.stream, self.index, self.protector = stream, index, stream.protector
        self.channel, self.guard = None, None  # the open channel and its guard
        self.scored = {}  # channel -> text that a finished guard let through
        self.held = {}  # channel -> texts that wait for the end
        self.names = {}  # channel -> fields that its text goes out in, those of its first text
        self.calls = {}  # index -> tool call so far
        self.replaced, self.visible, self.skip, self.n_held = set(), set(), 0, 0
        self.action, self.flagged, self.filtered, self.score = "pass", False, False, None
        self.ended, self.stopped, self.has_role = False, False, False

    def take(self, parts, finish_reason):
        if self.ended:
            return
        if not self.has_role:
            self._delta({})
        for channel, text in parts.texts.items():
            if text and not self.ended:
                self.names.setdefault(channel, parts.names[channel])
                self._text(channel, text)
        for call in parts.calls:
            self._call(call)
        if finish_reason:
            self.finish(finish_reason)

    def _text(self, channel, text):
        if channel in self.replaced:
            return
        if channel == self.channel:
            return self._show(channel, self.guard.push(text))
        self.held.setdefault(channel, []).append(text)
        # A guard opens at the first text that isn't white space: newlines between two channels aren't a turn.
        if channel not in _STREAMED or channel in self.scored or not text.strip():
            return self._hold(len(text))
        text = "".join(self.held.pop(channel))
        self._close_channel()
        if self.ended:
            return
        request = self.stream.request
        self.channel, self.guard = channel, self.stream.guard_of(self.index)
        if channel == "content":
            self.skip = len(request.prefill)
            text = request.prefill + text
        self._show(channel, self.guard.push(text))

    def _call(self, piece):
        if self.ended:
            return
        if piece["index"] not in self.calls and len(self.calls) == MAX_CALLS:
            return self.refuse()
        call = self.calls.setdefault(piece["index"], {"index": piece["index"], "id": None, "type": None})
        for key in ("id", "type"):
            call[key] = call[key] or piece[key]
        for kind, text_field in _CALL_TEXTS:
            if kind in piece:
                inner = call.setdefault(kind, {"name": None, text_field: ""})
                if piece[kind]["name"] not in (None, "", inner["name"]):  # a piece, as clients join them; some servers say the whole again
                    inner["name"] = _call_name((inner["name"] or "") + piece[kind]["name"])
                inner[text_field] += piece[kind][text_field]
        self._hold(_n_bytes(piece))

    def _hold(self, n):
        """Count what waits for the end, characters or bytes: an upstream can't make it grow without bound."""
        self.n_held += n
        if self.n_held > self.protector.max_bytes:
            self.refuse()

    def _show(self, channel, events):
        for event in events:
            verdict = event.verdict
            is_unguarded = verdict is not None and verdict.action == "error" and self.protector.on_error == "pass"
            if verdict is None and not self.guard.done:
                self._release(channel, event.text)
            elif verdict is not None and (verdict.action == "pass" or is_unguarded):
                self.action = _worse(self.action, verdict.action)
                self.flagged, self.score = self.flagged or verdict.flagged, _larger(self.score, verdict.score)
                self._release(channel, event.text)
            else:
                action = "refuse" if verdict is None else verdict.action
                self._replace(channel, action, verdict.text if action == "rewrite" else self.protector.refusal)
                return

    def _release(self, channel, text):
        """Send scored text; a prefill, which the client has, is left out."""
        if channel == "content" and self.skip:
            text, self.skip = text[self.skip:], max(self.skip - len(text), 0)
        if text:
            self.visible.add(channel)
            self._say(channel, text)

    def _replace(self, channel, action, text):
        self.action, self.flagged = _worse(self.action, action), self.flagged or action != "error"
        self.filtered = self.filtered or action != "rewrite"
        self.replaced.add(channel)
        self._say(channel, ("\n\n" if channel in self.visible else "") + text)
        if channel == "content" or action == "error":
            self._end(None)

    def _close_channel(self):
        if self.guard is None:
            return
        channel, guard = self.channel, self.guard
        self._show(channel, guard.finish())
        self.scored[channel] = guard.text
        self.channel, self.guard = None, None

    def finish(self, reason):
        """Score what is held back, send it, and end the choice."""
        if self.ended:
            return
        self._close_channel()
        request, deadline = self.stream.request, _deadline(self.protector, self.stream.check)
        for channel, texts in self.held.items():
            if self.ended or channel in self.replaced:
                continue
            text = "".join(texts)
            whole = self.scored.get(channel, "") + text
            verdict = _guard(self.protector, request, whole, deadline)
            self.score = _larger(self.score, verdict.score)
            if verdict.text == whole:
                self.action, self.flagged = _worse(self.action, verdict.action), self.flagged or verdict.flagged
                self._release(channel, text)
            else:
                self._replace(channel, verdict.action, verdict.text)
        if self.calls and not self.ended:
            kept, action, flagged, score = _guard_calls(self.protector, request, self.calls.values(), deadline)
            self.flagged, self.score = self.flagged or flagged, _larger(self.score, score)
            if kept:
                self.action = _worse(self.action, action)
                self._delta({"tool_calls": [{key: value for key, value in {**call, "index": position}.items() if value is not None}
                                            for position, call in enumerate(self.calls.values())]})
            else:
                self._replace("content", action, self.protector.refusal)
        self._end(reason)

    def refuse(self):
        """End this choice by the error policy."""
        if not self.ended:
            _unreadable(self.protector)
            self._replace("content", "error", self.protector.refusal)

    def _end(self, reason):
        if self.ended:
            return
        self.ended, self.stopped = True, reason is None
        self.close()
        if unused := self.stream._begun.pop(self.index, None):  # no text came
            unused.close()
        reason = "content_filter" if self.filtered else reason or "stop"
        note = _note(self.protector, self.action, self.flagged, self.stream.dropped, self.score)
        self.stream._send({"choices": [{"index": self.index, "delta": {}, "finish_reason": reason, "protector": note}]})

    def _say(self, channel, text):
        self._delta(dict.fromkeys(self.names.get(channel, [channel]), text))

    def _delta(self, delta):
        if not self.has_role:
            delta, self.has_role = {"role": "assistant", "content": "", **delta}, True
        self.stream._send({"choices": [{"index": self.index, "delta": delta, "finish_reason": None}]})

    def close(self):
        if self.guard is not None:
            self.guard.close()
