"""A detector and a detoxifier without weights: letters are tokens, and a word makes an answer harmful."""
import numpy as np

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


def tiny_llava(folder):
    """Folder of a randomly initialised LLaVA (CLIP + Llama, some 20,000 weights) with a real processor."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "user", "assistant", ":", "what", "is", "this", "a", "cup", "rinse", "it", "mix", "them", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   additional_special_tokens=["<image>"])
    template = ("{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} "
                "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}")
    processor = LlavaProcessor(CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), fast, patch_size=14,
                               vision_feature_select_strategy="default", chat_template=template, num_additional_image_tokens=1)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14),
        text_config=LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
                    bos_token_id=2, eos_token_id=3), image_token_id=4, vision_feature_layer=-2))
    path = folder / "llava"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
