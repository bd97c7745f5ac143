"""Everything that can be wrong with a checkpoint. Each message is one line that names the file and the tensor or key.

CheckpointError
+-- GGUFError              the bytes are not a well-formed GGUF file
+-- SafetensorsError       the bytes are not a well-formed safetensors file
+-- UnsupportedModelError  a well-formed file of a model, format or option that Nibble does not run
+-- NativeFormatError      a native checkpoint directory is incomplete or does not fit its own configuration
+-- ConversionError        numbers that the native format cannot hold, or a disk that cannot hold the result
+-- SourceError            the path given as a model is not one
"""

from __future__ import annotations


class CheckpointError(Exception):
    """Base of all errors of `engine/checkpoint`."""


class GGUFError(CheckpointError):
    pass


class SafetensorsError(CheckpointError):
    pass


class UnsupportedModelError(CheckpointError):
    pass


class NativeFormatError(CheckpointError):
    pass


class ConversionError(CheckpointError):
    pass


class SourceError(CheckpointError):
    pass
