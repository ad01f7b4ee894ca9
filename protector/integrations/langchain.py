"""LangChain: any Runnable that answers (a chat model, a chain, a parser), guarded.

    chain = prompt | Guarded(ChatOpenAI(...))
"""
import asyncio

from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_openai_messages
from langchain_core.runnables import Runnable

from ..chat import ChatRequest, ChatStream, guard_completion, read_request

_ROLE = {"role": "assistant"}


class Guarded(Runnable):
    """A Runnable whose output, a str or an AIMessage, is guarded; invoke, stream, batch and their async forms.

    A message's `response_metadata["protector"]` says what was done. An output of another type is a TypeError.

    Args:
        runnable: the Runnable to guard.
        protector: guard.Protector; the default one, loaded at the first answer, if None.
        question: function of the input that returns the question; None reads a str, messages or a prompt value, and
            scores the answer alone for any other input.
        hold: scored tokens of a stream that are still held back.
    """

    def __init__(self, runnable, protector=None, question=None, hold=8):
        self.runnable, self._protector, self.question, self.hold = runnable, protector, question, hold

    def invoke(self, input, config=None, **kwargs):
        """The guarded output."""
        return self._guard(input, self.runnable.invoke(input, config, **kwargs))

    async def ainvoke(self, input, config=None, **kwargs):
        """The guarded output; scoring runs in a thread."""
        return await asyncio.to_thread(self._guard, input, await self.runnable.ainvoke(input, config, **kwargs))

    def stream(self, input, config=None, **kwargs):
        """Guarded chunks; the runnable's stream is closed once nothing more of it can be shown."""
        state, chunks, is_text = self._open(input), self.runnable.stream(input, config, **kwargs), None
        try:
            for chunk in chunks:
                is_text = isinstance(chunk, str)
                for event in _as_events(chunk):
                    yield from _chunks(state.push(event), is_text)
                if state.stopped:
                    return
            if is_text is not None:
                yield from _chunks(state.finish(), is_text)
        finally:
            state.close()
            if hasattr(chunks, "close"):
                chunks.close()

    async def astream(self, input, config=None, **kwargs):
        """stream(), with scoring in a thread."""
        state = await asyncio.to_thread(self._open, input)
        chunks, is_text = self.runnable.astream(input, config, **kwargs), None
        try:
            async for chunk in chunks:
                is_text = isinstance(chunk, str)
                for event in _as_events(chunk):
                    for guarded in _chunks(await asyncio.to_thread(state.push, event), is_text):
                        yield guarded
                if state.stopped:
                    return
            if is_text is not None:
                for guarded in _chunks(await asyncio.to_thread(state.finish), is_text):
                    yield guarded
        finally:
            await asyncio.to_thread(state.close)
            if hasattr(chunks, "aclose"):
                await chunks.aclose()

    def _loaded(self):
        if self._protector is None:
            from .. import _shared

            self._protector = _shared()
        return self._protector

    def _open(self, input):
        return ChatStream(self._loaded(), self._request(input), self.hold)

    def _request(self, input):
        if self.question is not None:
            return ChatRequest(self.question(input))
        if isinstance(input, str):
            return ChatRequest(input)
        messages = input.to_messages() if hasattr(input, "to_messages") else input
        if not isinstance(messages, (list, tuple)) or not messages:
            return ChatRequest()
        return read_request({"messages": convert_to_openai_messages(list(messages))})

    def _guard(self, input, output):
        protector, request = self._loaded(), self._request(input)
        if isinstance(output, str):
            return protector.guard(request.question, request.prefill + output, request.history).text.removeprefix(request.prefill)
        completion = {"choices": [{"index": 0, "message": _as_message(output)}]}
        choice = guard_completion(protector, request, completion)[0]["choices"][0]
        metadata = {"protector": choice["protector"]}
        if choice["protector"]["action"] == "pass":
            return output.model_copy(update={"response_metadata": output.response_metadata | metadata})
        message = choice["message"]
        calls = output.tool_calls if message.get("tool_calls") else []
        extra = {key: message[key] for key in ("reasoning_content", "reasoning", "refusal") if message.get(key)}
        if choice["finish_reason"]:
            metadata["finish_reason"] = choice["finish_reason"]
        return AIMessage(message["content"] or "", tool_calls=calls, id=output.id, additional_kwargs=extra,
                         usage_metadata=output.usage_metadata, response_metadata=metadata)


def _as_message(output):
    """An AIMessage as OpenAI's; None for content that LangChain itself can't put so."""
    if not isinstance(output, AIMessage):
        raise TypeError(f"Guarded: output must be a str or an AIMessage, got {type(output).__name__}.")
    try:
        message = convert_to_openai_messages(output)
    except ValueError:
        return None
    extra = {key: value for key, value in output.additional_kwargs.items() if key not in ("tool_calls", "function_call")}
    if output.invalid_tool_calls:  # arguments that are no JSON
        extra["invalid_tool_calls"] = True
    return {**extra, **message, "content": _plain(message.get("content"))}


def _plain(content):
    """Text parts without the index that some providers give them."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    return [{key: value for key, value in part.items() if key != "index"} for part in parts]


def _as_events(chunk):
    """A chunk of text or of a message as chunks of a streamed completion."""
    if isinstance(chunk, str):
        return [{"choices": [{"index": 0, "delta": {**_ROLE, "content": chunk}}]}]
    if not isinstance(chunk, AIMessageChunk):
        raise TypeError(f"Guarded: chunk must be a str or an AIMessageChunk, got {type(chunk).__name__}.")
    delta = {key: value for key, value in chunk.additional_kwargs.items() if key not in ("tool_calls", "function_call")}
    delta |= {**_ROLE, "content": _plain(chunk.content)}
    if chunk.tool_call_chunks:
        delta["tool_calls"] = [{"index": call.get("index") or 0, "id": call.get("id"), "type": "function",
                                "function": {"name": call.get("name"), "arguments": call.get("args") or ""}}
                               for call in chunk.tool_call_chunks]
    usage = [{"choices": [], "usage": dict(chunk.usage_metadata)}] if chunk.usage_metadata else []
    return [{"choices": [{"index": 0, "delta": delta}]}, *usage]


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
            yield AIMessageChunk(delta.get("content") or "", tool_call_chunks=calls, additional_kwargs=extra,
                                 response_metadata=metadata)
        if event.get("usage") and not is_text:
            yield AIMessageChunk("", usage_metadata=event["usage"])
