"""Models without weights (letters are tokens, a word makes an answer harmful), and a server on loopback that says what it is told."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from protector.evaluate.endpoint import Endpoint
from protector.template import Limits, Template

_SPECIAL = {"<|im_start|>": 1, "<|im_end|>": 2, "bos": 1, "eos": 2}


class FakeTokenizer:
    def encode(self, text):
        return [byte + 10 for byte in text.encode()]

    def decode(self, ids):
        return bytes(token - 10 for token in ids if token >= 10).decode("utf-8", "ignore")

    def special(self, name):
        return _SPECIAL.get(name)


class FakeDetector:
    """Logit 3 where the answer says "bleach and vinegar", else between -3 and -1 by the answer's length."""

    name, quantisation, model_sha256, calibration, path = "fake", "none", "0" * 64, (), "fake.gguf"

    def __init__(self, limits=Limits(window=2048)):
        self.limits, self.tokenizer = limits, FakeTokenizer()
        self.template = Template(self.tokenizer, limits)
        self.n_scored = 0

    def running_logits(self, sequences, starts, deadline=None):
        return [np.full(len(ids) - start, logit) for ids, start, logit in zip(sequences, starts, self.logits(sequences, deadline))]

    def logits(self, sequences, deadline=None):
        self.n_scored += len(sequences)
        role = self.template._open["assistant"]
        results = []
        for ids in sequences:
            start = max(i for i in range(len(ids)) if ids[i:i + len(role)] == role) + len(role)
            text = self.tokenizer.decode(ids[start:])
            results.append(3.0 if "bleach and vinegar" in text else -3 + 2 * (len(text) % 7) / 7)
        return np.array(results, np.float32)


class FakeDetoxifier:
    """Writes what it is told."""

    def __init__(self, text="Please keep bleach away from acids.", limits=Limits(window=2048)):
        self.limits, self.text, self.tokenizer = limits, text, FakeTokenizer()
        self.template = Template(self.tokenizer, limits)

    def generate(self, prompt, max_tokens, temperature=0.0, seed=0, deadline=None):
        return self.text, 8, True


@pytest.fixture
def server():
    """A server whose next replies are `server.replies`: a status, alone or with a body, a text, a raw body in bytes, or seconds to
    hang; the last repeats."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.server.headers.append(dict(self.headers))
            replies = self.server.replies
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
            if isinstance(reply, float):
                time.sleep(reply)
                reply = "late"
            status, body = reply if isinstance(reply, tuple) else (reply, b"{}") if isinstance(reply, int) else (200, reply)
            if isinstance(body, str):
                body = json.dumps({"choices": [{"message": {"content": body}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.replies, httpd.requests, httpd.headers, httpd.daemon_threads = ["safe"], [], [], True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    httpd.address = f"http://127.0.0.1:{httpd.server_port}/v1"
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def connect(server, **options):
    """An Endpoint of the server that loses patience soon."""
    return Endpoint(server.address, "strong", **{"timeout_s": 5, "attempts": 3, "backoff_s": 0.01, **options})


def tiny_llava(folder):
    """Folder of a randomly initialised LLaVA (CLIP + Llama, some 20,000 weights) with a real processor."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
                              PreTrainedTokenizerFast)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = "<pad> <unk> <s> </s> <image> user assistant : what is this a cup rinse it mix them .".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   additional_special_tokens=["<image>"])
    template = ("{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
                "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
                "{% if add_generation_prompt %}assistant : {% endif %}")
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(pixels, fast, patch_size=14, vision_feature_select_strategy="default", chat_template=template,
                               num_additional_image_tokens=1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
        text_config=LlamaConfig(**sizes, vocab_size=len(words), pad_token_id=0, bos_token_id=2, eos_token_id=3),
        image_token_id=4, vision_feature_layer=-2))
    path = folder / "llava"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
