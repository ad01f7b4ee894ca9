"""LiteLLM: a custom guardrail that guards what models answer.

In the proxy's configuration:

    guardrails:
      - guardrail_name: protector
        litellm_params: {guardrail: protector.integrations.litellm.ProtectorGuardrail, mode: post_call, default_on: true}
"""
import asyncio

from litellm import EmbeddingResponse, ModelResponse
from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.types.guardrails import GuardrailEventHooks
from litellm.types.utils import ModelResponseStream

from .. import _shared
from ..chat import ChatStream, UpstreamError, guard_completion, read_request
from ..guard import HOLD_TOKENS

MAX_CHOICES = 128  # OpenAI's own limit


class ProtectorGuardrail(CustomGuardrail):
    """Guards chat completions, streamed or not; any other kind of answer but embeddings is refused.

    Args:
        protector: guard.Protector; the default one, loaded at the first answer, if None.
        hold: scored tokens of a stream that are still held back.
        options: of CustomGuardrail, as LiteLLM passes them.
    """

    def __init__(self, protector=None, hold=HOLD_TOKENS, **options):
        options.setdefault("guardrail_name", "protector")
        options.setdefault("event_hook", GuardrailEventHooks.post_call)
        options.setdefault("supported_event_hooks", [GuardrailEventHooks.post_call])
        super().__init__(**options)
        self._protector, self.hold = protector, hold

    async def async_post_call_success_hook(self, data, user_api_key_dict, response):
        """A whole answer: returns the guarded one."""
        if isinstance(response, EmbeddingResponse):
            return response
        if not isinstance(response, ModelResponse):
            raise UpstreamError("litellm: answer must be a chat completion, got another kind. Guard it where it is read.")

        def guard():
            request = read_request(data, MAX_CHOICES)
            return guard_completion(self._protector or _shared(), request, response.model_dump())[0]

        guarded = ModelResponse(**await asyncio.to_thread(guard))
        guarded._hidden_params = response._hidden_params  # what LiteLLM itself notes of a call
        return guarded

    async def async_post_call_streaming_iterator_hook(self, user_api_key_dict, response, request_data):
        """A streamed answer: yields guarded chunks; the upstream is closed once nothing more of it can be shown."""
        state = None
        try:
            request = read_request(request_data, MAX_CHOICES)
            state = ChatStream(self._protector or await asyncio.to_thread(_shared), request, self.hold)
            await asyncio.to_thread(state.begin)
            async for chunk in response:
                fields = chunk.model_dump() if isinstance(chunk, ModelResponseStream) else None
                for guarded in await asyncio.to_thread(state.push, fields):
                    yield ModelResponseStream(**guarded)
                if state.stopped:
                    return
            if not state.complete:
                raise UpstreamError("litellm: upstream must end its answer, got the end of the stream.")
        finally:
            if state is not None:
                await asyncio.to_thread(state.close)
            if hasattr(response, "aclose"):
                await response.aclose()
