"""What setup.py ships and what protector/_native.py accepts. Builds a copy of the tree, offline."""
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest

from protector import _native

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = f"protector/_kernels{_native.SUFFIX}"
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH")


def run(*command, cwd=None, check=True, **environment):
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True,
                            env={**os.environ, "PROTECTOR_CUDA": "0", **environment})
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture
def tree(tmp_path):
    """The files that a build reads; the package's own imports are left out by an empty __init__.py."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "protector/weights").mkdir(parents=True)
    (tree / "protector/weights/detector.gguf").write_bytes(b"GGUF")
    (tree / "protector/__init__.py").touch()
    for name in ("protector/head.py", "protector/_native.py", "setup.py", "MANIFEST.in", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def build_wheel(tree, **environment):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tree / "dist", tree, **environment)
    wheel, = (tree / "dist").glob("*.whl")
    return wheel, zipfile.ZipFile(wheel).namelist()


def installed(wheel, folder, code):
    """What `code` prints where only the wheel's protector can be imported."""
    zipfile.ZipFile(wheel).extractall(folder)
    return run(sys.executable, "-c", f"import sys; sys.path[0] = {str(folder)!r}\n{code}", cwd=folder).stdout.strip()


SCORE = """
import numpy as np
from protector import _native, head
print(_native.HAS_CUDA, head.harm_score(np.ones((1, 8), np.float32), np.zeros(8, np.float32)))"""


@needs_gxx
def test_wheel_from_the_sdist_holds_a_library_that_scores(tree, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path / "sdist", cwd=tree)
    archive, = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    source, = (tmp_path / "unpacked").iterdir()
    for name in ("harm_score.h", "harm_score.cuh", "harm_score.cu", "harm_score.cpp"):
        assert (source / "csrc" / name).exists()
    assert (source / "tests/emulate_cuda.h").exists() and (source / "protector/weights/detector.gguf").exists()
    wheel, names = build_wheel(source)
    assert re.fullmatch(r"mllm_protector-[\d.]+-py3-none-(linux|macosx|win).*\.whl", wheel.name)
    assert LIBRARY in names and "protector/weights/detector.gguf" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "build"))]
    assert installed(wheel, tmp_path / "site", SCORE) == "False HarmScore(values=array([0.5], dtype=float32), backend='cpp')"


@needs_gxx
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_wheel_holds_cuda_where_nvcc_is_without_a_gpu(tree, tmp_path):
    wheel, _ = build_wheel(tree, PROTECTOR_CUDA="1")
    assert installed(wheel, tmp_path / "site", SCORE).startswith("True ")
    code = (tmp_path / "site" / LIBRARY).read_bytes()
    for arch in (80, 90, 100, 120):
        assert b"sm_%d" % arch in code


@needs_gxx
def test_stale_build_folder_is_not_shipped(tree, tmp_path):
    run(sys.executable, "setup.py", "-q", "build", cwd=tree)
    library, = (tree / "build").glob(f"lib*/{LIBRARY}")
    library.write_bytes(b"stale")
    (library.parent / "deleted_module.py").touch()
    for built in (tree / "build").rglob("*.o"):
        built.write_bytes(b"stale")
    wheel, names = build_wheel(tree)
    assert "protector/deleted_module.py" not in names
    assert installed(wheel, tmp_path / "site", SCORE).endswith("backend='cpp')")


def test_build_can_be_left_out_and_says_so(tree, tmp_path):
    (tree / LIBRARY).write_bytes(b"left here by `pip install -e .`")
    wheel, names = build_wheel(tree, PROTECTOR_BUILD="0", CXX="no-such-compiler", CC="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in names and "protector/head.py" in names
    assert installed(wheel, tmp_path / "site", SCORE).endswith("backend='numpy')")


def test_no_compiler_is_an_error_with_a_way_out(tree):
    result = run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, check=False, CXX="no-such-compiler", CC="no-such-compiler")
    assert result.returncode == 1
    assert re.search(r"^setup\.py: csrc/ must compile with a C\+\+17 compiler, got: .*no-such-compiler.*\. Install g\+\+ or clang, or "
                     r"set PROTECTOR_BUILD=0 to install without the compiled kernels", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr


@needs_gxx
def test_broken_nvcc_is_an_error_with_a_way_out(tree, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_80 && exit\nexit 1\n')
    nvcc.chmod(0o755)
    result = run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, check=False, PROTECTOR_CUDA="1",
                 PATH=f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}")
    assert result.returncode == 1
    assert "set PROTECTOR_CUDA=0 for a build without CUDA, or PROTECTOR_BUILD=0" in result.stderr


@needs_gxx
def test_inplace_build_is_what_native_looks_for(tree):
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree)
    assert (tree / LIBRARY).exists()
    assert _native.load(tree / LIBRARY) is not None


def test_missing_library_warns_once_and_is_none(tmp_path):
    with pytest.warns(RuntimeWarning, match=r"_kernels\.so was not built, harm_score runs its NumPy or PyTorch reference") as caught:
        assert _native.load(tmp_path / "_kernels.so") is None
    assert len(caught) == 1


def compile_library(folder, source):
    (folder / "library.c").write_text(source)
    run("gcc", "-shared", "-fPIC", folder / "library.c", "-o", folder / "_kernels.so")
    return folder / "_kernels.so"


@needs_gxx
def test_library_of_another_abi_raises(tmp_path):
    library = compile_library(tmp_path, "int protector_abi(void) { return 99; }")
    with pytest.raises(RuntimeError, match=rf"load: _kernels\.so must have ABI {_native.ABI}, got 99\. Rebuild it"):
        _native.load(library)


@needs_gxx
def test_library_that_is_no_library_raises(tmp_path):
    foreign = compile_library(tmp_path, "int something_else(void) { return 1; }")
    text = tmp_path / "text.so"
    text.write_text("not a library")
    for library in (foreign, text):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a broken build must raise, not warn
            with pytest.raises(RuntimeError, match=rf"load: {library.name} must be a protector kernel library, got .*\. Rebuild it"):
                _native.load(library)


@needs_gxx
def test_python_and_c_agree_on_the_abi(tmp_path):
    names = [name for name, _ in _native.Args._fields_]
    lines = "".join(f'printf("%zu ", offsetof(protector_harm_score_args, {name}));' for name in names)
    (tmp_path / "layout.c").write_text(
        '#include "harm_score.h"\n#include <stddef.h>\n#include <stdio.h>\nint main(void) { printf("%d %d %d %d ", PROTECTOR_ABI, '
        f'PROTECTOR_FP32, PROTECTOR_FP16, PROTECTOR_BF16); {lines} printf("%zu", sizeof(protector_harm_score_args)); return 0; }}')
    run("gcc", "-std=c99", "-Wall", "-Werror", "-I", ROOT / "csrc", tmp_path / "layout.c", "-o", tmp_path / "layout")
    expected = [_native.ABI, _native.FP32, _native.FP16, _native.BF16,
                *(getattr(_native.Args, name).offset for name in names), ctypes.sizeof(_native.Args)]
    assert [int(number) for number in run(tmp_path / "layout").stdout.split()] == expected
