"""A detector that looks for a phrase, a detoxifier that writes what it is told, a scripted upstream, and servers on loopback."""
import asyncio
import contextlib
import json
import socket
import threading
import time

import numpy as np

from protector.template import Limits, Template

MARKER = "bleach and vinegar"
_SPECIAL = {"<|im_start|>": 1, "<|im_end|>": 2, "bos": 1, "eos": 2}


class ByteTokenizer:
    """One byte, one token."""

    def encode(self, text):
        return [byte + 10 for byte in text.encode()]

    def decode(self, ids):
        return bytes(token - 10 for token in ids if token >= 10).decode("utf-8", "ignore")

    def special(self, name):
        return _SPECIAL.get(name)


class FakeDetector:
    """Logit 3 from where the answer says the marker, -3 before; counts its cursors."""

    name, quantisation, model_sha256, calibration, path = "fake", "none", "0" * 64, (), "fake.gguf"

    def __init__(self, marker=MARKER, window=2048):
        self.limits, self.tokenizer, self.marker = Limits(window=window, question_tokens=256), ByteTokenizer(), marker
        self.template = Template(self.tokenizer, self.limits)
        self.delay_s, self.error, self.nan = 0.0, None, False
        self.n_scored, self.n_cursors, self.most_cursors = 0, 0, 0
        self.seen = []  # answers as they were scored
        self._lock = threading.Lock()

    def _logit(self, text):
        return float("nan") if self.nan else 3.0 if self.marker in text else -3.0

    def _step(self):
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.error:
            raise self.error

    def answer(self, ids):
        role = self.template._open["assistant"]
        start = max(i for i in range(len(ids)) if ids[i:i + len(role)] == role) + len(role)
        return self.tokenizer.decode(ids[start:])

    def running_logits(self, sequences, starts, deadline=None):
        return [np.full(len(ids) - start, logit) for ids, start, logit in zip(sequences, starts, self.logits(sequences, deadline))]

    def logits(self, sequences, deadline=None):
        self._step()
        if deadline:
            deadline()
        with self._lock:
            self.n_scored += len(sequences)
            self.seen += [self.answer(ids) for ids in sequences]
        return np.array([self._logit(self.answer(ids)) for ids in sequences], np.float32)

    def open(self):
        with self._lock:
            self.n_cursors += 1
            self.most_cursors = max(self.most_cursors, self.n_cursors)
        return FakeCursor(self)


class FakeCursor:
    def __init__(self, detector):
        self.detector, self.ids, self.is_open = detector, [], True

    def start(self, ids):
        self.ids = list(ids)

    def feed(self, ids, check=None):
        assert self.is_open, "feed: the cursor was closed under a running step"
        self.detector._step()
        logits = []
        for token in ids:
            self.ids.append(token)
            logits.append(self.detector._logit(self.detector.answer(self.ids)))
        assert self.is_open, "feed: the cursor was closed under a running step"
        return np.array(logits, np.float32)

    def close(self):
        with self.detector._lock:
            self.detector.n_cursors -= self.is_open
        self.is_open = False


class FakeDetoxifier:
    """Writes what it is told."""

    def __init__(self, text="Please keep the two apart."):
        self.limits, self.text, self.tokenizer = Limits(window=2048, question_tokens=256), text, ByteTokenizer()
        self.template = Template(self.tokenizer, self.limits)

    def generate(self, prompt, max_tokens, temperature=0.0, seed=0, deadline=None):
        return self.text, 8, True


def completion(*messages, **extra):
    """A chat completion with these messages (a str is a content)."""
    choices = [{"index": i, "message": {"role": "assistant", "content": m} if isinstance(m, str) else m, "finish_reason": "stop"}
               for i, m in enumerate(messages)]
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "fake", "choices": choices,
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}, **extra}


def chunk(delta=None, finish_reason=None, index=0, **extra):
    """One chunk of a streamed completion."""
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "fake",
            "choices": [{"index": index, "delta": delta or {}, "finish_reason": finish_reason}], **extra}


def sse(*items):
    """Server-sent events: dicts as data, str as they are."""
    return [item.encode() if isinstance(item, str) else b"data: " + json.dumps(item).encode() + b"\n\n" for item in items]


DONE = "data: [DONE]\n\n"


def spoken(text, size=5):
    """Chunks of a whole answer, some letters each."""
    parts = [text[i:i + size] for i in range(0, len(text), size)]
    return [chunk({"role": "assistant"}), *(chunk({"content": part}) for part in parts), chunk(finish_reason="stop")]


class FakeUpstream:
    """An ASGI model server that sends what the test put into `parts`: bytes, seconds to wait, or an exception to die by."""

    def __init__(self):
        self.status, self.headers, self.parts, self.requests = 200, {}, [], []
        self.left = threading.Event()  # the proxy closed the connection before the answer's end
        self.n_sent = 0

    def json(self, payload, status=200):
        self.status, self.headers, self.parts = status, {"content-type": "application/json"}, [json.dumps(payload).encode()]

    def stream(self, *items):
        self.status, self.headers = 200, {"content-type": "text/event-stream"}
        self.parts = [part for item in items for part in ([item] if isinstance(item, (float, Exception)) else sse(item))]

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.requests.append((dict(scope["headers"]), body))
        parts = self.parts(json.loads(body)) if callable(self.parts) else self.parts
        gone = asyncio.create_task(self._watch(receive))
        await send({"type": "http.response.start", "status": self.status,
                    "headers": [(name.encode(), value.encode()) for name, value in self.headers.items()]})
        for part in parts:
            if isinstance(part, float):
                await asyncio.wait([gone], timeout=part)
            elif isinstance(part, Exception):
                gone.cancel()
                raise part
            else:
                await send({"type": "http.response.body", "body": part, "more_body": True})
                self.n_sent += 1
            if gone.done():
                self.left.set()
                return
        gone.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _watch(self, receive):
        while (await receive())["type"] != "http.disconnect":
            pass


@contextlib.contextmanager
def serving(app, **options):
    """The app on a free loopback port, in a thread; gives the URL."""
    import uvicorn

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    end = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < end and thread.is_alive(), "the server must start within 10 s"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()


def until(condition, seconds=5.0):
    """Wait until the condition holds; whether it did."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return bool(condition())
