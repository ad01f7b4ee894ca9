"""The llama.cpp backend: detector and detoxifier on one set of low-level calls, without torch.

Traps that shaped this file:
- `Llama.embed` drops all but the first 512 tokens without a word; here nothing is cut, and too much is an error.
- llama.cpp returns hidden states after the final norm, as Hugging Face does; a second norm would be a bug.
- llama-architecture files can't carry a one-output head; the head is in the metadata and applied by head.harm_score.
- Two busy threads and a third process collapse its spinning barriers: a context is used behind a lock, and all streams' behind one.
- It trusts its files: a key of another type or an odd size ends the whole process. An unknown model is tried out in another one.
"""
import ctypes
import logging
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from . import gguf
from .base import SHA256, base_path, cache_dir, file_sha256
from .canaries import check_canaries
from .engine import llama_cpp
from .errors import ModelError
from .head import harm_score
from .template import MAX_HISTORY_TOKENS, Template

logger = logging.getLogger("protector")
_BATCH_TOKENS = 512  # tokens of one llama_decode
_SEQUENCES = 16  # sequences that one decode may hold
_TILE = 64  # tokens from which on llama.cpp's CPU kernel of flash attention sums in float32
_CACHES = 4  # that streams are spread over: attention reads a whole cache, the other streams' part only to be masked
_STREAMS = 2  # streams of the greatest length that one of them has room for
_PLACES = 16  # streams that it may hold at one time while they are shorter
_GATHER_S = 1e-3  # between two looks whether more streams have come
_ASK_S = 0.01  # between two looks at the deadline while another thread has the model
_TRIAL_S = 600  # longest trial of a model file
_TRIAL = """
import os, sys
if os.name == "posix":
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from protector.engine import llama_cpp
llama_cpp.llama_backend_init()
options = llama_cpp.llama_model_default_params()
options.n_gpu_layers = 0
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), options)
if not model:
    sys.exit(3)
options = llama_cpp.llama_context_default_params()
options.n_ctx = options.n_batch = 64
context = llama_cpp.llama_init_from_model(model, options)
if not context:
    sys.exit(4)
text, ids = "Two caf\u00e9s, 3 \u6f22\u5b57 \U0001f600 <|im_end|>".encode(), (llama_cpp.llama_token * 64)()
n = llama_cpp.llama_tokenize(llama_cpp.llama_model_get_vocab(model), text, len(text), ids, 64, False, True)
sys.exit(5 if n <= 0 or llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, n)) else 0)
"""
_log_lines = []  # llama.cpp's last complaints, for an error message


@llama_cpp.llama_log_callback
def _on_log(level, text, _):
    if level >= 3:  # GGML_LOG_LEVEL_WARN
        _log_lines.append(text.decode(errors="replace").strip())
        del _log_lines[:-3]


_started = threading.Lock()
_is_quiet = False


def quiet():
    """Start llama.cpp once, with its log kept out of stderr."""
    global _is_quiet
    with _started:
        if not _is_quiet:
            llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
            llama_cpp.llama_backend_init()
            _is_quiet = True


def cpu_threads(limit=Path("/sys/fs/cgroup/cpu.max")):
    """Threads for llama.cpp: the cores this process may use, by its affinity and by its container's share of time (limit: cgroup v2's file)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, limit.read_text().split())  # microseconds of CPU time in each period
    except (OSError, ValueError):  # no cgroup, or "max"
        return cores
    return min(cores, max(quota // period, 1))


def try_out(path):
    """Load and run a model in a process of its own, once for each file: a malformed one ends that process and not this one.

    Raises:
        ModelError: it ended badly, or not in time.
    """
    mark = cache_dir() / f"loads-{file_sha256(path)[:32]}-{llama_cpp.__version__}"
    if mark.exists():
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "GGML_NO_BACKTRACE": "1"}
    try:
        status = subprocess.run([sys.executable, "-c", _TRIAL, str(path)], env=environment, stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_TRIAL_S).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        status = type(error).__name__
    if status != 0:
        raise ModelError(f"load: {path} must be a model that llama.cpp loads, got the end of a trial process ({status}). "
                         "Copy or export it again.")
    mark.touch()


class _Weights:
    """A loaded model file; llama.cpp maps it, and every user in the process shares the one copy."""

    _loaded = weakref.WeakValueDictionary()
    _lock = threading.Lock()

    def __init__(self, path, n_gpu_layers, vocab_only=False):
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers, options.vocab_only = n_gpu_layers, vocab_only
        self.path = path
        self.pointer = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.pointer:
            raise ModelError(f"load: {path} must be a model that llama.cpp loads, got an error ({'; '.join(_log_lines)}). "
                             "Copy or export it again.")
        self.vocab = llama_cpp.llama_model_get_vocab(self.pointer)
        value = ctypes.create_string_buffer(8)
        llama_cpp.llama_model_meta_val_str(self.pointer, gguf.IDENTITY_OUTPUT.encode(), value, len(value))
        self.has_identity_output = value.value == b"true"
        # (vocabulary, d), which gguf.runnable_detector puts beside a file without a vocabulary
        needs_embedding = llama_cpp.llama_vocab_type(self.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE
        self.embedding = np.load(Path(path).with_suffix(".npy"), mmap_mode="r") if needs_embedding else None

    @classmethod
    def of(cls, path, n_gpu_layers, vocab_only=False):
        quiet()
        key = (os.path.realpath(path), os.stat(path).st_mtime_ns, n_gpu_layers, vocab_only)
        with cls._lock:
            weights = cls._loaded.get(key)
            if weights is None:
                weights = cls._loaded[key] = cls(path, n_gpu_layers, vocab_only)
            return weights

    def __del__(self):
        if getattr(self, "pointer", None) and llama_cpp is not None:
            llama_cpp.llama_model_free(self.pointer)


class LlamaTokenizer:
    """llama.cpp's tokeniser as template.py wants it: special-token parsing off."""

    def __init__(self, weights):
        self._weights = weights  # keeps the vocabulary alive
        self._vocab = weights.vocab

    def encode(self, text, parse_special=False):
        data = text.encode()
        size = len(data) + 8  # a token has at least one byte
        ids = (llama_cpp.llama_token * size)()
        n = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, size, False, parse_special)
        if n < 0:
            raise RuntimeError(f"encode: llama.cpp must tokenise {len(data)} bytes, got error {n}.")
        return ids[:n]

    def decode(self, ids):
        buffer, parts = ctypes.create_string_buffer(256), []
        for token in ids:
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            if n < 0:  # -n is the room that it needs
                buffer = ctypes.create_string_buffer(-n)
                n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            parts.append(buffer.raw[:n])
        return b"".join(parts).decode("utf-8", "replace")  # as Hugging Face does: the same text from both backends

    def special(self, name):
        if name in ("bos", "eos"):
            token = getattr(llama_cpp, f"llama_vocab_{name}")(self._vocab)
            return token if token >= 0 else None
        ids = self.encode(name, parse_special=True)
        return ids[0] if len(ids) == 1 else None

    def is_control(self, token):
        """Whether a token is a special one, which no rewrite may hold."""
        return bool(llama_cpp.llama_vocab_is_control(self._vocab, token))


def _acquire(lock, deadline):
    while not lock.acquire(timeout=_ASK_S if deadline else -1):
        deadline()


class _Context:
    """One llama.cpp context: weights, an optional adapter, a KV cache, and a lock around them."""

    def __init__(self, weights, adapter, n_ctx, hidden, n_threads, n_sequences=1, in_tiles=False):
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, _BATCH_TOKENS, _BATCH_TOKENS
        options.n_seq_max, options.kv_unified = n_sequences, True
        options.n_threads = options.n_threads_batch = n_threads or cpu_threads()
        self.states = llama_cpp.llama_get_logits_ith if weights.has_identity_output else llama_cpp.llama_get_embeddings_ith
        options.embeddings = hidden and not weights.has_identity_output
        options.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
        if hidden:
            # For fewer than _TILE tokens its CPU kernel sums values in float16, in an order that depends on the batch: logits of one text
            # differed by 8e-3 between a stream and the whole, and by 4e-4 without it.
            is_flash = in_tiles and not llama_cpp.llama_supports_gpu_offload()
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if is_flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.weights, self._lock, self._next, self.n_ctx, self.pid = weights, threading.Lock(), threading.Lock(), n_ctx, os.getpid()
        self.pointer = llama_cpp.llama_init_from_model(weights.pointer, options)
        if not self.pointer:
            raise ModelError(f"load: llama.cpp must get memory for {n_ctx} tokens, got none ({'; '.join(_log_lines)}).")
        self.memory = llama_cpp.llama_get_memory(self.pointer)
        self.n_embd = llama_cpp.llama_model_n_embd(weights.pointer)
        self.batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0 if weights.embedding is None else self.n_embd, 1)
        if weights.embedding is not None:
            self.rows = np.ctypeslib.as_array(self.batch.embd, (_BATCH_TOKENS, self.n_embd))  # what llama.cpp reads in place of ids
        if adapter is not None:
            self.adapter = llama_cpp.llama_adapter_lora_init(weights.pointer, str(adapter).encode())
            if not self.adapter:
                raise ModelError(f"load: {adapter} must be an adapter of {weights.path}, got an error "
                                 f"({'; '.join(_log_lines)}). Use the base that it was trained on.")
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self.adapter)
            llama_cpp.llama_set_adapters_lora(self.pointer, adapters, 1, (ctypes.c_float * 1)(1.0))

    @property
    def lock(self):
        """The lock, in the process that loaded the model.

        Raises:
            ModelError: in a fork. It has the memory but not the threads, and a lock that was held stays held: it would wait forever.
        """
        if self.pid != os.getpid():
            raise ModelError("decode: model must be loaded in the process that uses it, got a fork. Load it after the fork.")
        return self._lock

    @contextmanager
    def turn(self, deadline=None):
        """Hold the lock. Whoever waits comes before a holder that wants it again, which a lock alone would let back in.

        Args:
            deadline: called while it waits; raises to stop.
        """
        lock = self.lock
        _acquire(self._next, deadline)
        try:
            _acquire(lock, deadline)
        finally:
            self._next.release()
        try:
            yield
        finally:
            lock.release()

    def decode(self, entries):
        """Run (token, position, sequence, wants_output) entries, at most one batch; raises if llama.cpp fails."""
        batch = self.batch
        batch.n_tokens = len(entries)
        if self.weights.embedding is not None:
            self.rows[:len(entries)] = self.weights.embedding[[entry[0] for entry in entries]]
        for i, (token, position, sequence, wants_output) in enumerate(entries):
            if self.weights.embedding is None:
                batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wants_output
        status = llama_cpp.llama_decode(self.pointer, batch)
        if status != 0:
            raise RuntimeError(f"decode: llama.cpp must decode {len(entries)} tokens, got status {status}.")

    def hidden(self, i):
        """(d,) float32 hidden state of batch entry i, which wanted an output; valid until the next decode."""
        pointer = self.states(self.pointer, i)
        if not pointer:
            raise RuntimeError(f"hidden: llama.cpp must return hidden states of entry {i}, got none.")
        return np.ctypeslib.as_array(pointer, shape=(self.n_embd,))

    def clear(self, sequence=-1):
        """Free a sequence's cache; -1 frees all."""
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def __del__(self):
        if getattr(self, "pointer", None) and llama_cpp is not None and self.pid == os.getpid():
            llama_cpp.llama_free(self.pointer)
            llama_cpp.llama_batch_free(self.batch)


def _load(path, kind, base, quantisation, n_gpu_layers):
    """(metadata, weights, weights with the vocabulary, adapter path or None, quantisation name) of an adapter or merged file."""
    metadata = gguf.read_metadata(path)
    if metadata.kind != kind:
        raise ModelError(f"load: {path} must be a {kind}, got a {metadata.kind}. Pass the other file.")
    if metadata.merged:
        try_out(path)
        weights = _Weights.of(path, n_gpu_layers)
        return metadata, weights, weights, None, metadata.quantisation
    base = Path(base) if base else base_path()
    if not base.exists():
        raise ModelError(f"load: base must exist, got no file at {base}. Check the path.")
    if file_sha256(base) != metadata.base_sha256:
        raise ModelError(f"load: base must be the file that {path} was trained on (sha256 {metadata.base_sha256[:16]}...), "
                         f"got sha256 {file_sha256(base)[:16]}... at {base}. Pass base=... with the right file.")
    if metadata.base_sha256 != SHA256:
        try_out(base)
    if quantisation == gguf.AS_BASE:
        weights = _Weights.of(gguf.runnable_base(base, metadata.depth, quantisation), n_gpu_layers)
        return metadata, weights, weights, path, quantisation
    if kind == "detector":
        blocks = _Weights.of(gguf.runnable_detector(base, path, quantisation), n_gpu_layers)
        return metadata, blocks, _Weights.of(base, 0, vocab_only=True), None, quantisation
    weights = _Weights.of(gguf.runnable_base(base, metadata.depth, quantisation, path), n_gpu_layers)
    return metadata, weights, weights, None, quantisation


class LlamaDetector:
    """The harm detector on llama.cpp.

    Args:
        path: adapter GGUF or merged GGUF of kind detector.
        base: base GGUF of an adapter; the default base if None.
        quantisation: of the base's first blocks (adapter only): "F16", "BF16", "Q8_0", "Q4_0", "F32", or "base".
        n_threads: CPU threads; all cores that this process may use if None.
        n_gpu_layers: layers on the GPU where llama.cpp was built for one; -1 = all.
        check: score the canaries after loading.
    Raises:
        ModelError: the file is missing, cut, of the wrong kind or base, or its canaries don't score as they did at export.
    """

    name = "llama.cpp"

    def __init__(self, path, base=None, quantisation="F16", n_threads=None, n_gpu_layers=-1, check=True):
        self.metadata, weights, vocabulary, adapter, self.quantisation = _load(path, "detector", base, quantisation, n_gpu_layers)
        self.path, self.limits = path, self.metadata.limits
        self.tokenizer = LlamaTokenizer(vocabulary)
        self.template = Template(self.tokenizer, self.limits)
        self.longest = self.limits.question_tokens + self.limits.window + MAX_HISTORY_TOKENS + 64  # 64: roles and marks
        self.model_sha256, self.calibration = self.metadata.model_sha256, self.metadata.calibration
        room = _STREAMS * self.longest  # not self in the function: a cycle would keep the memory until a collection
        self._streams = _Streams(lambda: _Context(weights, adapter, room, True, n_threads, _PLACES))
        room = math.ceil(self.longest / _BATCH_TOKENS) * _BATCH_TOKENS  # for a group of _groups, and for _tiled's padding
        self.context = _Context(weights, adapter, room, True, n_threads, _SEQUENCES + 1, in_tiles=True)
        if self.context.n_embd != len(self.metadata.head_weight):
            raise ModelError(f"load: {path} must have a head of {self.context.n_embd} weights, got "
                             f"{len(self.metadata.head_weight)}. Use the base that it was trained on.")
        if check:
            check_canaries(self)

    def logits(self, sequences, deadline=None):
        """Harm logits at the last token of each sequence of ids, several sequences in one decode.

        Args:
            sequences: list of lists of token ids, each at least one long.
            deadline: called before each decode, and while another thread has the model; raises to stop.
        Returns:
            (n,) float32, one per sequence.
        """
        parts = self.running_logits(sequences, [len(ids) - 1 for ids in sequences], deadline)
        return np.array([part[-1] for part in parts], np.float32)

    def running_logits(self, sequences, starts, deadline=None):
        """Harm logits at every token of each sequence from its start on.

        Another thread that waits gets its turn after each group that the cache holds at one time.

        Args:
            sequences, deadline: as of logits.
            starts: for each sequence the index of the first token with a score.
        Returns:
            list of (len(ids) - start,) float32.
        """
        parts = []
        for group in _groups(zip(sequences, starts, strict=True)):
            entries = [(token, position, sequence, position >= start)
                       for sequence, (ids, start) in enumerate(group) for position, token in enumerate(ids)]
            with self.context.turn(deadline):
                self.context.clear()
                logits = self._read(self.context, _tiled(entries), deadline)
            ends = np.cumsum([len(ids) - start for ids, start in group])
            parts += np.split(np.array(logits, np.float32), ends[:-1])
        return parts

    def open(self):
        """A cursor for one stream: its own sequence in one of the caches that all streams share."""
        self.context.lock  # an error in a fork
        return _Cursor(self, self._streams)

    def _read(self, context, entries, deadline=None):
        """Logits of the entries that want an output, decoded batch by batch."""
        logits = []
        n = math.ceil(len(entries) / _BATCH_TOKENS)
        for i in range(n):  # batches of one size: none is short of _TILE
            if deadline:
                deadline()
            part = entries[len(entries) * i // n:len(entries) * (i + 1) // n]
            context.decode(part)
            hidden = [context.hidden(at) for at, entry in enumerate(part) if entry[3]]  # n of (d,)
            if hidden:
                logits.extend(self._head(np.stack(hidden)))
        return logits

    def _head(self, hidden):
        """(n, d) hidden states -> (n,) logits."""
        return harm_score(hidden, self.metadata.head_weight, self.metadata.head_bias, output="logit").values


def _groups(sequences):
    """Lists of (ids, start) that the cache holds at one time: what one batch has room for, behind the end of one that is longer, too."""
    group, n_tokens = [], 0
    for ids, start in sequences:
        n_last = n_tokens and (n_tokens - 1) % _BATCH_TOKENS + 1  # in the last batch
        if len(group) == _SEQUENCES or n_last and n_last + len(ids) > _BATCH_TOKENS:
            yield group
            group, n_tokens = [], 0
        group.append((ids, start))
        n_tokens += len(ids)
    if group:
        yield group


def _tiled(entries):
    """The entries, and padding in a sequence of its own where they are fewer than _TILE."""
    return entries + [(0, position, _SEQUENCES, False) for position in range(_TILE - len(entries))]


class _Step:
    """Ids that one stream wants scored, and what became of them."""

    def __init__(self, cursor, ids):
        self.cursor, self.ids, self.logits, self.error = cursor, ids, None, None

    @property
    def is_done(self):
        return self.logits is not None or self.error is not None

    @property
    def n_tokens(self):
        """That are decoded for it."""
        return len(self.cursor.ids) - self.cursor.n_cached + len(self.ids)

    def attempt(self, work):
        """Do its part of the work; an error of its own must not reach the others."""
        try:
            work()
        except Exception as error:
            self.error = error


class _Cache:
    """A context that some streams share."""

    def __init__(self, context):
        self.context = context
        self.places = {}  # {sequence: cursor}, the one that was idle longest first

    @property
    def n_tokens(self):
        return sum(len(cursor.ids) for cursor in self.places.values())


class _Streams:
    """What the streams of one detector share: caches behind one lock, and the steps that no thread has taken up yet."""

    def __init__(self, new_context):
        self.new_context, self.caches, self.waiting = new_context, [], deque()
        self.turn, self.is_busy = threading.Condition(), False  # whether a thread is scoring what waited
        self._making = threading.Lock()

    @property
    def lock(self):
        if not self.caches:
            with self._making:
                if not self.caches:
                    self.caches.append(_Cache(self.new_context()))
        return self.caches[0].context.lock

    def emptiest(self):
        """The cache with a free place that holds the fewest tokens; a new one where none is empty and there may be more."""
        if all(cache.places for cache in self.caches) and len(self.caches) < _CACHES:
            self.caches.append(_Cache(self.new_context()))
        return min(self.caches, key=lambda cache: (len(cache.places) == _PLACES, cache.n_tokens))


class _Cursor:
    """Scores the tokens of one stream, each once.

    Streams of several threads that wait for the model are decoded together: whoever gets it takes the steps of all.

    No stream waits for another to end, or streams that one thread reads in turn would wait forever: where its cache is full,
    the one that was idle longest loses its place, and is decoded again, without scores, when it goes on.
    """

    def __init__(self, detector, streams):
        self.detector, self.streams = detector, streams
        self.cache, self.sequence, self.is_closed = None, None, False  # its place, where it has one
        self.ids, self.n_cached = [], 0  # what was fed since start; how many of them the cache holds
        self.begun = None  # ids of a start that the next step carries out

    def start(self, ids):
        """Begin anew with these ids, which carry no score; they are decoded with what is fed first, be it nothing. Waits for no one."""
        self.begun = list(ids)

    def feed(self, ids, check=None):
        """(n,) float32 logits of these ids, which follow what was fed before.

        Args:
            check: called while other streams have the model; raises to stop, and the cursor is closed then.
        """
        step, lock, streams = _Step(self, ids), self.streams.lock, self.streams
        try:
            with streams.turn:  # a lock alone would let a stream back in before the others came out with their scores
                streams.waiting.append(step)
                while streams.is_busy and not step.is_done:
                    if check:
                        check()
                    streams.turn.wait(_ASK_S if check else None)
                if not step.is_done:
                    streams.is_busy = True
            if not step.is_done:
                self._take_turn(lock, check)
        except BaseException:
            self.close()  # another thread may be at the step all the same: what this stream was fed is unknown
            with streams.turn:
                if step in streams.waiting:
                    streams.waiting.remove(step)
            raise
        if step.error is not None:
            raise step.error
        return step.logits

    def _take_turn(self, lock, check):
        streams = self.streams
        try:
            self._gather()
            _acquire(lock, check)
            try:
                self._take_up()
            finally:
                lock.release()
        finally:
            with streams.turn:
                streams.is_busy = False
                streams.turn.notify_all()

    def _gather(self):
        """Wait while other streams keep coming: in one decode they take less time than one after the other."""
        n, n_streams = 0, sum(len(cache.places) for cache in self.streams.caches)
        while n < len(self.streams.waiting) < n_streams:
            n = len(self.streams.waiting)
            time.sleep(_GATHER_S)

    def _take_up(self):
        """Score all steps that wait: those of one cache in one decode where there is room, the others one by one."""
        waiting, turn = self.streams.waiting, self.streams.turn
        with turn:
            steps = list(waiting)
            waiting.clear()
        for cache in self.streams.caches:
            for cursor in list(cache.places.values()):
                if cursor.is_closed or cursor.begun is not None:
                    cursor._leave()
        try:
            for step in steps:
                step.attempt(lambda: step.cursor._enter(len(step.ids)))
            for cache in self.streams.caches:
                together, n_batch, n_cached = [], 0, cache.n_tokens
                for step in steps:
                    n = n_batch + step.n_tokens
                    if not step.is_done and step.cursor.cache is cache and n <= _BATCH_TOKENS and n_cached + n <= cache.context.n_ctx:
                        together.append(step)
                        n_batch = n
                try:
                    if len(together) > 1:
                        self._decode(together)
                except Exception:  # one of them broke it: each on its own
                    pass
            for step in steps:
                if not step.is_done:
                    step.attempt(lambda: (step.cursor._enter(len(step.ids)), self._decode([step])))
        finally:  # an interrupt ends this thread, and not the others
            with turn:
                waiting.extend(step for step in steps if not step.is_done)

    def _decode(self, steps):
        """Score steps of one cache; before its own ids each decodes what the cache doesn't hold of the ids before them."""
        entries = []
        for step in steps:
            cursor, n = step.cursor, step.cursor.n_cached
            entries += [(token, position, cursor.sequence, position >= len(cursor.ids))
                        for position, token in enumerate(cursor.ids[n:] + step.ids, n)]
        try:
            logits = self.detector._read(steps[0].cursor.cache.context, entries)
        except BaseException:
            for step in steps:
                step.cursor._leave()  # the cache may hold some of them
            raise
        for step in steps:
            step.cursor.ids += step.ids
            step.cursor.n_cached = len(step.cursor.ids)
            step.logits, logits = np.array(logits[:len(step.ids)], np.float32), logits[len(step.ids):]

    def close(self):
        """Give the place back: now, or before the next step if another thread has the model."""
        self.is_closed = True
        if self.cache is not None and self.streams.lock.acquire(blocking=False):
            try:
                self._leave()
            finally:
                self.streams.lock.release()

    def _enter(self, n_new):
        """Take a place in a cache with room for new ids, or keep it."""
        if self.is_closed:
            raise RuntimeError("feed: cursor must be open, got a closed one. Open another.")
        if self.begun is not None:
            self.ids, self.begun = self.begun, None
        cache = self.cache or self.streams.emptiest()
        others = [cursor for cursor in cache.places.values() if cursor is not self]
        n_tokens = sum(len(cursor.ids) for cursor in others) + len(self.ids) + n_new
        while others and (n_tokens > cache.context.n_ctx or len(others) == _PLACES):
            n_tokens -= len(others[0].ids)
            others.pop(0)._leave()
        if self.cache is None:
            self.cache, self.sequence = cache, min(set(range(_PLACES)) - cache.places.keys())
        cache.places.pop(self.sequence, None)
        cache.places[self.sequence] = self

    def _leave(self):
        if self.cache is not None:
            self.cache.context.clear(self.sequence)
            del self.cache.places[self.sequence]
            self.cache, self.sequence, self.n_cached = None, None, 0


class LlamaDetoxifier:
    """The response detoxifier on llama.cpp; arguments as of LlamaDetector, without check, and Q8_0 by default.

    It runs on a copy of the base with its adapter merged, made at the first use: prompts and tokens are faster so (the detoxifier's rows
    of the table in docs/speed.md). quantisation="base" applies the adapter at run time, without a copy on disk.
    """

    name = "llama.cpp"

    def __init__(self, path, base=None, quantisation="Q8_0", n_threads=None, n_gpu_layers=-1):
        self.metadata, weights, _, adapter, self.quantisation = _load(path, "detoxifier", base, quantisation, n_gpu_layers)
        self.path, self.limits = path, self.metadata.limits
        self.tokenizer = LlamaTokenizer(weights)
        self.template = Template(self.tokenizer, self.limits)
        room = self.limits.question_tokens + self.limits.rejected_tokens + self.limits.rewrite_tokens + 64
        self.context = _Context(weights, adapter, room, False, n_threads)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(weights.vocab)

    def generate(self, prompt, max_tokens, temperature=0.0, seed=0, deadline=None):
        """Text that the model writes after the prompt's ids, up to its end mark.

        Args:
            prompt: token ids.
            max_tokens: most tokens to write; the room for them is there beside any prompt within the limits.
            temperature: 0 = greedy.
            seed: of sampling.
            deadline: called before each token, and while another thread has the model; raises to stop.
        Returns:
            (text, number of tokens written, finished): finished is False if the end mark didn't come.
        """
        if len(prompt) + max_tokens > self.context.n_ctx:
            raise ValueError(f"generate: prompt and max_tokens must fit {self.context.n_ctx} tokens, got "
                             f"{len(prompt)} + {max_tokens}. Shorten the prompt.")
        rng = np.random.default_rng(seed)
        with self.context.turn(deadline):
            self.context.clear()
            for start in range(0, len(prompt), _BATCH_TOKENS):
                if deadline:
                    deadline()
                part = prompt[start:start + _BATCH_TOKENS]
                self.context.decode([(token, start + i, 0, start + i == len(prompt) - 1) for i, token in enumerate(part)])
            written = []
            while len(written) < max_tokens:
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context.pointer, -1), (self.n_vocab,))
                token = _pick(logits, temperature, rng)
                if token == self.template.end or self.tokenizer.is_control(token):
                    return self.tokenizer.decode(written), len(written), True
                written.append(token)
                if deadline:
                    deadline()
                self.context.decode([(token, len(prompt) + len(written) - 1, 0, True)])
            return self.tokenizer.decode(written), len(written), False


def _pick(logits, temperature, rng):
    if temperature <= 0:
        return int(logits.argmax())
    noisy = logits / temperature + rng.gumbel(size=logits.shape)  # the maximum of logits + Gumbel noise is a softmax sample
    return int(noisy.argmax())
