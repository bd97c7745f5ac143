"""What can be wrong with a quantisation before it runs. What is wrong with the model is a CheckpointError.

QuantizeError
+-- OptionError        an option that is none
+-- CalibrationError   a calibration text that cannot be read, or is too short
+-- OutputError        a place to write to that is taken
"""

from __future__ import annotations


class QuantizeError(Exception):
    """Base of all errors of `engine/quantize`."""


class OptionError(QuantizeError):
    pass


class CalibrationError(QuantizeError):
    pass


class OutputError(QuantizeError):
    pass
