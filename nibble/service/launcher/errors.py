"""Why a service could not be started, for the person who typed the command.

LaunchError
├── PortTaken        something else listens on the address
├── ModelNotFound    the model is neither a native directory nor a GGUF file, or the demo model could not be fetched
└── ProcessFailed    a child process ended before the service was ready
"""

from __future__ import annotations


class LaunchError(Exception):
    """The message is for the terminal: what is wrong and, where there is one, what to do."""


class PortTaken(LaunchError):
    pass


class ModelNotFound(LaunchError):
    pass


class ProcessFailed(LaunchError):
    pass
