"""Many answers on many machines: one verdict per row, whatever breaks; in one process without ray, and on a local ray where it is installed."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from serve_fakes import MARKER, FakeDetector

from protector.base import WEIGHTS, file_sha256
from protector.errors import DataError
from protector.evaluate import blocks
from protector.guard import REFUSAL, Protector
from protector.integrations import ray as integration
from protector.integrations.ray import GuardBatch, guard_files, parts_of

HARMFUL = f"You can mix {MARKER} in a closed bucket."
OPTIONS = {"detoxifier": False, "threshold": 0.5}


def guard(**options):
    return GuardBatch(detector=FakeDetector(), **OPTIONS, **options)


def test_a_batch_gets_five_columns_and_keeps_its_own():
    batch = {"question": np.array(["Hi?", None, "And?"], object), "answer": np.array(["Hello.", HARMFUL, 7], object), "id": np.array([3, 1, 2])}
    result = guard()(batch)
    assert list(result["action"]) == ["pass", "refuse", "error"] and list(result["flagged"]) == [False, True, False]
    assert list(result["text"]) == ["Hello.", REFUSAL, REFUSAL] and list(result["error"]) == ["", "", "TypeError"]
    # Logits of -3 and 3; a row that can't be scored has no score.
    assert result["score"][:2] == pytest.approx([1 / (1 + np.exp(3)), 1 / (1 + np.exp(-3))]) and np.isnan(result["score"][2])
    assert result["id"] is batch["id"] and result["answer"] is batch["answer"]


def test_other_columns_and_no_question():
    result = guard(answer="reply")({"reply": np.array(["Hello.", HARMFUL])})
    assert list(result["action"]) == ["pass", "refuse"]


def test_a_question_column_of_nulls_alone_is_no_question():
    """Regression: Ray gives NaN there, and every row was an error."""
    batch = {"question": np.full(2, np.nan, np.float32), "answer": np.array(["Hello.", HARMFUL], object)}
    assert list(guard()(batch)["action"]) == ["pass", "refuse"]


def test_a_job_that_one_row_could_end_is_refused():
    with pytest.raises(ValueError, match=r"^GuardBatch: on_error must be refuse or pass, got raise\. One row would end the job\.$"):
        guard(on_error="raise")


@pytest.fixture
def source(tmp_path):
    """10 lines: 2 harmful, 3 bad (no JSON, no answer, no UTF-8), and an umlaut, so that bytes aren't characters."""
    rows = [{"question": "How?", "answer": f"Boil it {i} minutes, schön.", "id": i} for i in range(10)]
    rows[2]["answer"] = rows[6]["answer"] = HARMFUL
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    lines[3], lines[5], lines[8] = b"not json", b'{"question": "How?"}', b'{"answer": "\xff"}'
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines))  # no newline at the end
    return path


def read(folder):
    return [json.loads(line) for path in sorted(folder.glob("part-*.jsonl")) for line in path.read_text().splitlines()]


def test_parts_cover_each_line_once(source):
    parts = parts_of([source, source], 4)
    assert [(part.number, part.first_row, part.n_rows) for part in parts] == [(0, 0, 4), (1, 4, 4), (2, 8, 2), (3, 10, 4), (4, 14, 4), (5, 18, 2)]
    data = source.read_bytes()
    assert data[parts[1].offset:].startswith(b'{"question": "How?", "answer": "Boil it 4')
    with pytest.raises(ValueError, match=r"^parts_of: rows must be at least 1, got 0\. Leave it out for 256\.$"):
        parts_of([source], 0)


def test_files_get_one_verdict_per_row_and_bad_rows_are_listed(source, tmp_path):
    found = guard_files([source], tmp_path / "out", rows=4, detector=FakeDetector(), **OPTIONS)
    assert found == {"rows": 10, "flagged": 2, "errors": [3, 5, 8]}
    rows = read(tmp_path / "out")
    assert [row["source_row"] for row in rows] == list(range(10)) and rows[4]["id"] == 4 and rows[4]["text"] == "Boil it 4 minutes, schön."
    assert rows[3]["score"] is None and rows[3]["text"] == REFUSAL


def test_a_field_named_row_is_the_users(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"answer": HARMFUL, "row": "A7"}) + "\n" + json.dumps({"answer": None, "row": "A8"}))
    assert guard_files([path], tmp_path / "out", detector=FakeDetector(), **OPTIONS) == {"rows": 2, "flagged": 1, "errors": [1]}
    assert [(row["row"], row["source_row"]) for row in read(tmp_path / "out")] == [("A7", 0), ("A8", 1)]


def test_a_line_too_deep_to_parse_is_a_bad_row(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("[" * 100_000 + "\n" + json.dumps({"answer": HARMFUL}))
    assert guard_files([path], tmp_path / "out", detector=FakeDetector(), **OPTIONS) == {"rows": 2, "flagged": 1, "errors": [0]}


def test_an_interrupted_job_goes_on(source, tmp_path, monkeypatch):
    def work():
        return guard_files([source], tmp_path / "out", rows=4, detector=FakeDetector(), **OPTIONS)  # loaded anew, as in another process: the same job

    plain, done = GuardBatch.part, []

    def part(self, part, out):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(part.number)
        plain(self, part, out)

    monkeypatch.setattr(GuardBatch, "part", part)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert len(list((tmp_path / "out").glob("part-*.jsonl"))) == 1
    monkeypatch.setattr(GuardBatch, "part", plain)
    assert work() == {"rows": 10, "flagged": 2, "errors": [3, 5, 8]}
    idle = FakeDetector()
    assert guard_files([source], tmp_path / "out", rows=4, detector=idle, **OPTIONS)["rows"] == 10 and idle.n_scored == 0
    # Another job's folder is left alone.
    with pytest.raises(DataError, match=r"^guard_files: .*/out must be a new folder or of this job, got another's parts\. Choose another folder\.$"):
        guard_files([source], tmp_path / "out", rows=5, detector=FakeDetector(), **OPTIONS)
    other = FakeDetector()
    other.model_sha256 = "1" * 64
    with pytest.raises(DataError, match="got another's parts"):
        guard_files([source], tmp_path / "out", rows=4, detector=other, **OPTIONS)


def test_parts_of_no_known_job_are_left_alone(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "part-000000.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"^guard_files: .*/out must be a new folder or of this job, got parts without a job\.json\. Choose another folder\.$"):
        guard_files([source], out, rows=4, detector=FakeDetector(), **OPTIONS)
    assert [path.name for path in out.iterdir()] == ["part-000000.jsonl"] and read(out) == [{}]


def test_what_is_written_is_whole_or_absent(source, tmp_path, monkeypatch):
    def replace(partial, target):
        whole.append((Path(target).name, Path(partial).read_text()))
        raise KeyboardInterrupt

    whole = []
    monkeypatch.setattr(integration.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        guard_files([source], tmp_path / "out", detector=FakeDetector(), **OPTIONS)
    assert whole[0][0] == "job.json" and json.loads(whole[0][1])["rows"] == 256 and not (tmp_path / "out/job.json").exists()


def test_another_spelling_of_the_paths_is_the_same_job(source, tmp_path, monkeypatch):
    def work(*paths):
        guard_files(*paths, detector=FakeDetector(), **OPTIONS)
        return (tmp_path / "out" / "part-000000.jsonl").stat().st_mtime_ns

    monkeypatch.chdir(tmp_path)
    assert work(["in.jsonl"], "out") == work([source], tmp_path / "out") == work([tmp_path / "out/../in.jsonl"], "../" + tmp_path.name + "/out")


def test_workers_get_absolute_paths_of_models(source, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"some weights")
    monkeypatch.chdir(tmp_path)
    got = []
    monkeypatch.setattr(integration, "Protector", lambda **options: got.append(options) or Protector(detector=FakeDetector(), **OPTIONS))
    guard_files([source], "out", rows=4, detector="model.gguf", detoxifier=False)
    assert got == [{"detector": str(tmp_path / "model.gguf"), "detoxifier": False}]


@pytest.mark.parametrize("kind", ["detector", "detoxifier"])
@pytest.mark.parametrize("name", ["model.gguf", "runs/model.safetensors", "runs/calibration.json"])
def test_a_job_does_not_go_on_with_other_weights(source, tmp_path, monkeypatch, kind, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    model = file.parent if file.parent.name == "runs" else file
    monkeypatch.setattr(integration, "Protector", lambda **_: Protector(detector=FakeDetector(), **OPTIONS))

    def work():
        return guard_files([source], tmp_path / "out", rows=4, **{kind: str(model)})["rows"]

    file.write_bytes(b"some weights")
    assert work() == 10 == work()
    file.write_bytes(b"other weights")
    with pytest.raises(DataError, match=r"out must be a new folder or of this job, got another's parts\. Choose another folder\.$"):
        work()


def test_what_names_a_jobs_weights(tmp_path):
    digest = integration._sha256
    assert digest(None, "detector.gguf") == [file_sha256(WEIGHTS / "detector.gguf")] != digest(None, "detoxifier.gguf")
    assert digest(FakeDetector(), "detector.gguf") == "0" * 64 and digest(False, "detoxifier.gguf") is None
    assert digest(tmp_path / "none.gguf", "detector.gguf") == []  # the workers say that it is missing


def test_a_part_that_lost_rows_is_found(source, tmp_path):
    detector = FakeDetector()
    guard_files([source], tmp_path / "out", rows=4, detector=detector, **OPTIONS)
    part = tmp_path / "out" / "part-000001.jsonl"
    part.write_text("".join(part.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match=r"^guard_files: .*/part-000001\.jsonl must have one verdict for each of 4 rows, got 3\. Delete it and run again\.$"):
        guard_files([source], tmp_path / "out", rows=4, detector=detector, **OPTIONS)
    part.unlink()
    assert guard_files([source], tmp_path / "out", rows=4, detector=detector, **OPTIONS) == {"rows": 10, "flagged": 2, "errors": [3, 5, 8]}


# -- on ray itself


@pytest.fixture(scope="module")
def ray():
    module = pytest.importorskip("ray", reason="needs the package ray: pip install '.[ray]'")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])  # workers find the fakes
    module.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield module
    module.shutdown()


class Dying:
    """A detector whose first worker kills itself, as the kernel would when memory runs out, while it scores a part."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return _dying, (self.marker,)

    def __repr__(self):
        return "dying"


def _dying(marker):
    class Detector(FakeDetector):
        def logits(self, sequences, deadline=None):
            time.sleep(0.05)
            if not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().logits(sequences, deadline)

    return Detector()


def test_two_workers_one_killed_in_the_middle(ray, source, tmp_path):
    marker = tmp_path / "died"
    found = guard_files([source], tmp_path / "out", workers=2, rows=1, detector=Dying(str(marker)), **OPTIONS)
    assert marker.exists() and found == {"rows": 10, "flagged": 2, "errors": [3, 5, 8]}
    assert [row["source_row"] for row in read(tmp_path / "out")] == list(range(10))


def test_workers_without_a_cpu_are_not_waited_for(ray, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # and paths relative to a folder that isn't the workers'
    found = []
    # Two CPUs: the third worker never starts. In a thread, so that a job that never ends is a failure and not a hang.
    job = threading.Thread(daemon=True, target=lambda: found.append(
        guard_files([source.name], "out", workers=3, rows=2, detector=Dying(os.devnull), **OPTIONS)))
    job.start()
    job.join(120)
    assert found == [{"rows": 10, "flagged": 2, "errors": [3, 5, 8]}] and len(read(tmp_path / "out")) == 10


class Noting(Dying):
    """A detector that notes its process and what that sees of GPUs."""

    def __reduce__(self):
        return _noting, (self.marker,)


def _noting(marker):
    class Detector(FakeDetector):
        def logits(self, sequences, deadline=None):
            with open(marker, "a") as file:
                print(os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
            return super().logits(sequences, deadline)

    return Detector()


def test_workers_get_a_gpu_each_and_those_without_one_are_not_waited_for(ray, source, tmp_path):
    # The one GPU exists in Ray's books alone: of two workers the second never starts.
    seen, found = tmp_path / "seen", []
    job = threading.Thread(daemon=True, target=lambda: found.append(
        guard_files([source], tmp_path / "out", workers=2, rows=2, num_gpus=1, detector=Noting(str(seen)), **OPTIONS)))
    job.start()
    job.join(120)
    assert found == [{"rows": 10, "flagged": 2, "errors": [3, 5, 8]}] and len(read(tmp_path / "out")) == 10
    notes = seen.read_text().splitlines()
    assert len(notes) >= 5 and set(notes) == {f"{notes[0].split()[0]} {os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0]}"}


class Deadly(Dying):
    """A detector that ends its process, as an abort in native code would, whenever it scores an answer with the marker."""

    def __reduce__(self):
        return _deadly, (self.marker,)


def _deadly(marker):
    class Detector(FakeDetector):
        def logits(self, sequences, deadline=None):
            if any(marker in self.answer(ids) for ids in sequences):
                os._exit(1)
            return super().logits(sequences, deadline)

    return Detector()


def test_a_row_that_ends_its_worker_each_time_is_found(ray, source, tmp_path):
    # Row 7 is of the second part, with a bad row and a harmful one.
    found = guard_files([source], tmp_path / "out", workers=2, rows=4, detector=Deadly("Boil it 7"), **OPTIONS)
    assert found == {"rows": 10, "flagged": 2, "errors": [3, 5, 7, 8]}
    rows = read(tmp_path / "out")
    assert [row["source_row"] for row in rows] == list(range(10)) and [rows[i]["action"] for i in (4, 6, 9)] == ["pass", "refuse", "pass"]
    assert (rows[7]["id"], rows[7]["action"], rows[7]["score"], rows[7]["text"]) == (7, "error", None, REFUSAL)
    assert rows[7]["error"] == "ProtectorError: guard_files: row must leave its worker alive, got a dead one at each of 2 tries. Give workers more memory."


def test_a_worker_that_can_not_start_ends_the_job(ray, source, tmp_path):
    with pytest.raises(ray.exceptions.RayActorError, match="must exist, got no file"):
        guard_files([source], tmp_path / "out", workers=1, rows=4, detector=str(tmp_path / "none.gguf"), **OPTIONS)
    assert read(tmp_path / "out") == []


class Stillborn(Dying):
    """A detector whose first worker dies while it loads it, as on a node that is lost then."""

    def __reduce__(self):
        return _stillborn, (self.marker,)


def _stillborn(marker):
    if not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return FakeDetector()


def test_a_worker_that_dies_while_it_starts_ends_the_job_and_a_second_call_goes_on(ray, source, tmp_path):
    def work():
        return guard_files([source], tmp_path / "out", workers=1, rows=4, detector=Stillborn(str(tmp_path / "died")), **OPTIONS)

    with pytest.raises(ray.exceptions.RayActorError):
        work()
    assert work() == {"rows": 10, "flagged": 2, "errors": [3, 5, 8]}


def test_ray_data_maps_parquet_and_survives_a_killed_worker(ray, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Ray Data's Parquet needs the package pyarrow: pip install '.[ray]'")
    import pyarrow.parquet as parquet

    rows = [{"id": i, "question": None if i == 1 else "How?", "answer": HARMFUL if i % 5 == 0 else "Boil it."} for i in range(20)]
    rows[7]["answer"] = None
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in/rows.parquet")
    options, out = {"detector": Dying(str(tmp_path / "died")), **OPTIONS}, tmp_path / "out"
    # Half a CPU for each actor: reading and writing need some of the two. Four blocks are four files, and only one has an error.
    ray.data.read_parquet(str(tmp_path / "in")).repartition(4).map_batches(
        GuardBatch, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=0.5, batch_size=5, fn_constructor_kwargs=options).write_parquet(str(out))
    tables = [parquet.read_table(path) for path in out.glob("*.parquet")]
    assert (tmp_path / "died").exists() and sorted(table.num_rows for table in tables) == [5, 5, 5, 5]
    assert sorted(set(table["error"].to_pylist()) == {""} for table in tables) == [False, True, True, True]
    types = {"action": pyarrow.string(), "flagged": pyarrow.bool_(), "score": pyarrow.float64(), "text": pyarrow.string(), "error": pyarrow.string()}
    assert all(table.schema.field(name).type == kind for table in tables for name, kind in types.items())
    found = sorted(parquet.read_table(out).to_pylist(), key=lambda row: row["id"])
    assert [row["id"] for row in found] == list(range(20)) and [row["id"] for row in found if row["flagged"]] == [0, 5, 10, 15]
    bad = ray.data.read_parquet(str(out)).filter(lambda row: row["action"] == "error").take_all()
    assert [(row["id"], row["error"], row["text"]) for row in bad] == [(7, "TypeError", REFUSAL)] and np.isnan(bad[0]["score"])


def test_throughput_is_measured_beside_one_process(real_base, tmp_path):
    pytest.importorskip("ray", reason="needs the package ray: pip install '.[ray]'")
    out = tmp_path / "ray.json"
    done = subprocess.run([sys.executable, "-m", "protector.bench_ray", "--rows", "12", "--part", "4", "--rounds", "2", "--workers", "2", "--out", str(out)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["rows"] == 12 and set(result["rows_per_s"]) == {"one thread", "all threads", "ray"}
    assert all(found["median"] > 0 for found in result["ray_over"].values()) and "| ray |" in blocks.RENDERERS["ray"](result)
