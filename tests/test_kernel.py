"""The CUDA kernel without a GPU: nvcc's word on each architecture, and the real body on the CPU under sanitizers."""
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100, 120)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@needs_nvcc
def test_cuda_compiles_without_a_warning_or_a_spill(tmp_path):
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    built = run("nvcc", "-std=c++17", "-O3", "--threads=2", "-Werror=all-warnings", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra,-Werror",
                *code, "-c", ROOT / "csrc/harm_score.cu", "-o", tmp_path / "harm_score.o")
    assert built.returncode == 0, built.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.stderr)
    # 3 dtypes x 1 or 4 warps a row x aligned or not, for each architecture.
    assert len(spills) == 12 * len(ARCHITECTURES)
    assert set(spills) == {("0", "0", "0")}
    # launch_bounds promises 4 blocks of 128 threads to a multiprocessor's 65,536 registers.
    assert max(int(used) for used in re.findall(r"Used (\d+) registers", built.stderr)) <= 128


@needs_nvcc
def test_aligned_kernels_load_vectors_before_they_use_them(tmp_path):
    ptx = tmp_path / "harm_score.ptx"
    built = run("nvcc", "-std=c++17", "-O3", "-arch=compute_80", "-ptx", ROOT / "csrc/harm_score.cu", "-o", ptx)
    assert built.returncode == 0, built.stderr
    bodies = dict(re.findall(r"\.entry (\w*harm_score_kernel\w*)\((.*?)\n\}", ptx.read_text(), re.DOTALL))
    assert len(bodies) == 12
    for name, body in bodies.items():
        operations = re.findall(r"ld\.global\.cs\.v4|fma\.rn\.f32", body)
        if "Lb1E" in name:  # ALIGNED: 4 + 2 + 1 streaming loads, each batch ahead of its arithmetic
            assert operations.count("ld.global.cs.v4") == 7, name
            assert operations[:5] == ["ld.global.cs.v4"] * 4 + ["fma.rn.f32"], name
        else:
            assert "ld.global.cs.v4" not in operations, name


def build_emulated(folder, csrc, *flags):
    built = run("g++", "-std=c++20", *flags, "-I", csrc, "-I", ROOT / "tests", ROOT / "tests/kernel_emulated.cpp", "-o", folder / "emulated")
    assert built.returncode == 0, built.stderr
    return folder / "emulated"


@needs_gxx
def test_kernel_body_matches_float64_under_sanitizers(tmp_path):
    emulated = build_emulated(tmp_path, ROOT / "csrc", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *SANITIZE)
    result = run(emulated, 129)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "0 failures\n"


# What is planted, the text it replaces in harm_score.cuh, what stands there then, and how it shows.
FAULTS = {
    "read past the last row": ("x + (first + k * stride) * SIZE", "x + (first + k * stride + 1) * SIZE", "AddressSanitizer"),
    "read past the weight": ("chunks * SIZE + thread < args.d", "chunks * SIZE + thread <= args.d", "AddressSanitizer"),
    "index not checked": ("position < 0 || position >= args.positions", "position < 0 && position >= args.positions", "AddressSanitizer"),
    "vector load of an unaligned row": ("args.row_stride * int64_t(sizeof(T)) % 16 == 0", "true", "misaligned address"),
    "no barrier": ("__syncthreads();", ";", "fp64"),
    "tail dropped": ("chunks * SIZE + thread < args.d", "false", "fp64"),
    "norm over the wrong width": ("square / float(args.d)", "square / float(args.d + 1)", "fp64"),
    "row past the end": ("row >= args.rows", "row > args.rows", "AddressSanitizer"),
    "warps chosen by the batch": ("args.d * int64_t(sizeof(T)) <=", "args.rows * args.d * int64_t(sizeof(T)) <=", "depends on its batch"),
}


@needs_gxx
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault, tmp_path):
    original, planted, symptom = FAULTS[fault]
    source = (ROOT / "csrc/harm_score.cuh").read_text()
    assert source.count(original) == 1, "the kernel changed: plant the fault where the code is now"
    (tmp_path / "harm_score.h").write_text((ROOT / "csrc/harm_score.h").read_text())
    (tmp_path / "harm_score.cuh").write_text(source.replace(original, planted))
    result = run(build_emulated(tmp_path, tmp_path, "-O0", "-Wno-unknown-pragmas", *SANITIZE), 7)
    assert result.returncode != 0
    assert symptom in result.stdout + result.stderr


CPU_DRIVER = """
#include "harm_score.h"
#include <vector>
int main() {
    for (int64_t d : {1, 8, 31, 64, 576, 1000, 4096, 4097})
        for (int dtype : {PROTECTOR_FP32, PROTECTOR_FP16, PROTECTOR_BF16})
            for (int64_t rows : {0, 1, 7, 129}) {
                // Exact sizes: a read one element too far is a fault.
                std::vector<char> hidden(rows * d * (dtype == PROTECTOR_FP32 ? 4 : 2), 0x11);
                std::vector<float> weight(d, 0.5f), out(rows);
                std::vector<int64_t> index(rows);
                for (int64_t row = 0; row < rows; ++row) index[row] = row % 5 ? rows - 1 - row : rows + row - 7 * (row % 2);
                protector_harm_score_args args = {hidden.data(), index.data(), weight.data(), out.data(), rows, d, rows, 0, d,
                                                  0, 1e-5f, 1, dtype, 0};
                if (protector_harm_score_cpu(&args) != PROTECTOR_OK) return 1;
            }
    return 0;
}
"""


@needs_gxx
def test_cpu_twin_is_clean_under_sanitizers(tmp_path):
    (tmp_path / "driver.cpp").write_text(CPU_DRIVER)
    built = run("g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror", *SANITIZE, "-I", ROOT / "csrc",
                tmp_path / "driver.cpp", ROOT / "csrc/harm_score.cpp", "-o", tmp_path / "driver")
    assert built.returncode == 0, built.stderr
    result = run(tmp_path / "driver")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_cpu_twin_compiles_as_strict_cpp17_and_its_header_as_c(compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on the PATH")
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    built = run(compiler, "-std=c++17", *strict, ROOT / "csrc/harm_score.cpp")
    assert built.returncode == 0, built.stderr
    built = run(compiler, "-x", "c", "-std=c99", *strict, ROOT / "csrc/harm_score.h")
    assert built.returncode == 0, built.stderr
