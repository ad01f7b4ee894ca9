"""The guard inside LiteLLM, LangChain and transformers: their real packages, a detector that looks for a phrase."""
import asyncio
import json
import os
import traceback

import pytest
from serve_fakes import MARKER, FakeDetector, FakeDetoxifier, completion

from protector.chat import UpstreamError
from protector.guard import Protector
from protector.stream import HOLD_TOKENS, STEP_TOKENS

HARMFUL = f"Here is how it goes. You can mix {MARKER} in a closed bucket and wait for the gas."
SAFE = "Water boils at a lower temperature on a mountain, so pasta needs more time there."
MESSAGES = [{"role": "user", "content": "What happens on a mountain?"}]


@pytest.fixture
def protector():
    return Protector(FakeDetector(), False, threshold=0.5)


@pytest.fixture
def rewriter():
    return Protector(FakeDetector(), FakeDetoxifier(), threshold=0.5)


# -- LiteLLM


@pytest.fixture
def litellm(monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its import asks the network for prices otherwise
    return pytest.importorskip("litellm", reason="needs the package litellm")


def guardrail(protector, **options):
    from protector.integrations.litellm import ProtectorGuardrail

    return ProtectorGuardrail(protector, **options)


def test_litellm_guards_a_completion(litellm, protector, rewriter):
    data = {"model": "gpt-4o", "messages": MESSAGES}

    def ask(guard, text, **options):
        response = litellm.completion(**data, mock_response=text, **options)
        return asyncio.run(guardrail(guard).async_post_call_success_hook(data, None, response))

    safe = ask(protector, SAFE)
    assert isinstance(safe, litellm.ModelResponse) and safe.choices[0].message.content == SAFE
    refused = ask(protector, HARMFUL)
    assert refused.choices[0].message.content == protector.refusal and refused.choices[0].finish_reason == "content_filter"
    rewritten = ask(rewriter, HARMFUL)
    assert rewritten.choices[0].message.content == "Please keep the two apart." and MARKER not in str(rewritten)
    assert rewritten.choices[0].protector["action"] == "rewrite" and rewritten.usage.total_tokens > 0


def test_litellm_tool_calls_and_unknown_parts(litellm, protector):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": HARMFUL})}}
    hook = guardrail(protector).async_post_call_success_hook
    response = litellm.ModelResponse(**completion({"role": "assistant", "content": None, "tool_calls": [call]}))
    guarded = asyncio.run(hook({"messages": MESSAGES}, None, response))
    assert guarded.choices[0].message.content == protector.refusal and not guarded.choices[0].message.tool_calls
    call["function"]["arguments"] = '{"x": 1}'
    response = litellm.ModelResponse(**completion({"role": "assistant", "content": None, "tool_calls": [call]}))
    guarded = asyncio.run(hook({"messages": MESSAGES}, None, response))
    assert guarded.choices[0].message.tool_calls[0].function.arguments == '{"x": 1}'
    with pytest.raises(UpstreamError):
        asyncio.run(hook({"messages": MESSAGES}, None, litellm.TextCompletionResponse()))
    embedding = litellm.EmbeddingResponse()
    assert asyncio.run(hook({"input": "x"}, None, embedding)) is embedding


def test_litellm_guards_a_stream(litellm, protector):
    async def ask(text):
        data = {"model": "gpt-4o", "messages": MESSAGES, "stream": True}
        response = await litellm.acompletion(**data, mock_response=text)
        hook = guardrail(protector).async_post_call_streaming_iterator_hook
        return [chunk async for chunk in hook(None, response, data)]

    chunks = asyncio.run(ask(SAFE))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAFE
    assert chunks[-1].choices[0].finish_reason == "stop"
    chunks = asyncio.run(ask(HARMFUL))
    shown = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert MARKER not in shown and shown.endswith(protector.refusal)
    assert chunks[-1].choices[0].finish_reason == "content_filter" and protector.detector.n_cursors == 0


def test_litellm_usage_of_a_stream_comes_once(litellm, protector):
    async def ask():
        data = {"model": "gpt-4o", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
        response = await litellm.acompletion(**data, mock_response=SAFE)
        hook = guardrail(protector).async_post_call_streaming_iterator_hook
        return [chunk async for chunk in hook(None, response, data)]

    chunks = asyncio.run(ask())
    assert [chunk.usage.total_tokens > 0 for chunk in chunks if getattr(chunk, "usage", None)] == [True]
    assert {chunk.model for chunk in chunks} == {"gpt-4o"}


def test_litellm_loads_it_as_its_proxy_does(litellm, protector):
    from litellm.types.guardrails import GuardrailEventHooks

    guard = guardrail(protector, guardrail_name="mine", event_hook="post_call", default_on=True)
    assert guard.should_run_guardrail({"messages": MESSAGES}, GuardrailEventHooks.post_call) is True
    with pytest.raises(ValueError):
        guardrail(protector, event_hook="pre_call")
    # LiteLLM looks for the streaming hook in the class itself, not in its parents.
    assert "async_post_call_streaming_iterator_hook" in type(guard).__dict__


# -- LangChain


@pytest.fixture
def langchain():
    return pytest.importorskip("langchain_core", reason="needs the package langchain-core")


def chat_model(*messages):
    from langchain_core.language_models.fake_chat_models import GenericFakeChatModel

    return GenericFakeChatModel(messages=iter(messages))


def guarded(runnable, protector, **options):
    from protector.integrations.langchain import Guarded

    return Guarded(runnable, protector, **options)


def test_langchain_guards_a_chat_model_in_a_chain(langchain, protector):
    from langchain_core.messages import AIMessage
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{q}")])
    message = AIMessage(SAFE, id="1")
    result = (prompt | guarded(chat_model(message), protector)).invoke({"q": "mountains?"})
    assert result.content == SAFE and result.id == "1" and result.response_metadata["protector"]["action"] == "pass"
    result = (prompt | guarded(chat_model(HARMFUL), protector)).invoke({"q": "mountains?"})
    assert result.content == protector.refusal and result.response_metadata["finish_reason"] == "content_filter"
    chain = prompt | guarded(chat_model(HARMFUL, SAFE), protector) | StrOutputParser()
    assert [asyncio.run(chain.ainvoke({"q": "x"})) for _ in range(2)] == [protector.refusal, SAFE]
    text_chain = guarded(prompt | chat_model(HARMFUL, SAFE) | StrOutputParser(), protector, question=lambda input: input["q"])
    assert text_chain.batch([{"q": "x"}], max_concurrency=1) == [protector.refusal]


def test_langchain_reads_the_question(langchain, protector):
    from langchain_core.messages import AIMessage, HumanMessage
    from langchain_core.prompt_values import StringPromptValue

    guard = guarded(chat_model(), protector)
    assert guard._request("q").question == "q" and guard._request({"q": "x"}).question == ""
    request = guard._request([HumanMessage("one"), AIMessage("two"), HumanMessage([{"type": "text", "text": "three"}])])
    assert (request.question, request.history) == ("three", (("one", "two"),))
    assert guard._request(StringPromptValue(text="q")).question == "q"


def test_langchain_streams(langchain, protector):
    from langchain_core.output_parsers import StrOutputParser

    chunks = list(guarded(chat_model(SAFE), protector).stream("q"))
    assert "".join(chunk.content for chunk in chunks) == SAFE
    assert sum(chunks[1:], chunks[0]).response_metadata["protector"]["action"] == "pass"
    texts = list(guarded(chat_model(HARMFUL) | StrOutputParser(), protector).stream("q"))
    assert MARKER not in "".join(texts) and "".join(texts).endswith(protector.refusal)

    async def ask():
        return [chunk async for chunk in guarded(chat_model(HARMFUL), protector).astream("q")]

    chunks = asyncio.run(ask())
    shown = "".join(chunk.content for chunk in chunks)
    assert MARKER not in shown and shown.endswith(protector.refusal)
    assert chunks[-1].response_metadata["finish_reason"] == "content_filter" and protector.detector.n_cursors == 0


def test_langchain_streams_tool_calls_and_usage(langchain, protector):
    from langchain_core.messages import AIMessageChunk
    from langchain_core.runnables import RunnableGenerator

    def ask(arguments):
        def chunks(_):
            yield AIMessageChunk("", tool_call_chunks=[{"index": 0, "id": "1", "name": "f", "args": "", "type": "tool_call_chunk"}])
            for start in range(0, len(arguments), 5):
                piece = {"index": 0, "id": None, "name": None, "args": arguments[start:start + 5], "type": "tool_call_chunk"}
                yield AIMessageChunk("", tool_call_chunks=[piece])
            yield AIMessageChunk("", usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3})

        parts = list(guarded(RunnableGenerator(chunks), protector).stream("q"))
        return sum(parts[1:], parts[0])

    whole = ask('{"city": "Bern"}')
    assert whole.tool_calls == [{"name": "f", "args": {"city": "Bern"}, "id": "1", "type": "tool_call"}]
    assert whole.usage_metadata["total_tokens"] == 3
    whole = ask(json.dumps({"x": HARMFUL}))
    assert whole.tool_calls == [] and whole.content == protector.refusal


def test_langchain_streams_keep_their_id_and_why_they_ended(langchain, protector):
    """Regression: "stop" and no id, whatever the model said; usage comes behind the reason."""
    from langchain_core.messages import AIMessageChunk
    from langchain_core.runnables import RunnableGenerator

    def chunks(_):
        yield AIMessageChunk(SAFE, id="run-1")
        yield AIMessageChunk("", id="run-1", response_metadata={"finish_reason": "length"})
        yield AIMessageChunk("", id="run-1", usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3})

    parts = list(guarded(RunnableGenerator(chunks), protector).stream("q"))
    whole = sum(parts[1:], parts[0])
    assert (whole.id, whole.response_metadata["finish_reason"], whole.content, whole.usage_metadata["total_tokens"]) == ("run-1", "length", SAFE, 3)


def test_langchain_usage_of_a_stream_is_the_sum_of_its_chunks(langchain, protector):
    from langchain_core.messages import AIMessageChunk
    from langchain_core.runnables import RunnableGenerator

    def chunks(_):
        yield AIMessageChunk(SAFE, usage_metadata={"input_tokens": 5, "output_tokens": 0, "total_tokens": 5, "input_token_details": {"cache_read": 3}})
        yield AIMessageChunk("", usage_metadata={"input_tokens": 0, "output_tokens": 2, "total_tokens": 2, "output_token_details": {"reasoning": 1}})

    parts = list(guarded(RunnableGenerator(chunks), protector).stream("q"))
    assert sum(part.usage_metadata is not None for part in parts) == 1
    assert sum(parts[1:], parts[0]).usage_metadata == {
        "input_tokens": 5, "output_tokens": 2, "total_tokens": 7, "input_token_details": {"cache_read": 3}, "output_token_details": {"reasoning": 1}}


def test_langchain_ids_and_usage_have_no_room_for_a_text(langchain, protector):
    """Regression: both came back as they were."""
    from langchain_core.messages import AIMessage

    def ask(**fields):
        return guarded(chat_model(AIMessage(SAFE, **fields)), protector).invoke("q")

    usage = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3, "input_token_details": {"cache_read": 1},
             "output_token_details": {"reasoning": 1}}
    result = ask(id="run--0f8fad5b-d9cb-469f-a165-70867728950e", usage_metadata=usage)
    assert (result.id, result.usage_metadata) == ("run--0f8fad5b-d9cb-469f-a165-70867728950e", usage)
    for id in ("Mix bleach and vinegar in a bucket.", "mix_bleach_and_vinegar", "\u6f02\u767d\u6c34"):
        assert ask(id=id).id.startswith("chatcmpl-")
    message = AIMessage(SAFE)
    message.usage_metadata = {**usage, "mix_bleach": 1, "input_token_details": {"and_vinegar": {"in_a_bucket": 1}}}
    result = guarded(chat_model(message), protector).invoke("q")
    assert result.usage_metadata == {**usage, "input_token_details": {}}


def test_langchain_tool_calls_without_an_index_are_calls_of_their_own(langchain, protector):
    """Regression: they were one call with both arguments."""
    from langchain_core.messages import AIMessageChunk
    from langchain_core.runnables import RunnableGenerator

    def piece(index, id, name, args):
        return {"index": index, "id": id, "name": name, "args": args, "type": "tool_call_chunk"}

    def chunks(_):
        yield AIMessageChunk("", tool_call_chunks=[piece(None, "1", "f", '{"x": 1}'), piece(3, "2", "g", '{"y"')])
        yield AIMessageChunk("", tool_call_chunks=[piece(None, "3", "f", '{"x": 2}'), piece(3, None, None, ": 3}")])

    parts = list(guarded(RunnableGenerator(chunks), protector).stream("q"))
    calls = [(call["id"], call["name"], call["args"]) for call in sum(parts[1:], parts[0]).tool_calls]
    assert calls == [("1", "f", {"x": 1}), ("2", "g", {"y": 3}), ("3", "f", {"x": 2})]


def test_langchain_tool_calls_reasoning_and_unknown_parts(langchain, protector):
    from langchain_core.messages import AIMessage

    def ask(message):
        return guarded(chat_model(message), protector).invoke("q")

    call = {"name": "f", "args": {"x": "é"}, "id": "1", "type": "tool_call"}
    assert ask(AIMessage("", tool_calls=[call])).tool_calls == [call]
    refused = ask(AIMessage("", tool_calls=[{**call, "args": {"x": HARMFUL}}]))
    assert refused.tool_calls == [] and refused.content == protector.refusal
    assert MARKER not in str(ask(AIMessage(SAFE, additional_kwargs={"reasoning_content": HARMFUL})))
    assert ask(AIMessage([{"type": "text", "text": SAFE, "index": 0}])).content[0]["text"] == SAFE
    for odd in (AIMessage([{"type": "image", "url": "data:,"}]), AIMessage([{"type": "thinking", "thinking": SAFE}]),
                AIMessage(SAFE, additional_kwargs={"parsed": {"x": SAFE}}),
                AIMessage("", invalid_tool_calls=[{"name": "f", "args": HARMFUL, "id": "1", "error": None, "type": "invalid_tool_call"}])):
        result = ask(odd)
        assert result.content == protector.refusal and result.response_metadata["protector"]["action"] == "error"
    from langchain_core.runnables import RunnableLambda

    with pytest.raises(TypeError, match="must be a str or an AIMessage, got dict"):
        guarded(RunnableLambda(lambda _: {"text": HARMFUL}), protector).invoke("q")


def test_langchain_gives_back_what_was_scored_and_nothing_else(langchain, protector):
    from langchain_core.messages import AIMessage

    def ask(content, **fields):
        return guarded(chat_model(AIMessage(content, **fields)), protector).invoke("q")

    call = {"name": "f", "args": {"x": 1}, "id": "1", "type": "tool_call"}
    usage = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
    for content in (SAFE, [{"type": "text", "text": SAFE}], "", []):
        plain = ask(content, id="1", usage_metadata=usage, tool_calls=[call], response_metadata={"finish_reason": "length"})
        assert (plain.content, plain.id, plain.usage_metadata, plain.tool_calls) == (content, "1", usage, [call])
        assert plain.response_metadata == {"finish_reason": "length", "protector": {"action": "pass", "flagged": False}}
    for fields in ({"additional_kwargs": {"thinking_blocks": [{"thinking": HARMFUL}]}}, {"additional_kwargs": {"annotations": [HARMFUL]}},
                   {"additional_kwargs": {"provider_specific_fields": {"x": HARMFUL}}}, {"response_metadata": {"logprobs": [HARMFUL]}},
                   {"own": HARMFUL}, {"tool_calls": [{**call, "extras": HARMFUL}]}):
        result = ask(SAFE, **fields)
        assert result.content == SAFE and MARKER not in repr(result)
    cited = ask([{"type": "text", "text": SAFE, "citations": [{"cited_text": HARMFUL}]}])
    assert cited.content == [{"type": "text", "text": SAFE}]
    function = {"function_call": {"name": "f", "arguments": HARMFUL}}
    assert ask("", additional_kwargs=function).content == protector.refusal
    assert MARKER not in repr(ask("", tool_calls=[call], additional_kwargs=function))
    # Two blocks are shown as one text, so they are scored as one.
    head, tail = HARMFUL[:HARMFUL.index("egar")], HARMFUL[HARMFUL.index("egar"):]
    for blocks in ([head, tail], [{"type": "text", "text": head}, {"type": "text", "text": tail}]):
        assert ask(blocks).content == protector.refusal


@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
def test_langchain_callbacks_see_guarded_text_alone(langchain, protector):
    from langchain_core.callbacks import BaseCallbackHandler
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.runnables import Runnable

    class Heard(BaseCallbackHandler):
        def __init__(self):
            self.text = ""

        def on_chain_end(self, outputs, **_):
            self.text += repr(outputs)

        def on_llm_new_token(self, token, **_):
            self.text += token

        def on_llm_end(self, response, **_):
            self.text += repr(response)

    class Careless(Runnable):
        """Gives no config to the model that it calls, which then looks for one in the context."""

        def invoke(self, input, config=None, **kwargs):
            return model().invoke(input)

        def stream(self, input, config=None, **kwargs):
            yield from model().stream(input)

        async def astream(self, input, config=None, **kwargs):
            async for chunk in model().astream(input):
                yield chunk

    def model():
        return chat_model(HARMFUL)

    async def events(runnable):
        return [event async for event in runnable.astream_events("q", version="v2")]

    async def log(runnable):
        return [patch async for patch in runnable.astream_log("q")]

    async def stream(runnable, config):
        return [chunk async for chunk in runnable.astream("q", config)]

    end = MARKER.split()[-1]  # the model streams words
    for make in (lambda: guarded(model(), protector), lambda: guarded(model(), protector) | StrOutputParser(),
                 lambda: guarded(Careless(), protector) | StrOutputParser()):
        seen = asyncio.run(events(make()))
        assert end not in str(seen)
        shown = [event["data"]["chunk"] for event in seen if event["event"] == "on_chain_stream" and event["name"] == "Guarded"]
        assert "".join(chunk.content for chunk in shown).endswith(protector.refusal)
        assert end not in str(asyncio.run(log(make())))
        heard = Heard()
        config = {"callbacks": [heard]}
        make().invoke("q", config)
        list(make().stream("q", config))
        asyncio.run(make().ainvoke("q", config))
        asyncio.run(stream(make(), config))
        assert heard.text.count(protector.refusal) >= 4 and end not in heard.text


def test_langchain_closes_what_a_caller_leaves(langchain, protector):
    from langchain_core.messages import AIMessageChunk
    from langchain_core.runnables import Runnable

    closed = []

    class Endless(Runnable):
        def invoke(self, input, config=None, **kwargs):
            raise NotImplementedError

        def stream(self, input, config=None, **kwargs):
            try:
                while True:
                    yield AIMessageChunk(SAFE + " ")
            finally:
                closed.append("stream")

        async def astream(self, input, config=None, **kwargs):
            try:
                while True:
                    yield AIMessageChunk(SAFE + " ")
            finally:
                closed.append("astream")

    chunks = guarded(Endless(), protector).stream("q")
    while not next(chunks).content:
        pass
    chunks.close()
    assert closed == ["stream"] and protector.detector.n_cursors == 0

    async def leave():
        chunks = guarded(Endless(), protector).astream("q")
        while not (await anext(chunks)).content:
            pass
        await chunks.aclose()

    asyncio.run(leave())
    assert closed == ["stream", "astream"] and protector.detector.n_cursors == 0


def test_langchain_errors_hold_no_text(langchain, protector):
    from langchain_core.messages import HumanMessage
    from langchain_core.runnables import RunnableLambda

    secret = "my grandmother's number is 0451 22 98 17"
    rule = (r"^Guarded: input must be messages that OpenAI's format can say, got another message or part\. "
            r"Give question, a function of the input\.$")
    for odd in (HumanMessage([{"type": "image", "caption": secret}]), {"content": secret}, (secret, secret)):
        with pytest.raises(ValueError, match=rule) as caught:
            guarded(RunnableLambda(lambda _: SAFE), protector).invoke([odd])
        assert secret not in "".join(traceback.format_exception(caught.value))


# -- transformers


class _Bytes:
    """Bytes as tokens; 0 is padding and 1 the end."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(int(token) - 2 for token in ids if token > 1).decode("utf-8", "replace")

    def encode(self, text):
        return [byte + 2 for byte in text.encode()]


@pytest.fixture
def generate():
    """A tiny random causal LM that is made to say given texts, one per row, through transformers' real generate()."""
    torch = pytest.importorskip("torch", reason="needs the package torch (extra train)")
    transformers = pytest.importorskip("transformers", reason="needs the package transformers (extra train)")
    config = transformers.LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    model = transformers.LlamaForCausalLM(config).eval()

    class Say(transformers.LogitsProcessor):
        def __init__(self, texts, prompt_tokens):
            self.ids, self.prompt_tokens = [_Bytes().encode(text) + [1] for text in texts], prompt_tokens

        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -1e9)
            for row, ids in enumerate(self.ids):
                position = input_ids.shape[1] - self.prompt_tokens
                forced[row, ids[position] if position < len(ids) else 1] = 0
            return forced

    def run(criteria, texts, prompt="Question?"):
        ids = torch.tensor([_Bytes().encode(prompt)] * len(texts))
        return model.generate(ids, max_new_tokens=200, do_sample=False, stopping_criteria=transformers.StoppingCriteriaList([criteria]),
                              logits_processor=transformers.LogitsProcessorList([Say(texts, ids.shape[1])]))[:, ids.shape[1]:]

    return run


def criteria(protector, n_rows=1, prompt="Question?"):
    from protector.integrations.transformers import HarmStoppingCriteria

    return HarmStoppingCriteria(protector, _Bytes(), len(prompt), [prompt] * n_rows)


def test_transformers_stops_at_the_alarm(generate, protector):
    stop = criteria(protector)
    text = HARMFUL + " And then some more words that nobody should spend time on."
    ids = generate(stop, [text])
    written = _Bytes().decode(ids[0])
    end = text.index(MARKER) + len(MARKER)
    assert text.startswith(written) and end <= len(written) <= end + HOLD_TOKENS + STEP_TOKENS  # the alarm needs a word's end, and a step's
    verdict = stop.verdicts()[0]
    assert verdict.action == "refuse" and verdict.text == protector.refusal and protector.detector.n_cursors == 0


def test_transformers_lets_safe_rows_end(generate, protector):
    texts = [SAFE, HARMFUL, "Crème brûlée 👩‍👧 ist süß."]
    stop = criteria(protector, 3)
    ids = generate(stop, texts)
    assert [verdict.action for verdict in stop.verdicts()] == ["pass", "refuse", "pass"]
    assert [stop.verdicts()[row].text for row in (0, 2)] == [texts[0], texts[2]]
    assert _Bytes().decode(ids[0]) == SAFE and protector.detector.n_cursors == 0


def test_transformers_wants_a_question_per_row(generate, protector):
    with pytest.raises(ValueError, match="must have a row per question, got 2 rows and 1 questions"):
        generate(criteria(protector), [SAFE, SAFE])
    stop = criteria(protector)
    stop.close()
    assert protector.detector.n_cursors == 0


def test_integrations_are_not_imported_with_the_package():
    import subprocess
    import sys

    code = "import sys, protector, protector.chat; print([m for m in ('litellm', 'langchain_core', 'transformers', 'starlette') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ).stdout
    assert output.strip() == "[]"
