"""How llama.cpp's threads wait is set while it is loaded, and for nothing else."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import protector

IMPORT = "import os; before = dict(os.environ); import protector.engine; assert dict(os.environ) == before"


def shown(code, **settings):
    """What libgomp says of its settings as it is loaded."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": os.pathsep.join(sys.path), **settings}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def libgomp():
    if "GOMP_SPINCOUNT" not in shown("import llama_cpp"):
        pytest.skip("llama.cpp isn't built with libgomp here")


def test_threads_spin_briefly_and_the_environment_stays_as_it_was(libgomp):
    assert "'ACTIVE'" not in shown("import llama_cpp")
    text = shown(IMPORT)
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in text and "GOMP_SPINCOUNT = '300000'" in text


def test_a_users_own_setting_stays(libgomp):
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown(IMPORT, OMP_WAIT_POLICY="passive")
    assert "GOMP_SPINCOUNT = '7'" in shown(IMPORT, GOMP_SPINCOUNT="7")


def test_the_package_imports_llama_cpp_there_and_nowhere_else():
    package = Path(protector.__file__).parent
    found = [path.name for path in sorted(package.rglob("*.py")) if re.search(r"^ *import llama_cpp$", path.read_text(encoding="utf-8"), re.M)]
    assert found == ["engine.py"]


@pytest.mark.parametrize("has_amx", [True, False])
def test_no_model_gets_amx_weights(has_amx):
    code = f"""
import llama_cpp
theirs = llama_cpp.llama_cpp.llama_model_default_params()
llama_cpp.llama_print_system_info = lambda: b"AVX2 = 1 | AMX_INT8 = {int(has_amx)} | "
from protector.engine import llama_cpp
for module in (llama_cpp, llama_cpp.llama_cpp, llama_cpp.llama.llama_cpp, llama_cpp._internals.llama_cpp):
    assert theirs.use_extra_bufts and module.llama_model_default_params().use_extra_bufts == {not has_amx}
"""
    shown(code)
