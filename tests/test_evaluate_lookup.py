"""What guessing from the text so far would save: by hand, and on the tiny models."""
import json

from protector.evaluate import blocks, lookup
from protector.evaluate.lookup import LookupConfig, decodes, guess
from protector.llama import LlamaDetoxifier


def test_a_guess_is_what_followed_the_longest_latest_match():
    assert guess([1, 2, 3, 4, 1, 2], 2) == [3, 4]
    assert guess([1, 2, 9, 1, 2, 8, 1, 2], 1) == [8]  # the later of two places
    assert guess([7, 2, 5, 3, 2, 6, 7, 2], 1) == [5]  # two tokens alike before one
    assert guess([1, 2, 3], 4) == [] and guess([], 4) == []
    assert guess([1, 2, 3, 1], 1, least=2) == [] and guess([1, 2, 3, 1, 2], 1, least=2) == [3]
    assert guess([4, 4, 4], 3) == [4]  # what is there, and no more


def test_decodes_by_hand():
    assert decodes([5, 6, 7], [5, 6, 7, 8], 2) == [3]
    assert decodes([5, 6, 7], [5, 9, 7, 8], 2) == [3, 1, 3]  # a wrong guess: 9 comes with it; 9 is new; after 7 came 5, 9
    assert decodes([1, 2, 3], [4, 5, 6], 8) == [1, 1] and decodes([1], [2], 8) == []
    # Whatever is guessed, each decode writes at least one token, and all are written.
    for most in (1, 2, 5):
        sizes = decodes([1, 2, 1, 2, 3], [1, 2, 1, 2, 1, 2, 3, 3, 3, 1], most)
        assert all(1 <= size <= 1 + most for size in sizes) and len(sizes) <= 9


def test_a_run_writes_decodes_and_speed_ups(detoxifier_gguf, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lookup, "LlamaDetoxifier", lambda path, n_threads: LlamaDetoxifier(path, base=tiny.gguf, quantisation="F32", n_threads=n_threads))
    monkeypatch.setattr(lookup, "ROUNDS", 2)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"Item {i}?", "answer": f"Drink it, all {i} of it.", "label": int(i < 4), "source": "made_up"}) + "\n"
                            for i in range(6)))
    lookup.main(["--measure", str(path), "--detoxifier", str(detoxifier_gguf), "--threads", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "lookup.json").read_text())
    assert result["rewrites"] == 4 and [(found["matched"], found["most"]) for found in result["guesses"]] == [
        (least, most) for least in (1, 2, 3) for most in (1, 2, 4, 8)] and list(result["decode_ms"]) == [str(n) for n in range(1, 10)]
    assert all(0 < found["decodes_of_tokens"] <= 1 and found["speed_up"]["value"] > 0 for found in result["guesses"])
    assert 0 <= result["others_share"] <= 1 and result["load_before"] >= 0
    assert "3 matched, 8 guesses: " in capsys.readouterr().out
    assert "| 3 | 8 | " in blocks.RENDERERS["lookup"](result)
