"""What can be chosen about a quantisation. Imports no torch: a command line wants to complain before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from nibble.engine.quantize.errors import OptionError
from nibble.kernels.layout import GROUP_SIZES


class Method(StrEnum):
    """rtn: nearest values. sinq: channel scales from the weights alone. awq: channel scales, then ranges. gptq: error
    feedback. awq-gptq: the scales of awq, then gptq on corrected weights, then least squares: the best
    (docs/quantization.md)."""

    RTN = "rtn"
    SINQ = "sinq"
    AWQ = "awq"
    GPTQ = "gptq"
    AWQ_GPTQ = "awq-gptq"

    @classmethod
    def named(cls, name: str) -> Method:
        """Raises OptionError."""
        try:
            return cls(name)
        except ValueError:
            raise OptionError(f"the method must be one of {', '.join(cls)} (got {name!r})") from None


class KVScales(StrEnum):
    """Of an INT8 KV cache. token: found while serving. channel: calibrated, stored in the checkpoint."""

    TOKEN = "token"
    CHANNEL = "channel"

    @classmethod
    def named(cls, name: str) -> KVScales:
        """Raises OptionError."""
        try:
            return cls(name)
        except ValueError:
            raise OptionError(f"the KV cache's scales must be of a token or a channel (got {name!r})") from None


@dataclass(frozen=True)
class Options:
    """group_size: the wish; a linear whose rows it does not divide gets the next smaller one. calibration: a text or
    JSON lines file; the text that comes with Nibble where it is None. device: cpu or cuda; None: cuda where there is
    one. Raises OptionError."""

    method: Method = Method.AWQ_GPTQ
    group_size: int = 128
    calibration: Path | None = None
    num_sequences: int = 128
    sequence_tokens: int = 512
    device: str | None = None
    kv: KVScales = KVScales.TOKEN

    @property
    def is_calibrated(self) -> bool:
        return self.method not in (Method.RTN, Method.SINQ) or self.kv is KVScales.CHANNEL

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise OptionError(f"the group size must be one of {GROUP_SIZES} (got {self.group_size})")
        if self.device not in (None, "cpu", "cuda"):
            raise OptionError(f"the device must be cpu or cuda (got {self.device!r})")
