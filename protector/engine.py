"""llama.cpp's Python package, imported so that it neither crawls nor crashes. All other files of this package take it from here.

Trap: with AMX (Intel's matrix unit) llama.cpp keeps quantised weights in a layout of their own, and in some builds the first product
of a batch ends the process: its tile configuration has bytes that were never set (llama.cpp issue 20824). Here such weights stay as
they are in the file, for every model that this process loads.

Trap: libgomp counts the OpenMP threads of all of a process's threads. Are there more than cores, as soon as a second thread (a server's
worker, say) has called llama.cpp, they sleep at a barrier after 100 turns instead of spinning for 3 ms, and a small model has hundreds of
barriers a decode: one of 10 tokens took 47 ms on 2 cores instead of 20. An "active" wait spins 1,000 turns then, which is enough (21 ms). What
it would spin otherwise, a core's full load for minutes, is set back to the 3 ms. libgomp reads both once, as it is loaded.
"""
import os
import sys
from contextlib import contextmanager

_WAITS = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"}


@contextmanager
def _waits():
    """These settings for the time of an import, unless the user has made one: other programs and libraries don't get them."""
    if sys.platform != "linux" or any(name in os.environ for name in _WAITS):
        yield
        return
    os.environ.update(_WAITS)
    try:
        yield
    finally:
        for name in _WAITS:
            del os.environ[name]


with _waits():
    import llama_cpp


_default_params = llama_cpp.llama_cpp.llama_model_default_params


def _params_without_amx():
    options = _default_params()
    if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
        options.use_extra_bufts = False
    return options


# In the module, where the package's own classes look it up, and in the package.
llama_cpp.llama_cpp.llama_model_default_params = llama_cpp.llama_model_default_params = _params_without_amx
