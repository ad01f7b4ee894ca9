"""What is installed, which backend and threads run, and whether the canaries hold."""
import importlib.metadata
import os
import platform
import sys
import time

from .base import WEIGHTS, base_path, cache_dir, file_sha256
from .errors import ProtectorError


def report(detector=None):
    """Yield (name, value, ok) lines.

    Args:
        detector: GGUF file or folder; the shipped one if None.
    """
    yield "python", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores", sys.version_info >= (3, 10)
    for package, needed in (("numpy", True), ("llama-cpp-python", True), ("gguf", True), ("torch", False), ("transformers", False)):
        try:
            yield package, importlib.metadata.version(package), True
        except importlib.metadata.PackageNotFoundError:
            yield package, "missing" if needed else "not installed (needed for training and GPU guarding only)", not needed
    try:
        from . import _native

        built = "C++ and CUDA" if _native.HAS_CUDA else "C++"
        yield "kernels", built if _native.LIBRARY else "not built: the reference runs in their place", True
    except (RuntimeError, OSError) as error:
        yield "kernels", str(error), False
    try:
        base = base_path()
        yield "base model", f"{base.name}, sha256 {file_sha256(base)[:16]}", True
        yield "cache", str(cache_dir()), os.access(cache_dir(), os.W_OK)
    except (ProtectorError, OSError) as error:
        yield "base model", str(error), False
        return
    try:
        from .engine import llama_cpp
        from .llama import cpu_threads
    except ImportError as error:
        yield "llama.cpp", str(error), False
    else:
        yield "llama.cpp", f"{cpu_threads()} threads; GPU offload: {'yes' if llama_cpp.llama_supports_gpu_offload() else 'no, built for the CPU'}", True
    try:
        from .guard import Protector

        start = time.monotonic()
        guard = Protector(detector)
        yield "detector", f"{guard.detector.name}, {guard.detector.quantisation}, loaded and canaries hold in {time.monotonic() - start:.2f} s", True
        yield "thresholds", ", ".join(f"{kind} {value:.3f}" for kind, value in guard.thresholds.items()), True
        yield "detoxifier", "present" if (WEIGHTS / "detoxifier.gguf").exists() else "missing: flagged answers are refused", True
    except ProtectorError as error:
        yield "detector", str(error), False
