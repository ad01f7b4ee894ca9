"""What a number measured in several rounds says, and whether it is to be trusted; the benches and evaluate/shared.py share it.

It needs NumPy alone: bench_head proves the kernel on machines without llama.cpp.
"""
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

BUSY = 0.10  # (high - low) / median of described, above which a number isn't to be trusted
LOADED = 0.5  # load average before the start, of the cores, above which none is
OTHERS = 0.05  # share of all cores' time that other processes took meanwhile, above which none is


def described(values):
    """Median, quartiles and spread of one number's rounds; of fewer than four the least and the largest in the quartiles' place.

    Example:
        described([9, 10, 10, 11])  # {"median": 10.0, "low": 9.75, "high": 10.25, "spread": 0.05, "n": 4}
    """
    low, median, high = (float(value) for value in np.percentile(values, (25, 50, 75) if len(values) >= 4 else (0, 50, 100)))
    return {"median": median, "low": low, "high": high, "spread": (high - low) / median if median else 0.0, "n": len(values)}


def busy(result, name=""):
    """Names of the numbers of a result whose spread is above BUSY."""
    if not isinstance(result, (dict, list)):
        return []
    if "spread" in result:
        return [name] if result["spread"] > BUSY else []
    return [found for key, value in (result.items() if isinstance(result, dict) else enumerate(result))
            for found in busy(value, f"{name}, {key}" if name else str(key))]


def load_before():
    """Load average of the last minute, asked before anything is measured; None where the system doesn't say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_ticks(proc=Path("/proc")):
    """(2,) ticks since the machine's start: of all cores, and of other work than this process's and its descendants'; None where it isn't Linux."""
    try:
        stat = (proc / "stat").read_text()
    except OSError:
        return None
    every = np.array(stat.split("\n", 1)[0].split()[1:9], int)  # user, nice, system, idle, iowait, irq, softirq, steal (other virtual machines' work)
    processes = {}
    for path in proc.glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            words = path.read_text().rpartition(")")[2].split()  # the name before it may hold blanks
            processes[path.parent.name] = words[1], sum(map(int, words[11:15]))  # parent; with the ended children that it waited for

    def is_own(pid):
        return pid == str(os.getpid()) or pid in processes and is_own(processes[pid][0])

    own = sum(ticks for pid, (_, ticks) in processes.items() if is_own(pid))
    return np.array([every.sum(), every.sum() - every[3:5].sum() - own])


def watched(proc=Path("/proc")):
    """Function that says what else ran before this call and since: {"load_before", "others_share", "others_bound"}; the share is of all cores' time."""
    load, before = load_before(), cpu_ticks(proc)

    def since():
        every, others = (0, 0) if before is None else cpu_ticks(proc) - before
        return {"load_before": load, "others_share": max(float(others / every), 0.0) if every else None, "others_bound": OTHERS}

    return since


def others(proc=Path("/proc")):
    """watched without the load average, for times that follow other work of this very process."""
    since = watched(proc)
    return lambda: {name: value for name, value in since().items() if name != "load_before"}


def loaded(result):
    """Why no number of a result can be trusted, ["the load average before the start was 1.2"], by what it has of `watched` and its run's cores."""
    load, others, cores = result.get("load_before") or 0, result.get("others_share") or 0, result.get("run", {}).get("cores") or os.cpu_count()
    return ([f"the load average before the start was {load:.1f}"] * (load > LOADED * cores)
            + [f"other processes took {100 * others:.0f} % of the CPU time"] * (others > OTHERS))


def warn(name, result):
    """Say on stderr why the numbers of a result with "busy" aren't to be trusted."""
    for why in (*loaded(result), *(f"{what} spread over more than {100 * BUSY:.0f} %" for what in result["busy"])):
        print(f"{name}: {why}. Run again on a quiet machine.", file=sys.stderr)
