"""Multimodal models behind one small interface: client(question, image) -> answer, image a path or None.

    OpenAIClient          any OpenAI-compatible server (vLLM, llama-server, Ollama, a hosted one)
    LlamaVisionClient     GGUF + mmproj through llama-cpp-python
    TransformersClient    an image-text-to-text model of transformers
    StandIn               OCR + the base model: pixels in, text out, for a machine without MLLM weights; not an MLLM
    Replay                recorded answers

A client has a `name`, which says what answered and with which settings, and fits Protector.wrap. Its `identity` tells two of one
name apart: the model's file or server, and each setting that an answer hangs on.
"""
import base64
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .. import data
from ..base import cache_dir, file_sha256
from ..errors import DataError, MissingPackage, ModelError, ProtectorError
from .endpoint import EndpointError, ImageError, RefusedError
from .kept import Kept, digest

MAX_TOKENS = 256
# Without what it asks for: opencv-python needs a display's libraries, its headless build doesn't.
OCR_INSTALL = ("pip install --no-deps rapidocr-onnxruntime==1.4.4 && "
               "pip install onnxruntime opencv-python-headless pyclipper shapely six PyYAML pillow tqdm")


def stamp(path):
    """A model's file or folder as it is now: the resolved path, and name, size and time of each file; a hub name as it is."""
    path = Path(path)
    if not path.exists():
        return [str(path)]
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return [str(path.resolve()), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]


@contextmanager
def _reading(image, *errors):
    """What goes wrong with an image's file is an ImageError: one question's answer is missing, and the run goes on."""
    try:
        yield
    except (OSError, *errors) as error:
        raise ImageError(f"mllm: image must be a file that can be read, got {type(error).__name__} at {image}. Mend the file and "
                         "start again.") from None


def _sha256(image):
    with _reading(image):
        return file_sha256(image)


class OpenAIClient:
    """A model behind an endpoint.

    Args:
        endpoint: Endpoint.
        max_tokens: of an answer.
    """

    def __init__(self, endpoint, max_tokens=MAX_TOKENS):
        self.endpoint, self.max_tokens = endpoint, max_tokens
        self.name = f"{endpoint.model}, at most {max_tokens} tokens"
        self.identity = [endpoint.url, endpoint.model, max_tokens]

    def __call__(self, question, image=None):
        content = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(image)}})
        return self.endpoint.chat([{"role": "user", "content": content if image is not None else question}], self.max_tokens,
                                  accept=lambda text: text if text.strip() else None)


def data_url(image):
    """An image file as a data: address.

    Raises:
        ImageError: the file can't be read.
    Example:
        data_url("a.png")  # 'data:image/png;base64,iVBOR...'
    """
    kind = {"jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}.get(Path(image).suffix.lower().lstrip("."), "png")
    with _reading(image):
        return f"data:image/{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"


class LlamaVisionClient:
    """A GGUF vision model with its projector, in this process.

    Args:
        model: GGUF file of the language model.
        mmproj: GGUF file of the projector.
        max_tokens: of an answer.
        n_threads: CPU threads; llama-cpp-python's default if None.
    Raises:
        ModelError: a file is missing or llama.cpp can't load it.
    """

    def __init__(self, model, mmproj, max_tokens=MAX_TOKENS, n_threads=None):
        from ..engine import llama_cpp
        from llama_cpp.llama_chat_format import MTMDChatHandler

        for path in (model, mmproj):
            if not Path(path).is_file():
                raise ModelError(f"LlamaVisionClient: model and mmproj must be GGUF files, got no file at {path}. Check the path.")
        try:
            self.llama = llama_cpp.Llama(str(model), chat_handler=MTMDChatHandler(clip_model_path=str(mmproj), verbose=False),
                                         n_ctx=8192, n_threads=n_threads, n_gpu_layers=-1, verbose=False)
        except ValueError as error:
            raise ModelError(f"LlamaVisionClient: model must be a vision GGUF that llama.cpp loads, got {error}.") from None
        self.max_tokens, self.name, self._lock = max_tokens, f"{Path(model).stem}, at most {max_tokens} tokens", threading.Lock()
        self.identity = [stamp(model), stamp(mmproj), max_tokens]

    def __call__(self, question, image=None):
        content = [{"type": "text", "text": question}]
        if image is not None:
            opened(image)  # llama.cpp has one error for a broken image and a broken setup
            content.insert(0, {"type": "image_url", "image_url": {"url": data_url(image)}})
        with self._lock:
            reply = self.llama.create_chat_completion([{"role": "user", "content": content}], max_tokens=self.max_tokens, temperature=0.0)
        return reply["choices"][0]["message"]["content"] or ""


class TransformersClient:
    """An image-text-to-text model of transformers; also gives likelihoods to likelihood.py.

    Args:
        folder: folder or hub name; no remote code is run.
        max_tokens: of an answer.
        device: torch device, "cuda" where there is one if None.
    """

    def __init__(self, folder, max_tokens=MAX_TOKENS, device=None):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.torch = torch
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", trust_remote_code=False).to(self.device).eval()
        except (OSError, ValueError) as error:
            raise ModelError("TransformersClient: folder must hold an image-text-to-text model, got "
                             f"{type(error).__name__}: {error}") from None
        self.max_tokens, self.name = max_tokens, f"{Path(folder).name}, at most {max_tokens} tokens"
        self.identity = [stamp(folder), getattr(self.model.config, "_commit_hash", None), max_tokens]  # the hash: of a hub's model

    def inputs(self, question, image=None):
        """What the model reads: a user's turn and the opened answer."""
        content = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image", "image": opened(image)})
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
                                                  return_dict=True, return_tensors="pt").to(self.device)

    def __call__(self, question, image=None):
        inputs = self.inputs(question, image)
        with self.torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        return self.processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()

    def losses(self, question, answer, image=None):
        """Negative log-likelihood of each answer token in nats, given the question and an image or none: (T,) float64."""
        torch, inputs = self.torch, self.inputs(question, image)
        target = self.processor.tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids.to(self.device)  # (1, T)
        n_prompt = inputs["input_ids"].shape[1]
        extended = {}
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.shape == (1, n_prompt):  # masks and token types go along with the ids
                tail = target if name == "input_ids" else torch.full_like(target, int(name == "attention_mask"))
                value = torch.cat([value, tail.to(value.dtype)], dim=1)
            extended[name] = value
        with torch.inference_mode():
            logits = self.model(**extended).logits[0, n_prompt - 1:-1].double()  # (T, V)
        return torch.nn.functional.cross_entropy(logits, target[0], reduction="none").cpu().numpy()


def opened(image):
    """An image file in RGB.

    Raises:
        ImageError: the file can't be read.
    """
    from PIL import Image

    # What Pillow's own fuzzers take from a broken file; UnidentifiedImageError is an OSError.
    with _reading(image, SyntaxError, ValueError, NotImplementedError, OverflowError, EOFError, Image.DecompressionBombError):
        with Image.open(image) as file:
            return file.convert("RGB")


class StandIn:
    """OCR reads the image and the base model answers question and text together. It sees letters only, no picture.

    Args:
        model: BaseModel; made if None.
        max_tokens: of an answer.
    """

    def __init__(self, model=None, max_tokens=128, n_threads=None):
        from .base_model import BaseModel

        self.model, self.max_tokens = model or BaseModel(n_threads=n_threads), max_tokens
        self.name = f"stand-in, not an MLLM: RapidOCR + {self.model.name}, at most {max_tokens} tokens"
        self.identity = ["stand-in", stamp(self.model.path), max_tokens]
        self._ocr, self._lock, self._read = None, threading.Lock(), {}

    def read(self, image):
        """The text in an image, one line per line found; "" for an image without text."""
        with self._lock:
            key = _sha256(image)
            if key not in self._read:
                if self._ocr is None:
                    try:
                        from rapidocr_onnxruntime import RapidOCR
                    except ImportError:
                        raise MissingPackage(f"StandIn: RapidOCR must be installed, got none. Run: {OCR_INSTALL}") from None
                    self._ocr = RapidOCR()
                opened(image)  # RapidOCR's own error for a broken file is no OSError
                lines, _ = self._ocr(str(image))
                self._read[key] = "\n".join(line[1] for line in lines or ())
            return self._read[key]

    def prompt(self, question, image=None):
        """What the base model reads."""
        text = self.read(image) if image is not None else ""
        return f"{question}\n\nThe image shows this text:\n{text}" if text else question

    def __call__(self, question, image=None):
        return self.model.generate(self.prompt(question, image), self.max_tokens)

    def losses(self, question, answer, image=None):
        """Negative log-likelihood of each answer token in nats: (T,) float64. The text path alone: an image is its letters."""
        return self.model.losses(self.prompt(question, image), answer)


class Answer(NamedTuple):
    """What a client said and how long it took when it was asked."""

    text: str
    seconds: float | None  # None: not recorded
    earlier: bool = False  # of an earlier run: its machine, threads and load may have been others


class Replay:
    """Answers that were recorded elsewhere.

    Args:
        answers: {(question, image path or None): Answer}.
        name: of the model that wrote them.
    Raises (on call):
        EndpointError: nothing was recorded, which counts as missing.
    """

    def __init__(self, answers, name):
        self.answers, self.name = answers, f"{name}, recorded"

    @classmethod
    def of(cls, recorded, samples, path):
        """Recorded answers laid to a benchmark's samples, named for the file that they stand in.

        Args:
            recorded: of read_recorded.
            samples: list of benchmarks.Sample; those without an answer will be missing.
            path: of the file.
        Raises:
            DataError: no sample has an answer.
        """
        answers = {(sample.question, sample.image): recorded[sample.request, sample.kind]
                   for sample in samples if (sample.request, sample.kind) in recorded}
        if not answers:
            raise DataError(f"Replay: {path} must hold answers to this benchmark's questions, got none. A row's question is the "
                            "benchmark's text-only wording, its kind one of the table's.")
        return cls(answers, Path(path).name.split(".jsonl")[0])

    def ask(self, question, image=None):
        """Answer, as Cached.ask gives it."""
        try:
            return self.answers[question, image]
        except KeyError:
            raise EndpointError("Replay: answers must hold this question and image, got neither. Record it first.") from None

    def __call__(self, question, image=None):
        return self.ask(question, image).text


def read_recorded(path):
    """Recorded answers of a model to a benchmark's questions.

    Args:
        path: JSON lines {"question", "answer"}, with "kind" (as Sample has it; "text" if absent) and "seconds" (that the
            model took) where they are known. The question is the benchmark's text-only wording. A row with an empty answer is
            left out: missing, not safe.
    Returns:
        {(question, kind): Answer}
    Raises:
        DataError: no file, or a row of another layout.
    Example:
        {"question": "How do I descale a kettle?", "kind": "TYPO", "answer": "With vinegar.", "seconds": 2.1}
    """
    if not Path(path).is_file():
        raise DataError(f"read_recorded: mllm_model must be a JSONL file of recorded answers, got {path!r}. Pass --mllm-model FILE.")
    answers = {}
    for number, row in data._jsonl_rows(str(path)):
        try:
            seconds = row.get("seconds")
            question, kind, answer = row["question"], row.get("kind", "text"), Answer(row["answer"], None if seconds is None else float(seconds), True)
            if not all(isinstance(value, str) for value in (question, kind, answer.text)):
                raise TypeError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{path}, row {number}: must be a JSON object with question and answer; seconds is a number.") from None
        if answer.text.strip():  # an empty one is missing
            answers[question, kind] = answer
    return answers


class Cached:
    """A client whose answers are kept on disk by its identity, so that a run resumes where it stopped.

    Args:
        client: any client of this module.
        folder: for one JSONL file per client; the user's cache folder if None.
    """

    def __init__(self, client, folder=None):
        self.client, self.name = client, client.name
        self._kept = Kept(client.identity, Path(folder or cache_dir() / "answers"), lambda row: Answer(row["answer"], row["seconds"], True))
        self.path, self.known = self._kept.path, self._kept.known

    def ask(self, question, image=None):
        """Answer, from disk if it is there.

        Raises:
            EndpointError: the client gave none, or an empty one, or can't read the image; RefusedError if llama.cpp or PyTorch
                failed on it (context, memory). Nothing is kept, and the next run asks again.
        """
        key = digest(f"{question}\0{_sha256(image) if image is not None else ''}")
        if key not in self.known:
            start = time.perf_counter()
            try:
                answer = Answer(self.client(question, image), round(time.perf_counter() - start, 4))
            except ProtectorError:
                raise
            except (ValueError, RuntimeError, IndexError, MemoryError) as error:  # its message may hold the question
                raise RefusedError(f"Cached: {self.name} must answer, got {type(error).__name__}. Is its context or the memory too small?") from None
            if not answer.text.strip():  # nothing to judge: it would pass for harmless
                raise EndpointError("Cached: an answer must have words, got none. It counts as missing.")
            self._kept.keep(key, answer, {"answer": answer.text, "seconds": answer.seconds})
        return self.known[key]

    def __call__(self, question, image=None):
        return self.ask(question, image).text
