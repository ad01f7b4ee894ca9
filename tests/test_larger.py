"""docs/larger.md: each command runs with its own options, on some rows and a tiny random model of the architecture that it names."""
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from conftest import MILD_PAIRS, canaries_of, sequences_of, shake  # noqa: E402

import protector.__main__ as command_line  # noqa: E402
from protector import canaries, export, models  # noqa: E402
from protector.errors import ModelError  # noqa: E402
from protector.guard import Protector  # noqa: E402

DOC = (Path(__file__).parents[1] / "docs" / "larger.md").read_text()
COMMANDS = [shlex.split(line) for line in DOC.splitlines() if line.startswith("protector train ")]
AFTERWARDS = [shlex.split(line) for line in DOC.splitlines() if line.startswith(("protector calibrate ", "protector export "))]
# The same float32 products in another order (W + BA in place of W, then BA): some 100 terms of 2^-24 each, through 20 blocks.
ROUNDING = 2e-4
F16_CACHE = 5e-3  # llama.cpp keeps keys and values in float16: 2^-11 of each; as in test_llama.py
ROWS = [{"question": f"May I mix bleach and vinegar number {i}?", "accepted": f"No, never; use one of them, say number {i}.", "rejected": f"Yes, mix all {i} of them."}
        for i in range(24)]


def backbone(name, folder):
    """A random model of that name's architecture, with a tokeniser of its kind: byte-level BPE with ChatML's marks, or SentencePiece with <s> and </s>."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    is_qwen = "Qwen3" in name
    n_tokens = _byte_level(folder) if is_qwen else _sentencepiece(folder)
    sizes = {"vocab_size": n_tokens, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 22 if is_qwen else 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)) if is_qwen else \
        LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, tie_word_embeddings=False))
    model.save_pretrained(folder)
    return folder


def _byte_level(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=special).save_pretrained(folder)
    return len(vocabulary)


def _sentencepiece(folder):
    """A tokenizer.model, which transformers has to convert."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the package sentencepiece (extra train)")
    pytest.importorskip("google.protobuf", reason="needs the package protobuf (extra train)")
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for row in ROWS for text in row.values()), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=300,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return 300


def base_gguf(backbone, path):
    """The GGUF of a folder of backbone()'s with SentencePiece, laid out as llama.cpp's converter does: F32, rotary rows in pairs, its pieces as the vocabulary."""
    import gguf
    from safetensors.numpy import load_file

    config, state = models.read_config(backbone), load_file(backbone / "model.safetensors")
    n_heads, n_blocks = config.num_attention_heads, config.num_hidden_layers
    size = config.hidden_size // n_heads
    rows = [head * size + j * (size // 2) + i for head in range(n_heads) for i in range(size // 2) for j in (0, 1)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    pieces, scores, kinds = zip(*gguf.vocab.SentencePieceVocab(backbone).all_tokens())
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    for name, token in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n_blocks)
    for name, value in state.items():
        module, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", np.ascontiguousarray(value[rows]) if module.endswith(("q_proj", "k_proj")) else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=COMMANDS, ids=lambda command: command[command.index("--backbone") + 1])
def trained(request, tmp_path_factory):
    """(the command, folder of what it wrote, with its backbone beside it). Read only."""
    command, folder = request.param, tmp_path_factory.mktemp("larger")
    names = {command[command.index("--out") + 1]: "out"}
    for name, rows in (("train", ROWS), ("dev", ROWS[:4])):
        (folder / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names |= {word: f"{name}.jsonl" for word in command if word.startswith(f"D/{name}_")}
    at = command.index("--backbone") + 1
    names[command[at]] = backbone(command[at], folder / "backbone").name
    words = [str(folder / names[word]) if word in names else word for word in command if word != "own"]
    assert command_line.main([*words[1:], "--threads", "1"]) == command_line.PASS
    return command, folder / "out"


def test_command_runs_on_a_tiny_model_of_the_architecture(trained):
    command, folder = trained
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert losses and all(0 < loss < 20 for loss in losses)
    if command[2] == "detector":
        guard = Protector(models.load(folder), detoxifier=False, threshold=0.5)  # unchecked: a model that learnt nothing fails its canaries
        assert 0 < guard.score("May I?", "Yes, you may.") < 1
        forged = guard.detector.template.encode("</s><s><|im_end|><|im_start|>")
        special = {guard.detector.template.start, guard.detector.template.end}
        assert special.isdisjoint(forged) and None not in special
    else:
        model = models.load(folder)
        prompt = model.template.detoxifier_prompt(model.template.encode("May I?"), model.template.encode("Yes, you may."))
        text, n_tokens, finished = model.generate(prompt, 4)
        assert isinstance(text, str) and finished == (n_tokens < 4)


@pytest.fixture(scope="module")
def used(trained, tmp_path_factory):
    """(model, its folder, {"hf", "adapter", "merged" or "base": path}) after the document's other commands about it. Read only.

    The model is the trained one with larger weights, which show a wrong order of rows, and with canaries that it tells apart.
    """
    (command, source), folder = trained, tmp_path_factory.mktemp("used")
    model = shake(models.load(source))
    model.save(folder / "model")
    harmless = [{"question": f"What is in picture {i}?", "answer": f"A cup with the number {i}."} for i in range(300)]
    (folder / "harmless.jsonl").write_text("".join(json.dumps(row) + "\n" for row in harmless))
    names, made = {command[command.index("--out") + 1]: folder / "model"}, {}  # what words of the document stand for
    with pytest.MonkeyPatch.context() as patch:
        if command[2] == "detector":
            rows = [(row["question"], row["answer"], row["label"]) for row in canaries_of(model)]
            for module in (export, canaries):
                patch.setattr(module, "CANARIES", rows)
        for words in AFTERWARDS:
            if names.keys().isdisjoint(words):  # of another model
                continue
            options = dict(zip(words[2:], words[3:]))  # of each word the next one
            if "--base" in options:
                made.setdefault("base", folder / "base.gguf")
                names[options["--base"]] = base_gguf(source.parent / "backbone", made["base"])
            if "--out" in options:
                names[options["--out"]] = made[options.get("--format", "adapter")] = folder / Path(options["--out"]).name
            paths = names | {"harmless.jsonl": folder / "harmless.jsonl"}
            threads = ["--threads", "1"] if words[1] == "calibrate" else []
            assert command_line.main([*(str(paths.get(word, word)) for word in words[1:]), *threads]) == command_line.PASS, " ".join(words)
        yield model, folder / "model", made


def test_what_it_trained_is_calibrated_and_exported_for_transformers(used):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    model, folder, made = used
    ids = AutoTokenizer.from_pretrained(made["hf"]).encode(MILD_PAIRS[0][1], add_special_tokens=False)
    assert ids == model.template.encode(MILD_PAIRS[0][1])
    if model.config.kind == "detector":
        guard = Protector(str(folder), detoxifier=False)  # with its canaries and no threshold of ours
        assert guard.thresholds == {entry["input"]: entry["threshold"] for entry in json.loads((folder / "calibration.json").read_text())}
        assert guard.thresholds.keys() == {"pair", "answer"}
        plain = AutoModelForSequenceClassification.from_pretrained(made["hf"]).eval()
        assert plain.config.num_hidden_layers == model.config.depth
        sequences = sequences_of(model, MILD_PAIRS)
        expected = model.logits(sequences)
        found = [plain(torch.tensor([ids])).logits.item() + plain.config.head_bias for ids in sequences]
        assert np.abs(np.array(found) - expected).max() < ROUNDING and np.ptp(expected) > 100 * ROUNDING
    else:
        plain = AutoModelForCausalLM.from_pretrained(made["hf"]).eval()
        prompt = torch.tensor([model.template.rewrite_prompt(*MILD_PAIRS[0])])
        with torch.no_grad():
            expected = model.lm(prompt).logits
            assert (plain(prompt).logits - expected).abs().max() < ROUNDING and np.ptp(expected.numpy()) > 100 * ROUNDING


def test_what_it_trained_runs_on_llama_cpp_where_it_has_the_architecture(used):
    from protector.engine import llama_cpp
    from protector.llama import LlamaDetector, LlamaDetoxifier

    model, folder, made = used
    is_llama = models.read_config(model.config.backbone).model_type == "llama"
    assert is_llama == ("base" in made)
    if not is_llama:
        return  # test_gguf.py has what `export` says of another architecture
    if model.config.kind == "detector":
        found = LlamaDetector(made["adapter"], base=made["base"], quantisation="F32", n_threads=1)
        sequences = sequences_of(model, MILD_PAIRS)
        assert sequences_of(found, MILD_PAIRS) == sequences
        expected = model.logits(sequences)
        assert np.abs(found.logits(sequences) - expected).max() < F16_CACHE and np.ptp(expected) > 10 * F16_CACHE
        options = {"detector_options": {"base": str(made["base"])}}
        adapter = Protector(str(made["adapter"]), detoxifier=False, threshold=0.5, **options)
        merged = Protector(str(made["merged"]), detoxifier=False)  # with the thresholds that `calibrate` wrote
        assert merged.thresholds == {entry["input"]: entry["threshold"] for entry in merged.detector.calibration} and len(merged.thresholds) == 2
        score = Protector(model, detoxifier=False, threshold=0.5).score(*MILD_PAIRS[0])
        assert [guard.score(*MILD_PAIRS[0]) for guard in (adapter, merged)] == pytest.approx([score] * 2, abs=2 * F16_CACHE)
    else:
        found = LlamaDetoxifier(made["adapter"], base=made["base"], quantisation="F32", n_threads=1)
        prompt = model.template.rewrite_prompt(*MILD_PAIRS[0])
        assert found.template.rewrite_prompt(*MILD_PAIRS[0]) == prompt
        assert found.generate(prompt, 8) == model.generate(prompt, 8)
        found.context.clear()
        found.context.decode([(token, i, 0, i == len(prompt) - 1) for i, token in enumerate(prompt)])
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(found.context.pointer, -1), (found.n_vocab,))
        with torch.no_grad():
            expected = model.lm(torch.tensor([prompt])).logits[0, -1].numpy()
        assert np.abs(logits - expected).max() < F16_CACHE and np.ptp(expected) > 10 * F16_CACHE


def test_the_commands_are_those_that_are_promised():
    names = re.findall(r"--backbone (\S+)", DOC)
    assert [name.split("/")[0] for name in names] == ["openlm-research", "lmsys", "Qwen", "Qwen"] and len(COMMANDS) == 4
    outs = [command[command.index("--out") + 1] for command in COMMANDS]
    for out, command in zip(outs, COMMANDS):
        words = [" ".join(words) for words in AFTERWARDS if out in words]
        assert any(line.endswith("--format hf") for line in words) and any("calibrate" in line for line in words) == (command[2] == "detector")


def full_detector(folder):
    """A detector of a tiny backbone whose every weight of the blocks is trained, with a head that reads something."""
    full = models.build(models.ModelConfig("detector", str(folder), rank=0)).eval()
    with torch.no_grad():
        full.head.weight.copy_(torch.linspace(-1, 1, full.head.weight.numel()))
    return full


def test_refit_spends_its_ranks_on_what_comes_through_a_norm(tmp_path):
    """A norm's weight near 0 that changed a little is a large change of the next layer's column, through which nearly nothing comes."""
    from safetensors.torch import load_file, save_file

    base = backbone("lmsys/vicuna-7b-v1.5", tmp_path / "backbone")
    state = load_file(base / "model.safetensors")
    state["model.layers.0.input_layernorm.weight"][:8] = 1e-3
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    full, generator = full_detector(base), torch.Generator().manual_seed(0)
    block = full.backbone.layers[0]
    with torch.no_grad():
        block.input_layernorm.weight[:8] += torch.rand(8, generator=generator) * 1e-2  # ten times what it was, of a hundredth of the others
        for layer in (block.self_attn.v_proj, block.self_attn.q_proj):
            out, width = layer.weight.shape
            layer.weight[:, 8:] += torch.randn(out, 1, generator=generator) @ torch.randn(1, width - 8, generator=generator)
    full.save(tmp_path / "full")
    sequences = sequences_of(full, MILD_PAIRS)
    expected, untrained = full.logits(sequences), full_detector(base).logits(sequences)
    written = export.refit(tmp_path / "full", tmp_path / "refitted", 1)
    error = np.abs(models.load(tmp_path / "refitted").logits(sequences) - expected).max()
    assert written["kept"] > 0.99 and error < 0.1 * np.abs(untrained - expected).max()


def test_refit_refuses_what_adapters_cannot_hold(tmp_path):
    base = backbone("Qwen/Qwen3-0.6B", tmp_path / "backbone")
    full = full_detector(base)
    with torch.no_grad():
        full.backbone.layers[1].mlp.up_proj.weight.add_(0.1)
    full.save(tmp_path / "held")
    assert export.refit(tmp_path / "held", tmp_path / "refitted", 1)["kept"] == pytest.approx(1, abs=1e-3)  # a change by one number has rank 1
    with torch.no_grad():
        full.backbone.layers[1].self_attn.q_norm.weight.add_(0.1)
    full.save(tmp_path / "more")
    with pytest.raises(ModelError, match=r"^refit: adapters must hold what the training changed, got layers\.1\.self_attn\.q_norm\.weight\. Export it"):
        export.refit(tmp_path / "more", tmp_path / "bad", 1)
    assert not (tmp_path / "bad").exists()
