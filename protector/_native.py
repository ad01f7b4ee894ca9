"""The compiled half of harm_score, loaded by ctypes. Knows csrc/harm_score.h and neither NumPy nor torch."""
import ctypes
import sys
import warnings
from pathlib import Path

ABI = 1  # PROTECTOR_ABI in csrc/harm_score.h
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
PATH = Path(__file__).with_name("_kernels" + SUFFIX)
FP32, FP16, BF16 = 0, 1, 2


class Args(ctypes.Structure):
    """protector_harm_score_args, field by field; csrc/harm_score.h says what each means."""
    _fields_ = [("hidden", ctypes.c_void_p), ("index", ctypes.c_void_p), ("weight", ctypes.c_void_p), ("out", ctypes.c_void_p),
                ("rows", ctypes.c_int64), ("d", ctypes.c_int64), ("positions", ctypes.c_int64),
                ("batch_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64),
                ("bias", ctypes.c_float), ("eps", ctypes.c_float), ("temperature", ctypes.c_float),
                ("dtype", ctypes.c_int32), ("logit", ctypes.c_int32)]


def load(path):
    """Load the kernel library at `path`.

    Args:
        path: pathlib.Path of the library that setup.py builds.
    Returns:
        ctypes.CDLL with argument types set, or None with a warning where there is no file.
    Raises:
        RuntimeError: the file can't be loaded or is of another ABI. A broken build must not pass for a slow one.
    """
    if not path.exists():
        warnings.warn(f"protector: {path.name} was not built, harm_score runs its NumPy or PyTorch reference instead. "
                      "Run `pip install .` with a C++ compiler for the compiled one.", RuntimeWarning, stacklevel=3)
        return None
    try:
        library = ctypes.CDLL(str(path))
        abi = library.protector_abi()
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"load: {path.name} must be a protector kernel library, got {error}. "
                           "Rebuild it with `pip install --force-reinstall --no-deps .`.") from error
    if abi != ABI:
        raise RuntimeError(f"load: {path.name} must have ABI {ABI}, got {abi}. "
                           "Rebuild it with `pip install --force-reinstall --no-deps .` (or `pip install -e .`).")
    library.protector_harm_score_cpu.argtypes = [ctypes.POINTER(Args)]
    library.protector_harm_score_cuda.argtypes = [ctypes.POINTER(Args), ctypes.c_int, ctypes.c_void_p]
    library.protector_status_text.restype = ctypes.c_char_p
    return library


LIBRARY = load(PATH)  # at import, so that the warning comes once and a broken build is known before the first score
HAS_CUDA = LIBRARY is not None and bool(LIBRARY.protector_has_cuda())


def check(status):
    """RuntimeError unless a call's status is 0."""
    if status:
        raise RuntimeError(f"harm_score: the kernel must return 0, got {status} "
                           f"({LIBRARY.protector_status_text(status).decode()}). Use harm_score_ref, and report this.")
