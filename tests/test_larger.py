"""docs/larger.md: each command runs with its own options, on some rows and a tiny random model of the architecture that it names."""
import json
import re
import shlex
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

import protector.__main__ as command_line  # noqa: E402
from protector import models  # noqa: E402
from protector.guard import Protector  # noqa: E402

DOC = (Path(__file__).parents[1] / "docs" / "larger.md").read_text()
COMMANDS = [shlex.split(line) for line in DOC.splitlines() if line.startswith("protector train ")]
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


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[command.index("--backbone") + 1])
def test_command_runs_on_a_tiny_model_of_the_architecture(command, tmp_path):
    kind, names = command[2], {command[command.index("--out") + 1]: "out"}
    for name, rows in (("train", ROWS), ("dev", ROWS[:4])):
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names |= {word: f"{name}.jsonl" for word in command if word.startswith(f"D/{name}_")}
    at = command.index("--backbone") + 1
    names[command[at]] = backbone(command[at], tmp_path / "backbone").name
    words = [str(tmp_path / names[word]) if word in names else word for word in command if word != "own"]
    assert command_line.main([*words[1:], "--threads", "1"]) == command_line.PASS
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert losses and all(0 < loss < 20 for loss in losses)
    trained = str(tmp_path / "out")
    if kind == "detector":
        guard = Protector(models.load(trained), detoxifier=False, threshold=0.5)  # unchecked: a model that learnt nothing fails its canaries
        assert 0 < guard.score("May I?", "Yes, you may.") < 1
        forged = guard.detector.template.encode("</s><s><|im_end|><|im_start|>")
        special = {guard.detector.template.start, guard.detector.template.end}
        assert special.isdisjoint(forged) and None not in special
    else:
        model = models.load(trained)
        prompt = model.template.detoxifier_prompt(model.template.encode("May I?"), model.template.encode("Yes, you may."))
        text, n_tokens, finished = model.generate(prompt, 4)
        assert isinstance(text, str) and finished == (n_tokens < 4)


def test_the_commands_are_those_that_are_promised():
    names = re.findall(r"--backbone (\S+)", DOC)
    assert [name.split("/")[0] for name in names] == ["openlm-research", "lmsys", "Qwen", "Qwen"] and len(COMMANDS) == 4
