"""LangChain: any Runnable that answers (a chat model, a chain, a parser), guarded.

    chain = prompt | Guarded(ChatOpenAI(...))
"""
import asyncio

from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_openai_messages
from langchain_core.messages.ai import add_usage
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import var_child_runnable_config

from .. import _shared
from ..chat import BadRequest, ChatRequest, ChatStream, guard_completion, read_request
from ..guard import HOLD_TOKENS

_ROLE = {"role": "assistant"}


class Guarded(Runnable):
    """A Runnable whose output, a str or an AIMessage, is guarded; invoke, stream, batch and their async forms.

    A message comes back with what was scored (content, tool calls, reasoning, refusal), its id (another one where it could be a
    sentence), the known numbers of its usage, which a stream has at its end, and its finish reason, and nothing else that it held;
    `response_metadata["protector"]` says what was done. An output of another type is a TypeError.

    The caller's callbacks, and so astream_events and astream_log, see one run with the guarded chunks, and nothing inside it.
    Unguarded text is seen by what LangChain adds to every run (tracing, set_debug, collect_runs) and by callbacks that the
    runnable itself was made with.

    Args:
        runnable: the Runnable to guard.
        protector: guard.Protector; the default one, loaded at the first answer, if None.
        question: function of the input that returns the question; None reads a str, messages or a prompt value, and
            scores the answer alone for any other input.
        hold: scored tokens of a stream that are still held back.
    """

    def __init__(self, runnable, protector=None, question=None, hold=HOLD_TOKENS):
        self.runnable, self._protector, self.question, self.hold = runnable, protector, question, hold

    def invoke(self, input, config=None, **kwargs):
        """The guarded output."""
        return self._call_with_config(self._invoke, input, config, **kwargs)

    async def ainvoke(self, input, config=None, **kwargs):
        """The guarded output; scoring runs in a thread."""
        return await self._acall_with_config(self._ainvoke, input, config, **kwargs)

    def stream(self, input, config=None, **kwargs):
        """Guarded chunks; the runnable's stream is closed once nothing more of it can be shown."""
        return self._transform_stream_with_config(iter([input]), self._stream, config, **kwargs)

    def astream(self, input, config=None, **kwargs):
        """stream(), with scoring in a thread."""
        async def inputs():
            yield input

        return self._atransform_stream_with_config(inputs(), self._astream, config, **kwargs)

    def _invoke(self, input, config, **kwargs):
        return self._guard(input, self.runnable.invoke(input, _unheard(config), **kwargs))

    async def _ainvoke(self, input, config, **kwargs):
        return await asyncio.to_thread(self._guard, input, await self.runnable.ainvoke(input, _unheard(config), **kwargs))

    def _stream(self, inputs, config, **kwargs):
        [input] = inputs
        state, chunks, is_text, reader = self._open(input), self.runnable.stream(input, _unheard(config), **kwargs), None, _Reader()
        try:
            for chunk in chunks:
                is_text = isinstance(chunk, str)
                yield from _chunks(state.push(reader.event(chunk)), is_text)
                if state.stopped:
                    return
            if is_text is not None:
                yield from _chunks(state.push(reader.end()) + state.finish(), is_text)
        finally:
            state.close()
            if hasattr(chunks, "close"):
                chunks.close()

    async def _astream(self, inputs, config, **kwargs):
        [input] = [input async for input in inputs]
        state = await asyncio.to_thread(self._open, input)
        chunks, is_text, reader = self.runnable.astream(input, _unheard(config), **kwargs), None, _Reader()
        try:
            async for chunk in chunks:
                is_text = isinstance(chunk, str)
                for guarded in _chunks(await asyncio.to_thread(state.push, reader.event(chunk)), is_text):
                    yield guarded
                if state.stopped:
                    return
            if is_text is not None:
                for guarded in _chunks(await asyncio.to_thread(lambda: state.push(reader.end()) + state.finish()), is_text):
                    yield guarded
        finally:
            await asyncio.to_thread(state.close)
            if hasattr(chunks, "aclose"):
                await chunks.aclose()

    def _open(self, input):
        return ChatStream(self._protector or _shared(), self._request(input), self.hold)

    def _request(self, input):
        if self.question is not None:
            return ChatRequest(self.question(input))
        if isinstance(input, str):
            return ChatRequest(input)
        messages = input.to_messages() if hasattr(input, "to_messages") else input
        if not isinstance(messages, (list, tuple)) or not messages:
            return ChatRequest()
        try:
            return read_request({"messages": convert_to_openai_messages(list(messages))})
        except ValueError:  # LangChain's quotes the part
            raise BadRequest("Guarded: input must be messages that OpenAI's format can say, got another message or part. "
                             "Give question, a function of the input.") from None

    def _guard(self, input, output):
        protector, request = self._protector or _shared(), self._request(input)
        if isinstance(output, str):
            return protector.guard(request.question, request.prefill + output, request.history).text.removeprefix(request.prefill)
        choice = {"message": _as_message(output), "finish_reason": output.response_metadata.get("finish_reason")}
        response = {"id": output.id, "usage": output.usage_metadata, "choices": [choice]}
        guarded, _ = guard_completion(protector, request, response)
        [choice] = guarded["choices"]
        message = choice["message"]
        calls = output.tool_calls if message.get("tool_calls") else []
        extra = {key: message[key] for key in ("reasoning_content", "reasoning", "refusal") if message.get(key)}
        metadata = {key: choice[key] for key in ("finish_reason", "protector") if choice[key]}
        return AIMessage(message["content"], tool_calls=calls, id=guarded.get("id"), additional_kwargs=extra,
                         usage_metadata=guarded.get("usage"), response_metadata=metadata)


def _unheard(config):
    """The config without the caller's callbacks, also in the context: there a Runnable that gets no config looks for them."""
    config = config | {"callbacks": []}
    var_child_runnable_config.set(config)  # only here: LangChain runs _invoke and the others in a copy of the context
    return config


def _as_message(output):
    """An AIMessage as OpenAI's; None for content that LangChain itself can't put so."""
    if not isinstance(output, AIMessage):
        raise TypeError(f"Guarded: output must be a str or an AIMessage, got {type(output).__name__}.")
    try:
        # As text, LangChain would join blocks with newlines, which the shown text hasn't.
        message = convert_to_openai_messages(output, text_format="block" if isinstance(output.content, list) else "string")
    except ValueError:
        return None
    extra = {key: value for key, value in output.additional_kwargs.items() if key != "tool_calls"}
    if output.invalid_tool_calls:  # arguments that are no JSON
        extra["invalid_tool_calls"] = True
    return {**extra, **message}


def _plain(content):
    """Text parts without the index that some providers give them."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    return [{key: value for key, value in part.items() if key != "index"} for part in parts]


class _Reader:
    """Chunks of text or of messages as chunks of a streamed completion."""

    def __init__(self):
        self._calls = {}  # index of a tool call -> its number
        self._usage = None  # LangChain adds up what chunks tell of it; the guard takes the last
        self._reason = None  # why the answer ended; usage may come behind it

    def event(self, chunk):
        if isinstance(chunk, str):
            return {"choices": [{"index": 0, "delta": {**_ROLE, "content": chunk}}]}
        if not isinstance(chunk, AIMessageChunk):
            raise TypeError(f"Guarded: chunk must be a str or an AIMessageChunk, got {type(chunk).__name__}.")
        delta = {key: value for key, value in chunk.additional_kwargs.items() if key != "tool_calls"}
        delta |= {**_ROLE, "content": _plain(chunk.content)}
        if chunk.tool_call_chunks:
            delta["tool_calls"] = [{"index": self._calls.setdefault(_index(call), len(self._calls)), "id": call.get("id"), "type": "function",
                                    "function": {"name": call.get("name"), "arguments": call.get("args") or ""}}
                                   for call in chunk.tool_call_chunks]
        if chunk.usage_metadata:
            self._usage = add_usage(self._usage, chunk.usage_metadata)
        self._reason = chunk.response_metadata.get("finish_reason") or self._reason
        return {"id": chunk.id, "choices": [{"index": 0, "delta": delta}], "usage": self._usage}

    def end(self):
        """The chunk behind the last one."""
        return {"choices": [{"index": 0, "delta": {}, "finish_reason": self._reason}]}


def _index(call):
    return object() if call.get("index") is None else call["index"]  # without one, LangChain never joins a piece to another


def _chunks(events, is_text):
    """Guarded chunks in the form that the guarded Runnable speaks."""
    for event in events:
        for choice in event["choices"]:
            delta = choice["delta"]
            if is_text:
                if delta.get("content"):
                    yield delta["content"]
                continue
            calls = [{"index": call["index"], "id": call.get("id"), "name": call["function"]["name"],
                      "args": call["function"]["arguments"], "type": "tool_call_chunk"} for call in delta.get("tool_calls", [])]
            extra = {key: delta[key] for key in ("reasoning_content", "reasoning", "refusal") if delta.get(key)}
            metadata = {key: choice[key] for key in ("finish_reason", "protector") if choice.get(key)}
            yield AIMessageChunk(delta.get("content") or "", tool_call_chunks=calls, additional_kwargs=extra, id=event.get("id"),
                                 response_metadata=metadata)
        if event.get("usage") and not is_text:
            yield AIMessageChunk("", usage_metadata=event["usage"], id=event.get("id"))
