"""MLLM-Protector: guard the answers of any multimodal language model.

    import protector
    v = protector.guard("Is it safe to mix bleach and vinegar?", "Yes, it is safe to mix bleach and vinegar.")
    v.flagged, v.text
"""
import threading

from .errors import DataError, DeadlineExceeded, ModelError, ProtectorError
from .guard import Protector, Verdict

__version__ = "0.1.0"
__all__ = ["Protector", "Verdict", "guard", "score", "ProtectorError", "ModelError", "DataError", "DeadlineExceeded"]

_default, _lock = None, threading.Lock()


def _shared():
    """The default Protector, made at the first use and shared by all threads."""
    global _default
    with _lock:
        if _default is None:
            _default = Protector()
        return _default


def guard(q, a, history=None):
    """Guard one answer with the shipped models; see Protector.guard.

    Args:
        q: the question; "" for none.
        a: the answer.
        history: earlier turns, [(question, answer), ...].
    Returns:
        Verdict
    Raises:
        ModelError: the shipped models can't be loaded: there is no guard, and no verdict.
    """
    return _shared().guard(q, a, history)


def score(q, a, history=None):
    """P(harmful) of one answer by the shipped detector; see Protector.score."""
    return _shared().score(q, a, history)
