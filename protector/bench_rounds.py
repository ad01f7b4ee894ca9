"""What a number measured in several rounds says, and whether it is to be trusted; the benches and evaluate/shared.py share it.

It needs NumPy alone: bench_head proves the kernel on machines without llama.cpp.
"""
import os
import sys

import numpy as np

BUSY = 0.10  # (high - low) / median of described, above which a number isn't to be trusted
LOADED = 0.5  # load average before the start, of the cores, above which none is


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


def is_loaded(load, cores=None):
    """Whether more ran before the start than numbers can be trusted beside.

    Args:
        load: of load_before. cores: of that machine; this one's if None.
    """
    return load is not None and load > LOADED * (cores or os.cpu_count())


def warn(name, result):
    """Say on stderr why the numbers of a result with "load_before" and "busy" aren't to be trusted."""
    if is_loaded(result["load_before"]):
        print(f"{name}: the load before the start was {result['load_before']:.1f} on {os.cpu_count()} cores. Run again on a quiet machine.", file=sys.stderr)
    for what in result["busy"]:
        print(f"{name}: {what} spread over more than {100 * BUSY:.0f} %. Run again on a quiet machine.", file=sys.stderr)
