"""What `protector doctor` says of this machine; what it says of a missing file stands in test_main.py."""
import pytest

from protector import doctor
from protector.engine import llama_cpp


@pytest.mark.parametrize("can, line", [(True, "GPU offload: yes"), (False, "GPU offload: no, built for the CPU")])
def test_whether_llama_cpp_was_built_for_a_gpu(real_base, monkeypatch, can, line):
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: can)
    assert next(found[1:] for found in doctor.report() if found[0] == "llama.cpp") == (line, True)
