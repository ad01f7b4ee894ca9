"""The two models in PyTorch: backbone + linear head (harm detector), backbone + LM head (response detoxifier).

    detector    score = sigmoid( w . phi(q, a) + b ),   phi = final-norm hidden state of the answer's last token
    detoxifier  p( a_acc[t] | a_acc[<t], a_rej, q )

Either is a Hugging Face causal LM with LoRA adapters (rank > 0) or with all its weights trained (rank 0). A detector may
keep only the first `depth` blocks of its backbone.
"""
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import gguf
from .base import DEFAULT, base_path, cache_dir, file_sha256
from .calibrate import Calibration
from .canaries import check_canaries
from .errors import ModelError
from .head import harm_score
from .losses import IGNORE, detox_loss, harm_loss, prefix_harm_loss
from .template import TEMPLATE_ID, Limits, Template

FORMAT_VERSION = 1
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelConfig:
    """What rebuilds a model from its backbone; written to protector.json beside the weights."""

    kind: str  # "detector" | "detoxifier"
    backbone: str = DEFAULT  # "default", or a folder or hub name of a Hugging Face causal LM
    depth: int = 0  # blocks that a detector keeps; 0 = all
    rank: int = 16  # of the LoRA adapters; 0 = every weight is trained
    alpha: float = 32.0  # LoRA's scale is alpha / rank
    limits: Limits = Limits()
    template: str = TEMPLATE_ID
    format_version: int = FORMAT_VERSION


class HFTokenizer:
    """A Hugging Face tokenizer as template.py wants it: special-token parsing off."""

    def __init__(self, tokenizer):
        self.hf = tokenizer
        self._control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.fast = getattr(tokenizer, "backend_tokenizer", None)
        if self.fast is not None:
            self.fast.no_truncation()  # a tokenizer.json may ask for either; nothing is cut here
            self.fast.no_padding()

    def encode(self, text):
        if self.fast is not None:
            # "<|im_end|>" in a text is text. Trap: calling the tokenizer itself switches this off again.
            self.fast.encode_special_tokens = True
            return self.fast.encode(text, add_special_tokens=False).ids
        return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids):
        return self.hf.decode(ids, skip_special_tokens=True)

    def is_control(self, token):
        """Whether a token is a special one, which no rewrite may hold. Trap: all_special_ids names only some of them."""
        return token in self._control

    def special(self, name):
        if name in ("bos", "eos"):
            return getattr(self.hf, name + "_token_id")
        ids = self.hf.get_added_vocab() if hasattr(self.hf, "get_added_vocab") else {}
        return ids.get(name)


def base_folder(backbone=DEFAULT, local=False):
    """Folder or hub name of a backbone (local: its folder in the hub's cache); the default GGUF is dequantised once and kept (0.5 GB)."""
    if local and backbone != DEFAULT and not Path(backbone).is_dir():
        from huggingface_hub import snapshot_download

        return snapshot_download(backbone, local_files_only=True)  # trap: with from_pretrained's own option it still asks for some files
    if backbone != DEFAULT:
        return backbone
    source = base_path()
    folder = cache_dir() / f"base-{file_sha256(source)[:16]}"
    if not folder.exists():
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # Trap: the conversion loses the "smollm" pre-tokeniser's rule that each digit is a token of its own.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        with tempfile.TemporaryDirectory(dir=cache_dir()) as partial:  # renamed when whole: no half-written base
            os.chmod(partial, 0o755)
            model.save_pretrained(Path(partial) / "base")
            tokenizer.save_pretrained(Path(partial) / "base")
            try:
                os.rename(Path(partial) / "base", folder)
            except OSError:
                if not folder.exists():
                    raise
    return str(folder)


def load_tokenizer(backbone=DEFAULT, local=False):
    """HFTokenizer of a backbone; local: nothing is downloaded."""
    from transformers import AutoTokenizer

    return HFTokenizer(AutoTokenizer.from_pretrained(base_folder(backbone, local), trust_remote_code=False))


def _load_causal_lm(backbone, local):
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(base_folder(backbone, local), dtype=torch.float32, trust_remote_code=False,
                                                    use_safetensors=True)  # a pickle can run code
    except (OSError, ValueError) as error:
        raise ModelError(f"load: backbone must be a Hugging Face causal LM, got {backbone}. {error}"
                         + " Nothing is downloaded to load a trained model: get it first." * local) from None


def _with_lora(module, config):
    """Add trainable adapters to every linear layer of the blocks, or unfreeze the blocks (rank 0)."""
    module.requires_grad_(config.rank == 0)
    # The embedding is the largest tensor of a small model and learns little from one task: it stays as it is.
    module.get_input_embeddings().requires_grad_(False)
    if config.rank == 0:
        return module
    from peft import LoraConfig, get_peft_model

    return get_peft_model(module, LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(LORA_TARGETS), lora_dropout=0.0, bias="none"))


class _Model(nn.Module):
    """What both models share: trainable tensors by name, save, and how the guard sees them."""

    config: ModelConfig
    tokenizer: HFTokenizer
    name = "torch"
    path = None  # folder it was loaded from
    rounded = None  # "INT8" once its products are
    calibration = ()  # calibrate.Calibration as dicts
    backbone_sha256 = None  # that its folder names; "" where an earlier version wrote it, None for a new model
    metadata = None  # gguf.Metadata of the adapter file it was read from

    @property
    def limits(self):
        return self.config.limits

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def quantisation(self):
        """The name of the weights' type, as GGUF files call it; "INT8" for int8.py's."""
        return self.rounded or {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[next(self.parameters()).dtype]

    def check_whole(self, what):
        """See that the tensors are those that were trained.

        Raises:
            ValueError: they were rounded.
        """
        if self.rounded:
            raise ValueError(f"{what}: model must have the tensors that were trained, got them in {self.rounded}. Load it without.")

    def compile_blocks(self):
        """torch.compile for any length, one by one: the others run what the first was compiled to."""
        for layer in self.blocks.layers:
            layer.compile(dynamic=True)

    def trained(self):
        """{name: tensor} of what training changes."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def frozen_sha256(self):
        """Digest of what training leaves alone, in float32 as it was loaded: with another backbone the scores are others."""
        digest = hashlib.sha256()
        for value in self.parameters():
            if not value.requires_grad:
                digest.update(str(tuple(value.shape)).encode())
                digest.update(value.detach().float().cpu().reshape(-1).numpy())
        return digest.hexdigest()

    def save(self, folder):
        """Write model.safetensors (trained tensors only) and protector.json, with the backbone's digest."""
        from safetensors.torch import save_file

        self.check_whole("save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.detach().contiguous().cpu() for name, value in self.trained().items()},
                  folder / "model.safetensors")
        config = {**asdict(self.config), "backbone_sha256": self.backbone_sha256 or self.frozen_sha256()}
        (folder / "protector.json").write_text(json.dumps(config, indent=1) + "\n")


class HarmDetector(_Model):
    """A causal LM whose last layer is a linear layer with one output.

    Args:
        config: ModelConfig of kind "detector".
    Source: MLLM-Protector, harm detector.
    """

    def __init__(self, config, local=False):
        super().__init__()
        lm = _load_causal_lm(config.backbone, local)
        backbone = lm.base_model
        n_blocks = len(backbone.layers)
        if not 0 <= config.depth <= n_blocks:
            raise ValueError(f"HarmDetector: depth must be 0 to {n_blocks}, got {config.depth}. Choose another depth.")
        depth = config.depth or n_blocks
        backbone.layers = backbone.layers[:depth]
        backbone.config.num_hidden_layers = depth
        for name in ("layer_types", "mlp_layer_types"):  # Qwen3's and others': transformers saves no configuration that names other blocks
            if getattr(backbone.config, name, None):
                setattr(backbone.config, name, getattr(backbone.config, name)[:depth])
        self.config = replace(config, depth=depth)
        self.tokenizer = load_tokenizer(config.backbone, local)
        self.template = Template(self.tokenizer, config.limits)
        self.backbone = _with_lora(backbone, config)
        self.head = nn.Linear(backbone.config.hidden_size, 1)
        # Zero: the first gradient then moves the head alone, and training starts at the loss of an even guess, log 2.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._sha256 = None  # once the tensors are no longer those that were trained

    def to_int8(self):
        """Merge the adapters and round the blocks' products to int8, in place; see int8.py. Such a detector only scores whole answers.

        Raises:
            ModelError: this machine's int8 products aren't exact.
        """
        from . import int8

        int8.check_product()
        self._sha256, self.rounded = self.model_sha256, "INT8"
        if self.config.rank:
            self.backbone = self.backbone.merge_and_unload()
        int8.in_int8(self.blocks.layers)

    @property
    def blocks(self):
        """What ids become hidden states in."""
        return self.backbone

    def hidden(self, ids):
        """(B, T) ids -> (B, T, d) final-norm hidden states. Rows are padded on the right, where a causal mask hides it from every token before."""
        return self.blocks(input_ids=ids, use_cache=False).last_hidden_state

    def forward(self, ids):
        """Logits of every position: (B, T) int64 -> (B, T) float32."""
        return self.head(self.hidden(ids).to(self.head.weight.dtype)).squeeze(-1).float()  # (B, T, d) -> (B, T)

    @property
    def model_sha256(self):
        """Digest of the configuration, the backbone and the trained tensors: calibrations refer to it."""
        if self.metadata is not None:
            return self.metadata.model_sha256
        if self._sha256 is not None:
            return self._sha256
        backbone = self.frozen_sha256() if self.backbone_sha256 is None else self.backbone_sha256
        digest = hashlib.sha256(json.dumps({**asdict(self.config), "backbone": backbone}, sort_keys=True).encode())
        for name, value in sorted(self.trained().items()):
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def logits(self, sequences, deadline=None, batch_tokens=4096):
        """Harm logits at the last token of each sequence of ids; see llama.LlamaDetector.logits."""
        results = np.empty(len(sequences), np.float32)
        for group, hidden, last in self._groups(sequences, deadline, batch_tokens):
            results[group] = self._head_logits(hidden, last)
        return results

    def running_logits(self, sequences, starts, deadline=None, batch_tokens=4096):
        """Harm logits at every token from its sequence's start on; see llama.LlamaDetector.running_logits."""
        results = [None] * len(sequences)
        for group, hidden, _ in self._groups(sequences, deadline, batch_tokens):
            logits = self._head_logits(hidden.flatten(0, 1)).reshape(hidden.shape[:2])  # (B, T, d) -> (B, T)
            for row, i in enumerate(group):
                results[i] = logits[row, starts[i]:len(sequences[i])]
        return results

    @torch.inference_mode()
    def _groups(self, sequences, deadline, batch_tokens):
        """(indices, (B, T, d) hidden states, (B,) index of each last token) of batches of like length.

        Right padding under a causal mask: a row's score doesn't depend on what else is in its batch, to the rounding of
        the matrix product. In int8 that isn't little: each sequence is a batch.
        """
        if self.rounded:
            batch_tokens = 0
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        while order:
            group, longest = [], 0
            while order and max(longest, len(sequences[order[0]])) * (len(group) + 1) <= max(batch_tokens, len(sequences[order[0]])):
                longest = max(longest, len(sequences[order[0]]))
                group.append(order.pop(0))
            if deadline:
                deadline()
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            for row, i in enumerate(group):
                ids[row, :len(sequences[i])] = torch.tensor(sequences[i])
            last = torch.tensor([len(sequences[i]) - 1 for i in group])
            yield group, self.hidden(ids.to(self.device)), last.to(self.device)  # (B, T, d), (B,)

    def _head_logits(self, hidden, index=None):
        """(B, T, d) at index, or (n, d) -> (n,) float32 on the CPU, by the fused operator."""
        weight = self.head.weight.detach().float()[0]
        return harm_score(hidden, weight, self.head.bias.item(), index=index, output="logit").values.float().cpu().numpy()

    def open(self):
        """A cursor for one stream; see llama.LlamaDetector.open."""
        return _Cursor(self)

    def loss(self, batch, prefix_weight):
        """(1 - lambda) L_harm at the last token + lambda L_harm over all prefixes; see losses.py."""
        logits = self(batch["ids"])
        last = logits.gather(1, batch["last"][:, None]).squeeze(1)  # (B, T) -> (B,)
        loss = harm_loss(last, batch["labels"], batch["weights"])
        if prefix_weight:
            over_prefixes = prefix_harm_loss(logits, batch["labels"], batch["answer"], batch["weights"])
            loss = (1 - prefix_weight) * loss + prefix_weight * over_prefixes
        return loss


class _Cursor:
    """Scores the tokens of one stream, each once, on a growing cache."""

    def __init__(self, detector):
        self.detector, self.cache = detector, None

    @torch.inference_mode()
    def start(self, ids):
        self.cache = None
        self._step(ids)

    @torch.inference_mode()
    def feed(self, ids, check=None):
        if check:
            check()
        return self.detector._head_logits(self._step(ids)[0]) if ids else []  # (1, n, d) -> (n,)

    def _step(self, ids):
        output = self.detector.backbone(input_ids=torch.tensor([ids], device=self.detector.device),
                                        past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        return output.last_hidden_state

    def close(self):
        self.cache = None


class ResponseDetoxifier(_Model):
    """A causal LM that writes the accepted answer from the question and the rejected one.

    Args:
        config: ModelConfig of kind "detoxifier".
    Source: MLLM-Protector, response detoxifier.
    """

    def __init__(self, config, local=False):
        super().__init__()
        lm = _load_causal_lm(config.backbone, local)
        self.config = replace(config, depth=len(lm.base_model.layers))
        self.tokenizer = load_tokenizer(config.backbone, local)
        self.template = Template(self.tokenizer, config.limits)
        self.lm = _with_lora(lm, config)

    @property
    def _causal(self):
        return self.lm.get_base_model() if self.config.rank else self.lm

    @property
    def blocks(self):
        """What ids become hidden states in."""
        return self._causal.base_model

    def loss(self, batch, prefix_weight=0.0):
        """L_detox. The vocabulary is projected only where there is a target: it costs as much as eight blocks."""
        return self.loss_of(self.blocks(input_ids=batch["ids"], use_cache=False).last_hidden_state, batch["targets"])

    def loss_of(self, hidden, targets):
        """L_detox of the last block's states (B, T, d), padded on the right, and targets (B, T)."""
        has_target = targets != IGNORE  # (B, T)
        logits = self._causal.lm_head(hidden[has_target])  # (B, T, d) -> (M, V)
        return detox_loss(logits[None], targets[has_target][None])

    @torch.inference_mode()
    def generate(self, prompt, max_tokens, temperature=0.0, seed=0, deadline=None):
        """Text that the model writes after the prompt; see llama.LlamaDetoxifier.generate."""
        rng = torch.Generator(self.device).manual_seed(seed)
        ids, cache, written = torch.tensor([prompt], device=self.device), None, []
        while len(written) < max_tokens:
            if deadline:
                deadline()
            output = self.lm(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[0, -1].float()  # (V,)
            if temperature <= 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / temperature).softmax(0), 1, generator=rng))
            if token == self.template.end or self.tokenizer.is_control(token):
                return self.tokenizer.decode(written), len(written), True
            written.append(token)
            ids = torch.tensor([[token]], device=self.device)
        return self.tokenizer.decode(written), len(written), False


KINDS = {"detector": HarmDetector, "detoxifier": ResponseDetoxifier}


def build(config, local=False):
    """A new model of the kind that the config names; local: nothing is downloaded."""
    if config.kind not in KINDS:
        raise ValueError(f"build: kind must be one of {', '.join(KINDS)}, got {config.kind}. Name one.")
    return KINDS[config.kind](config, local)


def from_gguf(path):
    """The PyTorch model of an adapter file that runs on the default base: the shipped weights, for a GPU or for parity.

    Args:
        path: adapter GGUF.
    Returns:
        HarmDetector or ResponseDetoxifier, float32 on the CPU.
    Raises:
        ModelError: a merged file, or an adapter of another base.
    """
    metadata = gguf.read_metadata(path)
    if metadata.merged or metadata.base_sha256 != file_sha256(base_path()):
        raise ModelError(f"load: {path} must be an adapter of the default base to run in PyTorch, got another file. "
                         "Use the folder that it was exported from.")
    shape = read_config(base_folder())
    matrices, alpha = gguf.read_adapter(path, shape.num_attention_heads, shape.num_key_value_heads)
    rank = next(iter(matrices.values()))[0].shape[0]
    model = build(ModelConfig(metadata.kind, DEFAULT, metadata.depth, rank, alpha, metadata.limits))
    wanted = model.trained()
    with torch.no_grad():
        for name, value in wanted.items():
            module = next((key for key in matrices if f".{key}.lora_" in name), None)
            if module:
                value.copy_(torch.from_numpy(matrices[module][0 if ".lora_A." in name else 1]))
        if metadata.kind == "detector":
            model.head.weight.copy_(torch.from_numpy(metadata.head_weight)[None])
            model.head.bias.fill_(metadata.head_bias)
    model.metadata, model.calibration, model.path = metadata, metadata.calibration, Path(path)
    return model


def read_config(folder):
    """Hugging Face configuration of a backbone."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load(folder, device="auto", dtype=None, n_threads=None, kind=None, quantisation=None, compile=False):
    """A trained model, in eval mode. Nothing is downloaded.

    Args:
        folder: what `protector train` wrote, or an adapter GGUF of the default base.
        device: "auto" (a GPU where there is one), "cpu", "cuda".
        dtype: of the backbone; None = float32 on a CPU, bfloat16 on a GPU.
        n_threads: CPU threads of PyTorch, in the whole process; None or 0 = as they are.
        kind: "detector" | "detoxifier" of a model that is to guard; a detector's canaries are scored then.
        quantisation: "INT8" rounds a detector's products on a CPU (int8.py); None leaves them as they are.
        compile: torch.compile the rounded blocks: about a minute for the canaries, less for the first answers. It needs a C++ compiler.
    Raises:
        ValueError: another quantisation, one that doesn't go with the device, the dtype or the kind, or compile without it.
        ModelError: a file is missing or cut, its tensors don't fit the configuration, it is of the other kind or fails its canaries.
    """
    wanted = (quantisation, torch.device("cpu" if device == "auto" else device).type, dtype or torch.float32, kind or "detector")
    if (quantisation is not None or compile) and wanted != ("INT8", "cpu", torch.float32, "detector"):
        raise ValueError(f"load: quantisation must be INT8, of a detector in float32 on a CPU, and nothing else is compiled, got {', '.join(map(str, wanted))}. "
                         "Leave it out, or use a GGUF file with llama.cpp.")
    if n_threads:
        torch.set_num_threads(n_threads)
    model = from_gguf(folder) if Path(folder).is_file() else _from_folder(Path(folder))
    needed = "detector" if quantisation else kind
    if needed not in (None, model.config.kind):
        raise ModelError(f"load: {folder} must be a {needed}, got a {model.config.kind}. Pass the other file.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and quantisation is None else "cpu"
    body = model.backbone if model.config.kind == "detector" else model.lm
    body.to(dtype or (torch.bfloat16 if device == "cuda" else torch.float32))  # the head stays float32
    model = model.to(device).eval()
    if quantisation:
        model.to_int8()
    if compile:
        model.compile_blocks()
    if kind == "detector":
        check_canaries(model)
    return model


def _from_folder(folder):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = json.loads((folder / "protector.json").read_text())
        if values.get("format_version") != FORMAT_VERSION or values.get("template") != TEMPLATE_ID:
            raise ModelError(f"load: {folder} must have format version {FORMAT_VERSION} and template {TEMPLATE_ID}, got "
                             f"{values.get('format_version')} and {values.get('template')}. Export it again.")
        values["limits"] = Limits(**values["limits"])
        backbone_sha256 = values.pop("backbone_sha256", "")
        config = ModelConfig(**values)
        model = build(config, local=True)
        tensors = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError, TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        raise ModelError(f"load: {folder} must hold protector.json and a whole model.safetensors, got "
                         f"{type(error).__name__}: {error}. Train it again or copy the folder whole.") from None
    wanted = model.trained()
    if wanted.keys() != tensors.keys() or any(wanted[name].shape != tensors[name].shape for name in wanted):
        raise ModelError(f"load: {folder}/model.safetensors must fit its protector.json, got other tensors. "
                         "Copy the folder whole.")
    if backbone_sha256 and backbone_sha256 != model.frozen_sha256():
        raise ModelError(f"load: {folder} must run on the backbone that it was trained on, got other weights under {config.backbone}. "
                         "Restore them, or train it again.")
    model.backbone_sha256 = backbone_sha256
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise ModelError(f"load: {folder}/model.safetensors must be finite, got NaN or Inf. Train it again.")
    with torch.no_grad():
        for name, value in tensors.items():
            wanted[name].copy_(value)
    model.path = folder
    calibration = folder / "calibration.json"
    if calibration.exists():
        try:
            model.calibration = tuple(json.loads(calibration.read_text()))
            for entry in model.calibration:
                Calibration(**entry)
        except (TypeError, ValueError):
            raise ModelError(f"load: {calibration} must be a JSON list of calibrations, got something else. Calibrate again.") from None
    return model
