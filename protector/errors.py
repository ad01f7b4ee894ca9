"""What a user of the guard may see go wrong."""


class ProtectorError(Exception):
    """Base of every error of this package that is meant to be shown to the user."""


class ModelError(ProtectorError, RuntimeError):
    """A model file is missing, cut, of the wrong kind, or fails its own canaries."""


class MissingPackage(ModelError):
    """An optional package, or the package that carries a model, isn't installed; the message says how to install it."""


class DataError(ProtectorError, ValueError):
    """A data file or row is malformed; the message names the file and the row."""


class DeadlineExceeded(ProtectorError, TimeoutError):
    """`deadline_ms` passed before the work was done."""
