"""Throughput of guard_files on a local Ray beside one process: `python -m protector.bench_ray`.

    one thread     this process, one llama.cpp thread
    all threads    this process, as many as there are cores
    ray            an actor of one thread for each core; starting the actors and loading their models counts

Rows are scored and never rewritten. Each call guards all of them; a ratio is the median of the rounds' own ratios.
"""
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import data
from .bench import in_turns, rate
from .bench_rounds import busy, described, warn, watched
from .evaluate import record
from .integrations.ray import guard_files
from .llama import cpu_threads
from .options import option, parsed


@dataclass(frozen=True)
class RayBenchConfig:
    """Options of `python -m protector.bench_ray`."""

    out: str = option("results/ray.json", "JSON file")
    rows: int = option(800, "answers of this project's corpus")
    part: int = option(64, "rows of one part")
    rounds: int = option(3, "measurements of each number")
    workers: int = option(0, "actors; 0 = one for each core")
    detector: str = option("", "adapter GGUF; the shipped one if empty")


def run(config):
    """Measure and write the JSON file.

    Returns:
        dict of kind "bench_ray".
    Raises:
        ImportError: ray isn't installed.
    """
    import ray

    workers, meanwhile = config.workers or cpu_threads(), watched()
    pairs, triples = data.read("own")
    pairs += data.pairs_of(triples)
    with tempfile.TemporaryDirectory() as folder:
        source, calls = Path(folder) / "rows.jsonl", iter(range(10**6))
        source.write_text("".join(json.dumps({"question": pair.question, "answer": pair.answer}) + "\n"
                                  for pair in data.spread(pairs, config.rows)))
        n = len(source.read_text().splitlines())

        def guarded(n_workers, n_threads):
            options = {"detector": config.detector or None, "detoxifier": False, "detector_options": {"n_threads": n_threads}}
            out = Path(folder) / str(next(calls))  # a job that is done isn't done again
            found = guard_files([source], out, n_workers, config.part, **options)
            if found["rows"] != n or found["errors"]:
                raise RuntimeError(f"bench_ray: rows must all get a verdict, got {found}.")

        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        try:
            values = in_turns({"one thread": rate(n, lambda: guarded(0, 1)), "all threads": rate(n, lambda: guarded(0, cpu_threads())),
                               "ray": rate(n, lambda: guarded(workers, 1))}, config.rounds)
            # Trap: Ray leaves its workers' end to the kernel, and with it the time that they took: it would count as other processes'.
            machine = meanwhile() | {"others_share": None}
        finally:
            ray.shutdown()
    result = {"kind": "bench_ray", "rows": n, "workers": workers, **machine, "rows_per_s": {name: described(value) for name, value in values.items()},
              "ray_over": {name: described(np.array(values["ray"]) / np.array(values[name])) for name in ("one thread", "all threads")}}
    result["busy"] = busy(result)
    out = Path(config.out)
    record.write(out.parent, out.stem, result, config)
    warn("bench_ray", result)
    return result


def main(argv=None):
    print(json.dumps(record.plain(run(parsed(RayBenchConfig, "protector.bench_ray", __doc__, argv))), indent=1))


if __name__ == "__main__":
    main()
