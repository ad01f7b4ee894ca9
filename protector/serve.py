"""An OpenAI-compatible proxy that guards every answer of the model server behind it.

    client -> POST /v1/chat/completions -> limits, token, queue -> upstream -> chat.py -> client
                   /v1/guard, /v1/moderations                   -> Protector
              GET  /health, /ready, /metrics

    protector serve --upstream http://127.0.0.1:8000

The guard runs in threads, so the event loop only moves bytes. A client that leaves and an answer that takes longer than
`answer_s` cancel the request: the upstream connection closes at once, and the thread stops at the guard's next step (between
windows, groups of them and generated tokens), with which its place and the cursor of its stream are free.
No field or header of a request changes a threshold, a policy or what is scored.
"""
import contextlib
import hashlib
import hmac
import json
import logging
import math
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpx
from anyio.from_thread import check_cancelled
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route

from .chat import BadRequest, ChatStream, EventReader, UpstreamError, guard_completion, read_request
from .errors import DeadlineExceeded, ProtectorError
from .guard import HOLD_TOKENS, _checked
from .options import ModelOptions, option, protector_from
from .stream import _deadline, check_streams

logger = logging.getLogger("protector")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_HEADER_BYTES = 16 * 1024
MAX_ANSWER_BYTES = 16 << 20  # of an upstream's whole answer
MAX_ANSWER_VALUES = 2_000_000  # commas in it: 4,096 tokens with 20 top_logprobs each have 0.6 million
# Commas in a request. Trap: json.loads holds the interpreter, and so the event loop: 0.86 s for 16 million numbers, 0.02 s for these,
# 0.03 s for 31 MiB of one image, which has none.
MAX_VALUES = 500_000
MAX_INPUTS = 64  # texts of one moderation request
N_ANSWERS, N_PARSERS = 16, 4  # threads for whole answers, and for requests' bodies; a stream's step needs no place among them
READY_S = 10.0  # the canaries are scored again after this time at the earliest
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class ServeConfig(ModelOptions):
    """Options of `protector serve`; each is a flag of the command line."""

    upstream: str = option("", "URL of an OpenAI-compatible model server, such as http://127.0.0.1:8000")
    host: str = option("127.0.0.1", "address to listen on; outside loopback a token is required")
    port: int = option(8080, "port to listen on")
    token_variable: str = option("PROTECTOR_TOKEN", "environment variable with the bearer token that clients must send")
    upstream_key_variable: str = option("PROTECTOR_UPSTREAM_KEY", "environment variable with the upstream's API key; without "
                                                                   "either variable a client's own key is passed on")
    on_flag: str = option("rewrite", "rewrite, refuse or report")
    on_error: str = option("refuse", "refuse (a 200 with the refusal) or raise (a 503)")
    deadline_ms: float = option(0.0, "for guarding one answer, a streamed one from its first token on; 0 = none but answer_s")
    hold: int = option(HOLD_TOKENS, "scored tokens of a stream that are still held back")
    streams: int = option(8, "choices that stream at one time; more wait")
    requests: int = option(64, "requests under way or waiting; more get 429")
    max_body_bytes: int = option(32 << 20, "largest request, images included")
    timeout_s: float = option(60.0, "longest wait for a request's headers, for its body, for a place, for a client that takes no bytes, and "
                                    "between two bytes of the upstream")
    answer_s: float = option(600.0, "longest time for one request's answer in all: the upstream's, the guard's and the wait for a thread")


class _Refused(Exception):
    """A request that ends with this status; the message holds no text of the request."""

    def __init__(self, status, message, **headers):
        super().__init__(message)
        self.status, self.headers = status, headers


class _ClientGone(Exception):
    pass


def _json(payload, status=200, headers=None):
    """A JSON response; ASCII, so that lone surrogates survive, and no NaN, which isn't JSON."""
    return Response(json.dumps(payload, allow_nan=False), status, headers, "application/json")


def _error(status, message, headers=None):
    kind = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}.get(status, "server_error")
    return _json({"error": {"message": message, "type": kind, "code": None, "param": None}}, status, headers)


def _event(payload):
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload, allow_nan=False).encode()) + b"\n\n"


def _finite(value):
    return value if value is not None and math.isfinite(value) else None


class Metrics:
    """Counters and one latency histogram in Prometheus' text format; labels come from fixed sets, never from a text."""

    def __init__(self):
        self.counts, self._lock = Counter(), threading.Lock()
        self._buckets, self._sum_s = [0] * (len(BUCKETS_S) + 1), 0.0

    def count(self, name, **labels):
        with self._lock:
            self.counts[name, tuple(labels.items())] += 1

    def observe(self, seconds):
        with self._lock:
            self._buckets[sum(seconds > edge for edge in BUCKETS_S)] += 1
            self._sum_s += seconds

    def text(self, gauges, verdicts):
        """The page; gauges: {name: number}, verdicts: the Protector's counters."""
        with self._lock:
            lines, total, last = [], 0, None
            for (name, labels), value in sorted(self.counts.items()):
                lines += [f"# TYPE {name} counter"] if name != last else []
                lines.append(f"{name}{_labels(labels)} {value}")
                last = name
            lines.append("# TYPE protector_verdicts_total counter")
            lines += [f"protector_verdicts_total{_labels([('action', name)])} {n}" for name, n in sorted(verdicts.items())]
            for name, value in gauges.items():
                lines += [f"# TYPE {name} gauge", f"{name} {value}"]
            lines.append("# TYPE protector_guard_seconds histogram")
            for edge, n in zip((*BUCKETS_S, "+Inf"), self._buckets):
                total += n
                lines.append(f'protector_guard_seconds_bucket{{le="{edge}"}} {total}')
            lines += [f"protector_guard_seconds_sum {self._sum_s}", f"protector_guard_seconds_count {total}"]
        return "\n".join(lines) + "\n"


def _labels(pairs):
    return "{" + ",".join(f'{name}="{value}"' for name, value in pairs) + "}" if pairs else ""


def check_detector(protector):
    """Score the detector's canaries.

    Raises:
        ModelError: the scores aren't what they were at export, or aren't numbers.
    """
    from .canaries import check_canaries

    check_canaries(protector.detector)


class Server:
    """What the endpoints share: guard, upstream, limits and counters.

    Args:
        protector: guard.Protector.
        config: ServeConfig.
        token: bearer token that clients must send; None for none.
        upstream_key: the upstream's key; None passes on the client's own, unless there is a token.
        check: called with the protector to see whether it still works; raises if not.
    """

    def __init__(self, protector, config, token=None, upstream_key=None, check=check_detector):
        self.protector, self.config, self.token, self.upstream_key = protector, config, token, upstream_key
        self.metrics, self.n_requests, self.free_streams = Metrics(), 0, config.streams
        self.is_ready, self._checked_s, self._check = False, -math.inf, check
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(config.timeout_s), limits=httpx.Limits(max_connections=None),
            follow_redirects=False, trust_env=False)  # trust_env: a proxy variable must not send answers elsewhere
        self.upstream_url = _upstream_url(config.upstream) if config.upstream else None

    async def start(self):
        # Apart from each other: long answers must keep neither a stream's step nor a bad request waiting.
        self._answers, self._parsers, self._steps = map(anyio.CapacityLimiter, (N_ANSWERS, N_PARSERS, max(self.config.streams, 1)))
        self._checking, self._places = anyio.Lock(), anyio.Condition()
        await self.check()

    async def work(self, limiter, function, *arguments):
        """Run work in a thread of this limiter. A cancelled request waits for the thread: the guard's steps must call check_cancelled."""
        start = time.monotonic()
        try:
            return await anyio.to_thread.run_sync(function, *arguments, limiter=limiter)
        finally:
            self.metrics.observe(time.monotonic() - start)

    async def check(self):
        """Whether the guard is fit to answer; scores the canaries where that is some time ago."""
        async with self._checking:
            if time.monotonic() - self._checked_s >= READY_S:
                try:
                    await anyio.to_thread.run_sync(self._check, self.protector)
                    self.is_ready = True
                except Exception as error:  # whatever it was: not ready
                    logger.error("not ready: %s", type(error).__name__)
                    self.is_ready = False
                self._checked_s = time.monotonic()
        return self.is_ready

    @contextlib.contextmanager
    def admitted(self):
        """A place among the requests under way."""
        if self.n_requests >= self.config.requests:
            raise _Refused(429, "serve: too many requests are under way. Try again later.", **{"retry-after": "1"})
        self.n_requests += 1
        try:
            yield
        finally:
            self.n_requests -= 1

    @contextlib.asynccontextmanager
    async def streams(self, n):
        """Places for n streamed choices, taken all at once: two requests can't wait for each other."""
        try:
            with anyio.fail_after(self.config.timeout_s):
                async with self._places:
                    while self.free_streams < n:
                        await self._places.wait()
                    self.free_streams -= n
        except TimeoutError:
            raise _Refused(429, "serve: too many answers are streaming. Try again later.", **{"retry-after": "1"}) from None
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                async with self._places:
                    self.free_streams += n
                    self._places.notify_all()

    # -- chat

    async def chat(self, body, headers):
        """POST /v1/chat/completions"""
        if self.upstream_url is None:
            raise _Refused(503, "serve: there is no upstream. Start the server with --upstream URL.")
        request = await self.work(self._parsers, lambda: read_request(_parse(body), self.config.streams))
        sent = {"content-type": "application/json", "accept-encoding": "identity",
                "accept": "text/event-stream" if request.stream else "application/json"}
        if self.upstream_key:
            sent["authorization"] = f"Bearer {self.upstream_key}"
        elif self.token is None and headers.get("authorization"):
            sent["authorization"] = headers["authorization"].encode("latin-1")  # as it came; httpx takes a str for ASCII
        if request.stream:
            return lambda scope, receive, send: self._stream_chat(request, body, sent, scope, receive, send)
        async with self._upstream(body, sent) as response:
            answer = bytearray()
            async for part in response.aiter_raw():
                answer += part
                if len(answer) > MAX_ANSWER_BYTES:
                    raise UpstreamError(f"serve: upstream's answer must have at most {MAX_ANSWER_BYTES} bytes.")
        if answer.count(b",") > MAX_ANSWER_VALUES:
            raise UpstreamError(f"serve: upstream's answer must have at most {MAX_ANSWER_VALUES} values.")
        guarded, action = await self.work(self._answers, lambda: guard_completion(self.protector, request, _parse_upstream(answer), check_cancelled))
        self.metrics.count("protector_answers_total", action=action)
        return _json(guarded, headers={"x-protector-action": action})

    @contextlib.asynccontextmanager
    async def _upstream(self, body, headers):
        """The upstream's response to these very bytes, if its status is 200."""
        try:
            async with self.client.stream("POST", self.upstream_url, content=body, headers=headers) as response:
                if 400 <= response.status_code < 500:
                    # Its own message may quote the question.
                    after = response.headers.get("retry-after", "")
                    retry = {"retry-after": after} if after.isascii() and after.isdigit() else {}
                    raise _Refused(response.status_code, f"serve: upstream refused the request with status {response.status_code}.",
                                   **retry)
                if response.status_code != 200:
                    raise UpstreamError(f"serve: upstream must answer with status 200, got {response.status_code}.")
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    # Trap: httpx unpacks any number of layers, each part whole, before its size can be looked at.
                    raise UpstreamError("serve: upstream must not compress its answer, got a content-encoding.")
                yield response
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise UpstreamError(f"serve: upstream must answer, got {type(error).__name__}.") from None

    async def _stream_chat(self, request, body, headers, scope, receive, send):
        """Send a guarded stream; until the first bytes an error is a status, after them an event."""
        state, started = ChatStream(self.protector, request, self.config.hold, check_cancelled), False

        async def show(data):
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            with _limited(self.config.answer_s):
                async with self.streams(request.n), self._upstream(body, headers) as response:
                    if not response.headers.get("content-type", "").startswith("text/event-stream"):
                        raise UpstreamError("serve: upstream must stream server-sent events, got another content type.")
                    await send({"type": "http.response.start", "status": 200, "headers": [
                        (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
                        (b"x-accel-buffering", b"no")]})
                    started = True
                    try:
                        await self.work(self._steps, state.begin)
                        await self._pump(state, response, show)
                    finally:
                        with anyio.CancelScope(shield=True):
                            await anyio.to_thread.run_sync(state.close)
        except Exception as error:
            status, message = self._described(error)
            if not started:
                await _error(status, message, getattr(error, "headers", None))(scope, receive, send)
                return
            await show(_event({"error": {"message": message, "type": "server_error", "code": status}}))
        else:
            self.metrics.count("protector_answers_total", action=state.action)
            await show(_event(b"[DONE]"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, state, response, show):
        """Move events from the upstream through the guard to the client, until all choices have ended."""
        reader, said_done = EventReader(), False
        parts = response.aiter_raw()
        while True:
            with anyio.move_on_after(state.time_left_s()) as waiting:
                data = await anext(parts, None)
            if waiting.cancelled_caught:
                for chunk in await self.work(self._steps, state.expire):
                    await show(_event(chunk))
                return
            if data is None:
                break
            events = reader.feed(data)
            if any(kind == "comment" for kind, _ in events):
                await show(b": keep-alive\n\n")
            said_done, chunks = await self.work(self._steps, _push, state, events)
            for chunk in chunks:
                await show(_event(chunk))
            if said_done or state.stopped:
                return
        _, chunks = await self.work(self._steps, _push, state, reader.end())
        for chunk in chunks:
            await show(_event(chunk))
        if not state.complete:
            raise UpstreamError("serve: upstream must end its answer, got the end of the connection.")

    # -- the guard itself

    async def guard(self, body, headers):
        """POST /v1/guard {"question", "answer", "history"} -> verdict"""
        payload = await self.work(self._parsers, _parse, body)
        if not isinstance(payload, dict) or set(payload) - {"question", "answer", "history"} or "answer" not in payload:
            raise BadRequest("guard: body must be a JSON object with answer and, if wanted, question and history.")
        try:
            item = _checked(payload.get("question"), payload["answer"], payload.get("history"))
        except TypeError:
            raise BadRequest("guard: answer must be a string, question a string or null, history a list of [question, answer].") \
                from None
        verdict = await self.work(self._answers, lambda: self.protector._guard(item, _deadline(self.protector, check_cancelled)))
        self.metrics.count("protector_answers_total", action=verdict.action)
        return _json({"text": verdict.text, "action": verdict.action, "flagged": verdict.flagged, "score": _finite(verdict.score),
                      "threshold": verdict.threshold, "rewrite_score": _finite(verdict.rewrite_score), "usage": verdict.usage,
                      "error": verdict.error}, _status_of(verdict.error), {"x-protector-action": verdict.action})

    async def moderations(self, body, headers):
        """POST /v1/moderations {"input": text or texts}: each scored as an answer without its question"""
        payload = await self.work(self._parsers, _parse, body)
        texts = payload.get("input") if isinstance(payload, dict) else None
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_INPUTS:
            raise BadRequest(f"moderations: input must be a string or a list of 1 to {MAX_INPUTS} strings.")
        if all(isinstance(text, dict) for text in texts):  # OpenAI's parts are one input together
            texts = [_moderation_text(texts)]
        if not all(isinstance(text, str) for text in texts):
            raise BadRequest("moderations: input must hold strings or text parts only; nothing else can be scored.")
        results = []
        for text in texts:
            score, *_ = await self.work(self._answers, lambda: self.protector._score(("", text, ()), _deadline(self.protector, check_cancelled)))
            if not math.isfinite(score):
                raise ProtectorError("moderations: score must be a number, got NaN.")
            flagged = score >= self.protector.thresholds["answer"]
            results.append({"flagged": flagged, "categories": {"harmful": flagged}, "category_scores": {"harmful": score},
                            "category_applied_input_types": {"harmful": ["text"]}})
        return _json({"id": f"modr-{os.urandom(12).hex()}", "model": "mllm-protector", "results": results})

    # -- the state of the server

    async def health(self, request):
        """GET /health: the process is alive"""
        return _json({"status": "alive"})

    async def ready(self, request):
        """GET /ready: the canaries score as they did at export"""
        return _json({"status": "ready"}) if await self.check() else _json({"status": "not ready"}, 503)

    async def metrics_page(self, request):
        """GET /metrics"""
        self.authorise(request.headers)
        gauges = {"protector_ready": int(self.is_ready), "protector_requests_under_way": self.n_requests,
                  "protector_free_streams": self.free_streams}
        return Response(self.metrics.text(gauges, self.protector.counters), media_type="text/plain; version=0.0.4")

    def authorise(self, headers):
        """Refuse a request without the token; the time doesn't tell how much of a guess was right."""
        if self.token is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(_digest(given.strip()), _digest(self.token))
        if not right or scheme.lower() != "bearer":
            raise _Refused(401, "serve: the bearer token is missing or wrong.", **{"www-authenticate": "Bearer"})

    def _described(self, error):
        """(status, message) of an error; nothing but this package's own messages, which hold no text of a user."""
        if isinstance(error, _Refused):
            return error.status, str(error)
        if isinstance(error, BadRequest):
            return 400, str(error)
        if isinstance(error, UpstreamError):
            self.metrics.count("protector_upstream_errors_total")
            return 503, str(error)
        if isinstance(error, ProtectorError):
            return _status_of(str(error)), str(error)
        logger.error("request failed: %s", type(error).__name__)
        return 503, "serve: the guard failed. Nothing was let through."


def _status_of(error):
    """HTTP status of a verdict's error, None for none: an outage is never a 200."""
    return 200 if error is None else 413 if "input_too_long" in error else 503


def _digest(text):
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def _upstream_url(url):
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError("serve: upstream must be a URL such as http://127.0.0.1:8000, got another form.")
    return url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"


@contextlib.contextmanager
def _limited(seconds):
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError as error:
        if isinstance(error, ProtectorError):  # the guard's own deadline
            raise
        raise DeadlineExceeded(f"serve: an answer must end within {seconds} s. Raise answer_s.") from None


def _unique(pairs):
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError  # two readers may take different ones
    return fields


def _not_a_number(_):
    raise ValueError


def _parse(body):
    if body.count(b",") > MAX_VALUES:
        raise BadRequest(f"serve: body must have at most {MAX_VALUES} values.")
    try:
        return json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_not_a_number)
    except (ValueError, RecursionError):
        raise BadRequest("serve: body must be JSON in UTF-8, each field once, without NaN.") from None


def _parse_upstream(data):
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UpstreamError("serve: upstream must answer in JSON.") from None


def _push(state, events):
    """(whether the upstream said that it is done, chunks to send) for some events."""
    chunks = []
    for kind, data in events:
        if kind == "comment":
            continue
        if kind == "unknown":
            chunks += state.refuse()
        elif data.strip() == "[DONE]":
            return True, chunks + state.finish()
        else:
            chunks += state.push(_parse_upstream(data))
        if state.stopped:
            break
    return False, chunks


def _moderation_text(parts):
    texts = [part.get("text") for part in parts if part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("moderations: input must hold strings or text parts only; nothing else can be scored.")
    return "\n".join(texts)


class _Post:
    """A POST endpoint: limits, token, queue and body, then the handler, which is cancelled once the client leaves."""

    def __init__(self, server, path, handler):
        self.server, self.path, self.handler = server, path, handler

    async def __call__(self, scope, receive, send):
        status = 499  # the client left before there was a status

        async def counted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._run(scope, receive, counted)
        except _ClientGone:
            pass
        except _Refused as error:
            await _error(error.status, str(error), error.headers)(scope, receive, counted)
        finally:
            self.server.metrics.count("protector_requests_total", path=self.path, status=status)

    async def _run(self, scope, receive, send):
        server, headers = self.server, Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise _Refused(431, f"serve: headers must have at most {MAX_HEADER_BYTES} bytes.")
        server.authorise(headers)
        if headers.get("content-encoding", "identity") != "identity":
            raise _Refused(400, "serve: body must not be compressed.")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _Refused(400, "serve: content-type must be application/json.")
        with server.admitted():
            if not server.is_ready and not await server.check():
                raise _Refused(503, "serve: the guard isn't ready. See /ready.")
            body = await self._body(headers, receive)
            async with anyio.create_task_group() as tasks:
                async def watch():
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    tasks.cancel_scope.cancel()

                tasks.start_soon(watch)
                try:
                    with _limited(server.config.answer_s):
                        response = await self.handler(body, headers)
                except Exception as error:
                    status, message = server._described(error)
                    response = _error(status, message, getattr(error, "headers", None))
                await response(scope, receive, send)
                tasks.cancel_scope.cancel()

    async def _body(self, headers, receive):
        most, body = self.server.config.max_body_bytes, bytearray()
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise _Refused(413, f"serve: body must have at most {most} bytes.")
        try:
            with anyio.fail_after(self.server.config.timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGone
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _Refused(413, f"serve: body must have at most {most} bytes.")
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise _Refused(408, "serve: the body took too long.") from None


def create_app(protector, config, token=None, upstream_key=None, check=check_detector):
    """The proxy as an ASGI application.

    Args:
        protector: guard.Protector.
        config: ServeConfig; host, port and the model's options aren't read here.
        token, upstream_key, check: as of Server.
    Returns:
        Starlette; `app.state.server` is its Server.
    Raises:
        ValueError: the detector doesn't score streams.
    """
    check_streams(protector)
    server = Server(protector, config, token, upstream_key, check)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        await server.start()
        async with server.client:
            yield

    async def refused(request, error):
        return _error(error.status, str(error), error.headers)

    posts = {"/v1/chat/completions": server.chat, "/v1/guard": server.guard, "/v1/moderations": server.moderations}
    gets = {"/health": server.health, "/ready": server.ready, "/metrics": server.metrics_page}
    routes = [Route(path, _Post(server, path, handler), methods=["POST"]) for path, handler in posts.items()]
    routes += [Route(path, handler, methods=["GET"]) for path, handler in gets.items()]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={_Refused: refused})
    app.state.server = server
    return app


def run(config):
    """Serve until the process is told to stop.

    Args:
        config: ServeConfig.
    Raises:
        ValueError: a bad option. ModelError: the models can't be loaded; nothing is served then.
    """
    import uvicorn

    if not config.upstream:
        raise ValueError("serve: upstream must be the URL of a model server, got nothing. Pass --upstream http://127.0.0.1:8000.")
    _upstream_url(config.upstream)
    if config.on_error not in ("refuse", "raise"):
        raise ValueError("serve: on_error must be refuse or raise: a proxy doesn't let answers through unguarded.")
    token = os.environ.get(config.token_variable) or None
    if token is None and config.host not in LOOPBACK:
        raise ValueError(f"serve: host {config.host} is outside loopback, so a token is required. Set {config.token_variable}.")
    app = create_app(protector_from(config), config, token, os.environ.get(config.upstream_key_variable) or None)
    uvicorn.run(app, **uvicorn_options(config))


def _protocol(timeout_s):
    """uvicorn's h11, and a timer for clients: one that is late with a whole header, or takes no bytes, is cut off."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        def connection_made(self, transport):
            super().connection_made(transport)
            self._timer = self.loop.call_later(timeout_s, self._look, (None, False, 0))

        def connection_lost(self, exc):
            self._timer.cancel()
            super().connection_lost(exc)

        def _look(self, before):
            is_asked = self.cycle is not None and not self.cycle.response_complete
            state = self.cycle, is_asked, self.transport.get_write_buffer_size()
            if state == before and (not is_asked or self.flow.write_paused):  # the client's turn since the last look
                self.transport.abort()
            else:
                self._timer = self.loop.call_later(timeout_s, self._look, state)

    return Protocol


def uvicorn_options(config):
    """Options of uvicorn that the limits rest on; h11, because it bounds the size of headers."""
    return {"host": config.host, "port": config.port, "http": _protocol(config.timeout_s), "ws": "none", "loop": "asyncio", "access_log": False,
            "server_header": False, "h11_max_incomplete_event_size": MAX_HEADER_BYTES, "limit_concurrency": 16 * config.requests,
            "timeout_keep_alive": 5, "timeout_graceful_shutdown": 10}
