"""One chat request to any OpenAI-compatible server, with patience: what fails is tried again, and then it is an error."""
import http.client
import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from ..errors import ProtectorError

KEY_VARIABLE = "OPENAI_API_KEY"
GIVE_UP = 12  # requests in a row without any answer
_LONGEST_WAIT_S = 60.0
_MOST_BYTES = 16 << 20  # of a response; an answer has some kB
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_INSTEAD = {"max_tokens": "max_completion_tokens", "temperature": None}  # what newer models take for a field that they refuse; None: nothing
_OF_ONE_PROMPT = {"content_filter", "content_policy_violation", "context_length_exceeded", "data_inspection_failed"}  # the next one may well be taken


class EndpointError(ProtectorError, RuntimeError):
    """A server gave no usable answer after every attempt; holds no text of a question or an answer."""


class SilentError(EndpointError):
    """A server gave nothing in this protocol at any attempt: it is down, hangs or is overloaded."""


class RefusedError(EndpointError):
    """A server or a model doesn't take a request as it is made, whatever it asks: wrong key, name, option; too little memory."""


class PromptError(EndpointError):
    """A server doesn't take this very prompt, filtered or too long; it may well take the next one."""


class ImageError(EndpointError):
    """An image's file can't be read: its question has no answer, which says nothing of the server."""


class Endpoint:
    """A model behind POST {url}/chat/completions; safe to use from many threads.

    Args:
        url: base address, with or without /v1 at its end as the server has it, e.g. http://127.0.0.1:8080/v1.
        model: name that the server knows.
        timeout_s: of one attempt, from its start to the last byte of the answer.
        attempts: tries before EndpointError.
        backoff_s: wait before the second try; it doubles, and a Retry-After header counts if it is longer.
        key_variable: environment variable with the key; sent as a bearer token if set, written nowhere.
    Raises:
        ValueError: the address isn't http(s).
    """

    def __init__(self, url, model, timeout_s=120.0, attempts=5, backoff_s=1.0, key_variable=KEY_VARIABLE):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"Endpoint: url must begin with http:// or https://, got {url!r}.")
        self.url, self.model = url.rstrip("/"), model
        self.timeout_s, self.attempts, self.backoff_s, self.key_variable = timeout_s, attempts, backoff_s, key_variable
        self.counters, self._lock = Counter(), threading.Lock()
        self._instead = {}  # of _INSTEAD, what this server refused

    def chat(self, messages, max_tokens=512, temperature=0.0, accept=None, **options):
        """The answer's text.

        Args:
            messages: as OpenAI's; content may be a list of text and image parts.
            max_tokens, temperature: of the answer. A model that says that it doesn't support one of these fields is asked again with
                max_completion_tokens, or without a temperature, and so from then on; stderr says so.
            accept: function of the text that returns what to hand back, or None for junk, which is tried again.
            options: further fields of the request, e.g. seed.
        Returns:
            str, or what `accept` returned.
        Raises:
            EndpointError: no usable answer after every attempt; SilentError if every attempt failed without an answer,
                RefusedError for a request that the server will never take.
        """
        instead = dict(self._instead)
        fields = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature, **options}
        body = json.dumps({instead.get(name, name): value for name, value in fields.items() if instead.get(name, name)}).encode()
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        wait_s, reason, failure = self.backoff_s, "", SilentError
        for attempt in range(self.attempts):
            self._count("requests")
            if attempt:
                time.sleep(min(wait_s, _LONGEST_WAIT_S))
                wait_s *= 2
                self._count("retries")
            deadline = time.monotonic() + self.timeout_s
            try:
                request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    text = json.loads(_content(response, deadline))["choices"][0]["message"]["content"]
                result = None if not isinstance(text, str) else text if accept is None else accept(text)
                if result is not None:
                    return result
                reason, failure = "an answer of another form than asked for", EndpointError
            except urllib.error.HTTPError as error:
                with error:
                    words = _words(error, deadline)
                refused = {word: _INSTEAD[word] for word in words if word in _INSTEAD and word not in instead}
                # A field that isn't known, not a value that is too large: that stays the caller's error.
                if error.code == 400 and refused and any(word.startswith("unsupported_") for word in words):
                    self._take(refused)
                    return self.chat(messages, max_tokens, temperature, accept, **options)
                reason = f"status {error.code}" + f" ({', '.join(words)})" * bool(words)
                if error.code not in _RETRIED:
                    self._count("failed")
                    raise (PromptError if _OF_ONE_PROMPT & set(words) else RefusedError)(
                        f"chat: {self.url} must take the request, got {reason}. Check address, model and ${self.key_variable}.") from None
                wait_s = max(wait_s, _seconds(error.headers.get("Retry-After")))
            # Refused, hung, cut, or not this protocol; JSON nested too deep.
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
                reason = type(error).__name__
        self._count("failed")
        raise failure(f"chat: {self.url} must answer within {self.attempts} attempts of {self.timeout_s} s, got {reason} "
                      "at the last. Check the server, or raise timeout_s.")

    def _take(self, refused):
        """Remember what the server refused, and say it once."""
        with self._lock:
            for name in refused.keys() - self._instead:
                print(f"chat: {self.model} doesn't take {name}; it is asked {f'with {refused[name]}' if refused[name] else 'without it'}.", file=sys.stderr)
            self._instead |= refused

    def _count(self, name):
        with self._lock:
            self.counters[name] += 1


def _content(response, deadline):
    """The bytes of a response. urllib's own timeout begins anew with each byte, and a server that trickles would never end."""
    content = b""
    while piece := response.read1(1 << 16):
        content += piece
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(content) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES:,} bytes")
    return content


def _words(response, deadline):
    """A refusal's type, code and parameter, as ["unsupported_parameter", "max_tokens"]; never its message, which may hold the prompt."""
    try:
        said = json.loads(_content(response, deadline))["error"]
        words = [word for word in map(said.get, ("type", "code", "param")) if isinstance(word, str)]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    return list(dict.fromkeys(word for word in words if re.fullmatch(r"[A-Za-z][\w.-]{2,40}", word, re.ASCII)))


def _seconds(header):
    try:
        return max(float(header), 0.0)
    except (TypeError, ValueError):  # absent, or an HTTP date
        return 0.0


def in_parallel(function, items, workers=4, progress=False, desc="asking"):
    """Results of function(item) in order; EndpointError becomes None, which the caller shows as missing.

    The first error of each kind goes to stderr when it comes, and how many there were at the end. A server that is silent GIVE_UP
    times in a row isn't asked again: the rest is None, and a line on stderr says so.

    Raises:
        RefusedError: nothing but one and the same refusal since the start, GIVE_UP times.
    """
    lock, silent, left, refused, counts, first = threading.Lock(), 0, 0, None, Counter(), {}  # by kind; None: an answer

    def attempt(item):
        nonlocal silent, left, refused
        with lock:
            if silent >= GIVE_UP or refused:
                left += 1
                return None
        result = error = kind = None
        try:
            result = function(item)
        except EndpointError as failure:
            error, kind = failure, ImageError if isinstance(failure, ImageError) else str(failure)
        with lock:
            counts[kind] += 1
            if error and kind not in first:
                first[kind] = error
                tqdm.write(f"{desc}: an answer is missing. {error}", file=sys.stderr)
            if kind is not ImageError:  # an image says nothing of the server
                silent = silent + 1 if isinstance(error, SilentError) else 0
            if isinstance(error, RefusedError) and counts[kind] >= GIVE_UP and counts.keys() <= {kind, ImageError}:
                refused = error
        return result

    with ThreadPoolExecutor(workers) as pool:
        results = list(tqdm(pool.map(attempt, items), total=len(items), disable=not progress, desc=desc))
    if refused:
        raise RefusedError(f"{desc}: a request must be taken, got {counts[str(refused)]} refusals and no answer. {refused}")
    for kind, error in first.items():
        print(f"{desc}: {counts[kind]} answers are missing. The first: {error}", file=sys.stderr)
    if left:
        print(f"{desc}: the server must answer, got nothing for {GIVE_UP} requests in a row. The other {left} weren't made and count as missing: "
              "start again later.", file=sys.stderr)
    return results
