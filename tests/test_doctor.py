"""What `protector doctor` says of this machine; what it says of a missing file stands in test_main.py."""
import sys

import pytest

from protector import doctor
from protector.engine import llama_cpp
from protector.llama import cpu_threads


@pytest.mark.parametrize("can, line", [(True, "GPU offload: yes"), (False, "GPU offload: no, built for the CPU")])
def test_whether_llama_cpp_was_built_for_a_gpu(real_base, monkeypatch, can, line):
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: can)
    assert next(found[1:] for found in doctor.report() if found[0] == "llama.cpp") == (f"{cpu_threads()} threads; {line}", True)


@pytest.mark.parametrize("package, lines", [("llama_cpp", ["llama.cpp", "detector"]), ("gguf", ["detector"])])
def test_a_missing_package_is_reported(real_base, monkeypatch, package, lines):
    """Regression: the report said "missing" and ended in a traceback."""
    for name in ("protector.engine", "protector.llama") if package == "llama_cpp" else ():
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name)
    monkeypatch.setitem(sys.modules, package, None)  # its import fails
    found = {name: value for name, value, ok in doctor.report() if not ok}
    assert list(found) == lines and found["detector"].startswith(f"Protector: {package} must be installed to load ")
