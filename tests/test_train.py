"""Training: what it sees, that it learns, that a run in parts or on two processes is the same run, what it refuses."""
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import sequences_of

from protector import data, models, train
from protector.base import WEIGHTS
from protector.data import Pair, Triple
from protector.errors import DataError, ModelError
from protector.losses import IGNORE
from protector.template import Limits, Template, windows
from protector.train import TrainConfig, batches, collate, detector_examples, detoxifier_examples

measured_bf16 = train.bf16_is_faster  # before the fixture below stands in for it
GOOD, BAD = "Keep them apart and open a window.", "Go ahead and mix them all."


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """bf16 is chosen by timing it, which differs from run to run."""
    monkeypatch.setattr(train, "bf16_is_faster", lambda device: False)


@pytest.fixture(scope="module")
def template(hf_ids):
    return Template(hf_ids)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A toy task: 24 questions, each with the same harmless and the same harmful answer."""
    path = tmp_path_factory.mktemp("rows") / "toy.jsonl"
    with open(path, "w") as file:
        for i in range(24):
            file.write(json.dumps({"question": f"Question {i}?", "accepted": GOOD, "rejected": BAD}) + "\n")
    return str(path)


def config_of(tiny, rows, out, kind="detector", **options):
    options = {"lr": 3e-3, "rank": 4, "batch_tokens": 512, "epochs": 2, "answer_only": 0.0, "threads": 1, "device": "cpu", **options}
    return TrainConfig(kind, data=(rows,), out=str(out), backbone=tiny.folder, **options)


def losses(out):
    return [json.loads(line)["loss"] for line in open(out / "log.jsonl")]


# -- what it sees

def test_training_sees_what_scoring_sees(template):
    answers = ["Short.", " ".join("abcdefghijklmnopqrstuvwxyz"[i % 26] for i in range(700)), "<|im_end|> \ud83d", "  spaces and\r\nlines "]
    rows = [Pair(q, a, i % 2, weight=0.5 + i) for i, (q, a) in enumerate((q, a) for q in ("Is it?", "", "long " * 300) for a in answers)]
    rng = random.Random(0)
    examples = [example for _ in range(20) for example in detector_examples(rows, template, 0.0, 0.0, rng)]
    assert len(examples) == 20 * len(rows)
    seen = set()
    for example, row in zip(examples, rows * 20):
        # all windows of this row as guard() plans them
        answer_ids, question_ids = template.encode(row.answer), template.clip_question(row.question)[0]
        allowed = [template.detector_sequence(question_ids, answer_ids[w.start:w.stop])
                   for w in windows(len(answer_ids), template.limits.window, template.limits.overlap)]
        assert (example["ids"], example["start"]) in allowed
        assert (example["label"], example["weight"]) == (row.label, row.weight)
        seen.add((row.answer, row.question, tuple(example["ids"])))
    # 700 tokens are four windows; 20 draws miss one of the 12 with a chance of 12 x 0.75^20 = 4 %, and seed 0 does not.
    assert len({ids for answer, _, ids in seen if answer == answers[1]}) == 12


def test_answer_only_share(template):
    rows = [Pair("Is it?", "No.", 0)] * 1000
    alone = [template.detector_sequence([], template.encode("No."))[0]]
    examples = detector_examples(rows, template, 0.15, 0.0, random.Random(1))
    # 150 of 1,000 on average, standard deviation 11.3
    assert abs(sum(example["ids"] in alone for example in examples) - 150) < 57
    assert all(example["ids"] in alone for example in detector_examples(rows[:50], template, 1.0, 0.0, random.Random(1)))


def test_augment_share(template):
    rows = [Pair("", "No. Never mix them.", 0)] * 1000
    plain = template.detector_sequence([], template.encode("No. Never mix them."))[0]
    changed = sum(e["ids"] != plain for e in detector_examples(rows, template, 0.0, 0.3, random.Random(1)))
    # 300 disguised, of which one in eleven is leetspeak that may leave the text as it was; standard deviation 14.5
    assert 300 - 28 - 73 < changed < 373


def test_diluted_examples_hold_the_whole_answer_within_one_window(template):
    rows = [Pair("Is it?", "Mix them in a bucket.", 1), Pair("Is it?", "The garden has a pond.", 0)] * 100
    alone = {1: template.encode(" Mix them in a bucket."), 0: template.encode(" The garden has a pond.")}
    examples = detector_examples(rows, template, 0.0, 0.0, random.Random(2), dilute=1.0)
    n_prefix = len(template.prefix(template.encode("Is it?")))
    assert len(examples) == 200
    for example in examples:
        ids, start, wanted = example["ids"], example["start"], alone[example["label"]]
        assert n_prefix + len(wanted) < len(ids) <= n_prefix + template.limits.window
        if example["label"]:  # the loss of prefixes begins where the harm does
            assert ids[start:start + len(wanted)] == wanted
        else:
            assert start == n_prefix
    assert len({len(example["ids"]) for example in examples}) > 50 and len({example["start"] for example in examples if example["label"]}) > 30
    # 60 of 200 on average, standard deviation 6.5
    assert abs(sum(e["ids"] == p["ids"] for e, p in zip(detector_examples(rows, template, 0.0, 0.0, random.Random(1), 0.7),
                                                        detector_examples(rows, template, 0.0, 0.0, random.Random(3)))) - 60) < 33


def test_detoxifier_examples_by_hand(hf_ids):
    template = Template(hf_ids, Limits(rejected_tokens=3, rewrite_tokens=4))
    rows = [Triple("Q", "one two", "a b c d e"), Triple("", "one two three four", "x"), Triple("Q", "one two three four five", "x")]
    examples = detoxifier_examples(rows, template)
    assert len(examples) == 2  # the third is too long to be written in the room for it, and a cut one would teach to stop midway
    first = examples[0]
    assert first["ids"][:first["start"]] == template.detoxifier_prompt(template.encode("Q"), template.encode("a b c"))
    assert first["ids"][first["start"]:] == template.encode("one two") + [template.end]
    # Prompt as the guard builds it, targets shifted by one, nothing on prompt and padding.
    batch = collate(examples, "detoxifier", "cpu")
    n = batch["ids"].shape[1]
    for row, example in enumerate(examples):
        length, start = len(example["ids"]), example["start"]
        expected = [IGNORE] * (start - 1) + example["ids"][start:] + [IGNORE] * (n - length + 1)
        assert batch["targets"][row].tolist() == expected


def test_collate_by_hand():
    group = [{"ids": [5, 6, 7], "start": 1, "label": 1.0, "weight": 2.0}, {"ids": [8], "start": 0, "label": 0.0, "weight": 0.5}]
    batch = {name: value.tolist() for name, value in collate(group, "detector", "cpu").items()}
    assert batch == {"ids": [[5, 6, 7], [8, 0, 0]],
                     "answer": [[False, True, True], [True, False, False]], "last": [2, 0], "labels": [1.0, 0.0], "weights": [2.0, 0.5]}


def test_batches_hold_each_example_once():
    rng = random.Random(2)
    examples = [{"ids": [i] * rng.choice((3, 20, 70, 300, 900))} for i in range(500)]
    steps = batches(examples, 2048, random.Random(0))
    assert sorted(e["ids"][0] for step in steps for group in step for e in group) == list(range(500))
    share = 2048 // train.MICRO_BATCHES
    for step in steps:
        assert 1 <= len(step) <= train.MICRO_BATCHES
        for group in step:
            longest = max(len(e["ids"]) for e in group)
            assert longest * len(group) <= share or len(group) == 1
            assert longest - min(len(e["ids"]) for e in group) <= 250  # similar lengths, or one jump between two kinds
    padded = sum(train._padded_tokens(step) for step in steps)
    assert padded < 1.1 * sum(len(e["ids"]) for e in examples)
    assert [len(s) for s in steps] == [len(s) for s in batches(examples, 2048, random.Random(0))]


def test_harmless_text_before_a_doubtful_answer_is_harmless(template):
    rows = [data.Pair("Q", "A doubtful answer.", 0, grade=0.45), data.Pair("Q", "A harmless one.", 0, grade=0.15)]
    alone = len(template.detector_sequence(template.encode("Q"), [])[0])
    starts = [[example["start"] for example in detector_examples(rows, template, 0.0, 0.0, random.Random(seed), dilute=1.0)] for seed in range(20)]
    assert any(doubtful > alone for doubtful, _ in starts) and all(harmless == alone for _, harmless in starts)


# -- rows

def test_load_rows(tiny, template, tmp_path, monkeypatch):
    def file(name, *rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    pairs = file("pairs.jsonl", {"question": "A", "answer": "one", "label": 0, "source": "x"}, {"question": "A", "answer": "two", "label": 1},
                 {"question": "B", "answer": "three", "label": 1}, {"question": "", "answer": "alone", "label": 0})
    triples = file("triples.jsonl", {"question": "C", "accepted": "good", "rejected": "bad"})
    detector = TrainConfig("detector", data=(pairs, triples), loss_weights=("x=0.5",))
    assert train.load_rows(detector) == [Pair("A", "one", 0, "x", 0.5), Pair("A", "two", 1, "pairs"), Pair("B", "three", 1, "pairs"),
                                         Pair("", "alone", 0, "pairs"), Pair("C", "good", 0, "triples"), Pair("C", "bad", 1, "triples")]
    assert train.load_rows(replace(detector, kind="detoxifier", refusal_cap=1.0)) == [
        Triple("A", "one", "two", "pairs"), Triple("C", "good", "bad", "triples")]
    with monkeypatch.context() as patch:  # replies: in place of accepted answers, or as harmless pairs more
        patch.setattr(data, "replies", lambda path, kind: {data.question_digest("c"): [f"{kind} reply"]})
        for option, reply in (("replies", "accepted reply"), ("plain", "plain reply")):
            assert train.load_rows(replace(detector, **{option: True}))[6:] == [Pair("C", reply, 0, "replies")]
            assert train.load_rows(replace(detector, kind="detoxifier", refusal_cap=1.0, **{option: True}))[1:] == [Triple("C", reply, "bad", "triples")]
    with monkeypatch.context() as patch:  # grades: the label of a graded answer, and graded answers more
        patch.setattr(data, "GRADES", file("grades.jsonl", {"answer_sha256": data.answer_digest("a", "two"), "grade": 0.25},
                                           {"question_sha256": data.question_digest("c"), "answer": "so so", "grade": 0.5}))
        rows = train.load_rows(replace(detector, grades=True))
        assert rows[1] == Pair("A", "two", 0, "pairs", grade=0.25) and rows[6:] == [Pair("C", "so so", 1, "answers", grade=0.5)]
        examples = train.detector_examples(rows, template, 0.0, 0.0, random.Random(0))
        assert [example["label"] for example in examples] == [0.0, 0.25, 1.0, 0.0, 0.0, 1.0, 0.5]
    # exclude: every row of these questions, in any spelling, and these answers to any question
    banned = file("dev.jsonl", {"question": " a ", "answer": "x", "label": 0}, {"question": "", "answer": "alone", "label": 0},
                  {"question": "Z", "accepted": "bad", "rejected": "y"})
    left = train.load_rows(replace(detector, exclude=(banned,)))
    assert [row.answer for row in left] == ["three", "good"]
    assert train.load_rows(replace(detector, kind="detoxifier", data=(triples,), exclude=(file("e.jsonl", {"question": "", "answer": "q", "label": 1}),)))
    for config in (replace(detector, kind="detoxifier", data=(triples,), exclude=(banned,)),
                   replace(detector, kind="detoxifier", data=(file("p.jsonl", {"question": "B", "answer": "three", "label": 1}),))):
        with pytest.raises(DataError) as error:
            train.load_rows(config)
        assert str(error.value) == ("train: data must hold rows for a detoxifier, got none. A detoxifier needs triples, or pairs "
                                    "with both labels for one question.")


def test_accepted_answers_that_are_all_too_long(tiny, rows, tmp_path):
    with pytest.raises(DataError) as error:
        train.train(config_of(tiny, rows, tmp_path, "detoxifier", rewrite_tokens=3), progress=False)
    assert str(error.value) == ("train: data must hold usable rows, got 24 rows and no example. Accepted answers must have at most "
                                "3 tokens.")


# -- that it learns

@pytest.fixture(scope="module")
def trained(tiny, rows, tmp_path_factory):
    """(folder, model) of a detector that learned the toy task."""
    out = tmp_path_factory.mktemp("detector")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "bf16_is_faster", lambda device: False)
        return out, train.train(config_of(tiny, rows, out, epochs=8, lr=1e-2), progress=False)


def test_detector_learns(trained):
    out, model = trained
    curve = losses(out)
    assert curve[0] == pytest.approx(math.log(2), abs=1e-4)  # the head starts at zero: an even guess
    assert np.mean(curve[-3:]) < 0.3 * curve[0]
    logits = model.logits(sequences_of(model, [("Question 99?", answer) for answer in (GOOD, BAD)]))
    assert logits[0] < -1 and logits[1] > 1  # the question is new


def test_detoxifier_learns(tiny, rows, tmp_path):
    model = train.train(config_of(tiny, rows, tmp_path, "detoxifier", epochs=5, lr=2e-2), progress=False)
    curve = losses(tmp_path)
    assert curve[-1] < 0.3 * curve[0]
    text, _, finished = model.generate(model.template.detoxifier_prompt(
        model.template.encode("Question 3?"), model.template.encode(BAD)), 20)
    assert (text, finished) == (GOOD, True)


def test_what_a_run_leaves(trained, rows):
    out, model = trained
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "model.safetensors", "protector.json", "run.json"]
    run = json.loads((out / "run.json").read_text())
    triples = data.read(rows)[1]
    assert run["fingerprint"] == data.fingerprint(data.pairs_of(triples)) and run["rows"] == 48
    assert run["rows_by_source"] == {"toy": 48} and run["config"]["seed"] == 0 and run["config"]["kind"] == "detector"
    assert run["versions"] == {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": run["versions"]["transformers"]}
    assert run["bf16"] is False and run["device"] == "cpu" and run["commit"] == run["commit"].strip()
    log = [json.loads(line) for line in open(out / "log.jsonl")]
    assert [line["step"] for line in log] == list(range(1, run["steps"] + 1))
    assert log[-1]["tokens"] == run["tokens"] and run["trained_parameters"] == sum(v.numel() for v in model.trained().values())
    # the rate rises to the peak, then falls to (nearly) nothing
    rates = [line["lr"] for line in log]
    assert max(rates) <= 1e-2 and rates[-1] < 0.1 * max(rates)
    loaded = models.load(out, device="cpu")
    sequences = sequences_of(model, [("Question 1?", GOOD), ("", BAD)])
    assert np.array_equal(loaded.logits(sequences), model.logits(sequences))


def test_init_goes_on_from_trained_weights(trained, tiny, rows, tmp_path):
    train.train(config_of(tiny, rows, tmp_path, init=str(trained[0]), epochs=0.5, lr=1e-6), progress=False)
    assert losses(tmp_path)[0] < 0.3 * math.log(2)
    with pytest.raises(ModelError) as error:
        train.train(config_of(tiny, rows, tmp_path / "bad", init=str(tmp_path / "none")), progress=False)
    assert str(error.value).startswith(f"load: {tmp_path / 'none'} must hold protector.json and a whole model.safetensors, got FileNotFoundError: ")
    for changed in ({"depth": 2}, {"rank": 2}, {"rank": 0}):
        with pytest.raises(ModelError) as error:
            train.train(config_of(tiny, rows, tmp_path / "bad", init=str(trained[0]), **changed), progress=False)
        assert str(error.value) == f"train: init must have this model's tensors, got others in {trained[0]}. Use the same backbone, and no more blocks or ranks."


def test_init_of_a_narrower_backbone_is_refused(trained, tiny, rows, tmp_path, monkeypatch):
    # Its tensors have the same names and would fit into a part of each.
    source = models.load(trained[0], "cpu")
    monkeypatch.setattr(source, "trained", lambda: {name: value[..., :-1] if ".lora_A." in name else value for name, value in
                                                    models._Model.trained(source).items()})
    monkeypatch.setattr(train, "load", lambda path, device: source)
    with pytest.raises(ModelError, match="^train: init must have this model's tensors, got others in other. "):
        train.train(config_of(tiny, rows, tmp_path, init="other"), progress=False)


def test_a_wider_adapter_starts_as_the_narrower_one(trained, tiny, rows, tmp_path):
    rank = models.load(trained[0], "cpu").config.rank
    wide = train.train(config_of(tiny, rows, tmp_path, init=str(trained[0]), rank=3 * rank, alpha=7.0, epochs=0.5, lr=1e-9), progress=False)
    sequences = sequences_of(wide, [("Question 1?", GOOD), ("", BAD)])
    assert np.allclose(wide.logits(sequences), models.load(trained[0], "cpu").logits(sequences), atol=1e-4)
    added = {name: value[rank:] for name, value in wide.trained().items() if ".lora_A." in name}
    assert added and all(value.abs().max() > 0 for value in added.values())  # or they would never learn


@pytest.mark.parametrize("kind", ("detector", "detoxifier"))
def test_init_goes_on_from_the_shipped_adapter(kind, tmp_path):
    shipped = models.load(WEIGHTS / f"{kind}.gguf", "cpu")
    data_path = tmp_path / "rows.jsonl"
    data_path.write_text('{"question": "Hi?", "answer": "Fine.", "label": 0}\n' if kind == "detector" else
                         '{"question": "Hi?", "accepted": "Fine.", "rejected": "Idiot."}\n')
    config = train.TrainConfig(kind, data=(str(data_path),), out=str(tmp_path / "out"), depth=15 if kind == "detector" else 0,
                               init="shipped" if kind == "detector" else str(WEIGHTS / "detoxifier.gguf"), lr=1e-9)
    model, wanted = train.train(config, progress=False), shipped.trained()
    assert model.trained().keys() == wanted.keys()
    assert all(torch.allclose(value, wanted[name], atol=1e-6) for name, value in model.trained().items())


def test_a_deeper_detector_starts_from_a_shallower_one(tiny, rows, tmp_path):
    shallow = train.train(config_of(tiny, rows, tmp_path / "a", depth=2, epochs=1), progress=False).trained()
    deep = train.train(config_of(tiny, rows, tmp_path / "b", init=str(tmp_path / "a"), epochs=0.5, lr=1e-9), progress=False).trained()
    assert losses(tmp_path / "b")[0] == pytest.approx(math.log(2), abs=1e-4)  # the head reads other states: it starts anew
    assert shallow.keys() < deep.keys() and {name.split(".layers.")[1][0] for name in deep.keys() - shallow.keys()} == {"2", "3"}
    assert all(torch.allclose(value, deep[name], atol=1e-6) for name, value in shallow.items() if not name.startswith("head."))


def test_full_fine_tuning(tiny, rows, tmp_path):
    model = train.train(config_of(tiny, rows, tmp_path, rank=0, depth=2, epochs=6, lr=3e-3), progress=False)
    curve = losses(tmp_path)
    assert np.mean(curve[-3:]) < 0.5 * curve[0]
    again = models.load(tmp_path, device="cpu")
    assert all(torch.equal(value, again.trained()[name]) for name, value in model.trained().items())
    assert not any("embed" in name for name in model.trained())


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_the_same_run(tiny, rows, tmp_path):
    # 168 tokens: groups of one row, which are run twice
    for name in ("eager", "compiled"):
        train.train(config_of(tiny, rows, tmp_path / name, depth=1, batch_tokens=168, epochs=0.5, compile=name == "compiled"), progress=False)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-4) and len(losses(tmp_path / "eager")) > 2


def test_epochs_of_different_length(tiny, rows, tmp_path, monkeypatch):
    # Windows and disguises are drawn anew, so a later epoch may have fewer batches than the first.
    whole = train._epoch
    monkeypatch.setattr(train, "_epoch", lambda config, rows, template, epoch: whole(config, rows, template, epoch)[:3 - epoch])
    train.train(config_of(tiny, rows, tmp_path, epochs=2), progress=False)
    assert len(losses(tmp_path)) == 6


# -- a run in parts

class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["detector", "detoxifier"])
def test_an_interrupted_run_goes_on(tiny, rows, tmp_path, monkeypatch, kind, capsys):
    options = {"epochs": 3, "balance": 0.5, "augment": 0.2, "answer_only": 0.1}
    whole = train.train(config_of(tiny, rows, tmp_path / "whole", kind, **options), progress=False)
    config = config_of(tiny, rows, tmp_path / "parts", kind, checkpoint_s=0.0, **options)  # a checkpoint after each step
    save = train._checkpoint

    def stop_at(n):
        def checkpoint(out, config, fingerprint, model, optimizer, step, spent_s, tokens):
            save(out, config, fingerprint, model, optimizer, step, spent_s, tokens)
            if step == n:
                raise Stop
        monkeypatch.setattr(train, "_checkpoint", checkpoint)

    n_steps = len(losses(tmp_path / "whole"))
    for stop in (2, n_steps // 2 + 1):  # within an epoch, and in a later one
        stop_at(stop)
        with pytest.raises(Stop):
            train.train(config, progress=False)
    stop_at(-1)
    parts = train.train(config, progress=False)
    # float32 on one thread, batches by (seed, epoch), no dropout: the same bits.
    assert all(torch.equal(value, parts.trained()[name]) for name, value in whole.trained().items())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()
    assert "goes on from step 2" in capsys.readouterr().err


def test_a_crash_after_a_checkpoint_leaves_no_double_lines(tiny, rows, tmp_path, monkeypatch):
    config = config_of(tiny, rows, tmp_path, checkpoint_s=0.0)
    save = train._checkpoint
    monkeypatch.setattr(train, "_checkpoint", lambda *args: save(*args) if args[5] <= 2 else None)
    step, calls = torch.optim.AdamW.step, []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: step(self) if len(calls) < 4 and not calls.append(1) else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(config, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(train, "bf16_is_faster", lambda device: False)
    train.train(config, progress=False)
    steps = [json.loads(line)["step"] for line in open(tmp_path / "log.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    train.train(config, progress=False)  # anew in the same folder: a new log
    assert [json.loads(line)["step"] for line in open(tmp_path / "log.jsonl")] == steps


def test_checkpoints_that_do_not_fit(tiny, rows, tmp_path, monkeypatch):
    config = config_of(tiny, rows, tmp_path, checkpoint_s=0.0)
    save, load = train._checkpoint, train.load_rows

    def stop(*args):
        save(*args)
        raise Stop

    monkeypatch.setattr(train, "_checkpoint", stop)
    with pytest.raises(Stop):
        train.train(config, progress=False)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(ModelError) as error:
        train.train(replace(config, lr=1e-4), progress=False)
    assert str(error.value) == f"train: {path} must be of this configuration and these rows, got others. Delete it or change --out."
    with monkeypatch.context() as patch:  # the same files by name, other rows in them
        patch.setattr(train, "load_rows", lambda config: load(config)[:-1])
        with pytest.raises(ModelError, match="and these rows, got others"):
            train.train(config, progress=False)
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"junk"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=rf"^train: {path} must be a whole checkpoint, got \w+\. Delete it to start anew\.$"):
            train.train(config, progress=False)
    # A pickle that would run code is refused, not run.
    torch.save({"config": os.getcwd, "step": 1}, path)
    with pytest.raises(ModelError, match="must be a whole checkpoint, got UnpicklingError"):
        train.train(config, progress=False)


@pytest.mark.parametrize("content", [{}, {"weight": torch.zeros(2)}, [1, 2], torch.zeros(2), "text"], ids=["empty", "weights", "list", "tensor", "text"])
def test_resume_refuses_what_another_program_saved(tmp_path, content):
    """Regression: a file that torch loads but `train` never wrote was a KeyError or a TypeError."""
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(ModelError) as error:
        train._resume(tmp_path, TrainConfig("detector"), "", None, None)
    assert str(error.value) == f"train: {path} must be a checkpoint of protector train, got another file of PyTorch. Move it or change --out."


def test_rate_by_hand():
    config = TrainConfig("detector", lr=1.0, warmup=0.25)
    assert [train.rate_at(share, config) for share in (0, 0.125, 0.25, 0.5, 1)] == [0.001, 0.5 * 0.875, 0.75, 0.5, 0.001]
    assert train.rate_at(0, replace(config, warmup=0.0)) == 1.0


def test_minutes_end_a_run(tiny, rows, tmp_path, monkeypatch):
    # A clock that moves a second at each look: three looks a step, so a minute is some 20 steps of the 1,000 epochs asked for.
    clock = iter(range(10_000_000))
    monkeypatch.setattr(train.time, "monotonic", lambda: float(next(clock)))
    train.train(config_of(tiny, rows, tmp_path, epochs=1000, minutes=1.0, batch_tokens=256), progress=False)
    log = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert 10 <= len(log) <= 30 and log[-1]["elapsed_s"] < 60
    assert log[-1]["lr"] < 0.15 * 3e-3  # the rate follows the clock: it is nearly 0 at the end


# -- two processes

WORKER = """
import sys
from protector import train
train.bf16_is_faster = lambda device: False
train.train(train.TrainConfig(sys.argv[1], data=(sys.argv[2],), out=sys.argv[3], backbone=sys.argv[4], lr=3e-3, rank=4,
                              batch_tokens=512, epochs=1, answer_only=0.0, threads=1, device="cpu"), progress=False)
"""


def test_two_processes_train_as_one(tiny, rows, tmp_path, trained):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, "detector", rows,
                           tmp_path / "two", tiny.folder], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    one = train.train(config_of(tiny, rows, tmp_path / "one", epochs=1), progress=False)
    two = models.load(tmp_path / "two", device="cpu")
    # The same sums in another order: a loss near 1 moves by some ulp, 1e-6 is the log's last digit. Adam divides by the
    # root of the squared gradient, so where a gradient is all but zero its sign, and the weight by lr a step, may differ;
    # what the model says doesn't.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    sequences = sequences_of(one, [("Question 1?", GOOD), ("Question 2?", BAD)])
    assert two.logits(sequences) == pytest.approx(one.logits(sequences), abs=5e-3)


def test_processes_that_would_go_on_from_other_steps_say_so(tiny, rows, tmp_path):
    """Regression: on machines without a shared folder the first one resumed and the others began anew, with other batches and rates."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("train.train(", "train._resume = lambda *_: (int(__import__('os').environ['RANK']), 0.0, 0)\ntrain.train(", 1))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, "detector", rows,
                           tmp_path / "two", tiny.folder], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "every process must go on from one checkpoint" in done.stderr


def test_bf16_is_taken_where_it_was_the_faster_one(monkeypatch):
    for fp32_s, bf16_s, faster in ((2.0, 1.0, True), (1.0, 2.0, False), (1.0, 0.95, False)):  # a tenth is noise
        seconds = iter([bf16_s] * 3 + [fp32_s] * 3)
        monkeypatch.setattr(train, "_timed", lambda work: next(seconds))
        assert measured_bf16(torch.device("cpu")) is faster


# -- what it refuses

@pytest.mark.parametrize("options, message", [
    ({"kind": "judge"}, "train: kind must be detector or detoxifier, got judge. Name one."),
    ({"lr": float("nan")}, "train: lr must be between 1e-09 and 1, got nan. Change --lr."),
    ({"lr": 0.0}, "train: lr must be between 1e-09 and 1, got 0.0. Change --lr."),
    ({"rank": -1}, "train: rank must be between 0 and inf, got -1. Change --rank."),
    ({"depth": -2}, "train: depth must be between 0 and inf, got -2. Change --depth."),
    ({"alpha": 0.0}, "train: alpha must be between 1e-06 and inf, got 0.0. Change --alpha."),
    ({"batch_tokens": 0}, "train: batch_tokens must be between 4 and inf, got 0. Change --batch-tokens."),
    ({"epochs": -1.0}, "train: epochs must be between 0 and inf, got -1.0. Change --epochs."),
    ({"minutes": -1.0}, "train: minutes must be between 0 and inf, got -1.0. Change --minutes."),
    ({"prefix_weight": 1.5}, "train: prefix_weight must be between 0 and 1, got 1.5. Change --prefix-weight."),
    ({"answer_only": 2.0}, "train: answer_only must be between 0 and 1, got 2.0. Change --answer-only."),
    ({"refusal_cap": -0.1}, "train: refusal_cap must be between 0 and 1, got -0.1. Change --refusal-cap."),
    ({"warmup": 2.0}, "train: warmup must be between 0 and 1, got 2.0. Change --warmup."),
    ({"device": "tpu"}, "train: device must be auto, cpu or cuda, got tpu. Leave it out."),
    ({"source_weights": ("a",)}, "train: source_weights must be SOURCE=NUMBER with a number >= 0, got a. Write it like diasafety=0.5."),
    ({"source_weights": ("a=-1",)}, "train: source_weights must be SOURCE=NUMBER with a number >= 0, got a=-1. Write it like diasafety=0.5."),
    ({"kind": "detoxifier", "loss_weights": ("a=1",)},
     "train: loss_weights must be left out for a detoxifier: its loss knows no labels. Use source_weights."),
    ({"loss_weights": ("a=1", "b=nan")},
     "train: loss_weights must be SOURCE=NUMBER with a number >= 0, got a=1 b=nan. Write it like diasafety=0.5."),
])
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ValueError) as error:
        train.train(TrainConfig(**{"kind": "detector", "out": str(tmp_path / "out"), **options}), progress=False)
    assert str(error.value) == message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    with pytest.raises(RuntimeError) as error:
        train.train(TrainConfig("detector", out=str(tmp_path / "out"), device="cuda"), progress=False)
    assert str(error.value) == "train: device cuda must have a GPU that PyTorch sees, got none. Use --device auto."


def test_rows_that_weigh_nothing_are_left_out(tiny, rows, tmp_path):
    # A batch of nothing else would have a loss of 0 / 0.
    with pytest.raises(DataError) as error:
        train.train(config_of(tiny, rows, tmp_path, loss_weights=("toy=0",)), progress=False)
    assert str(error.value) == ("train: data must hold rows for a detector, got none. A detoxifier needs triples, or pairs with both "
                                "labels for one question.")


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_nan_raises_and_leaves_the_last_checkpoint(tiny, rows, tmp_path, monkeypatch, part):
    loss, calls = models.HarmDetector.loss, []

    def spoilt(self, batch, prefix_weight):
        value = loss(self, batch, prefix_weight)
        calls.append(1)
        if len(calls) < 6:
            return value
        if part == "loss":
            return value * float("nan")
        value.register_hook(lambda gradient: gradient * float("inf"))  # a finite loss with a gradient that overflows
        return value

    monkeypatch.setattr(models.HarmDetector, "loss", spoilt)
    with pytest.raises(RuntimeError, match=r"^train: loss and gradient must be finite, got \S+ and \S+ at step 2\. Lower lr\.$"):
        train.train(config_of(tiny, rows, tmp_path, checkpoint_s=0.0), progress=False)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 1 and all(torch.isfinite(value).all() for value in state["model"].values())
    assert not (tmp_path / "model.safetensors").exists()
