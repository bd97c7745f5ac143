"""Errors of the engine.

EngineError
├── RequestError     one request cannot be run as asked; the others go on
├── CapacityError    the device cannot hold what was asked for at start
└── DraftModelError  the draft model cannot draft for the model
"""


class EngineError(Exception):
    """Base of all errors raised by the engine."""


class RequestError(EngineError):
    """A request is refused: says what, the limit and the value."""


class DraftModelError(EngineError):
    """Its tokenizer is another one, or it is not there: says which file."""


class CapacityError(EngineError):
    """Weights, workspace or the KV cache do not fit: says what, the limit and the value."""
