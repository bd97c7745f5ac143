"""What an engine may use of its machine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from nibble.engine.batch import MAX_VERIFIED_TOKENS
from nibble.kernels.layout import KVDtype

MAX_DRAFTS = 7  # of a sequence in one step: with its newest token 8, which cost little more than one


class SpeculationMethod(StrEnum):
    """Where drafts come from, see `speculative.py`."""

    OFF = "off"
    NGRAM = "ngram"  # the sequence's own text
    DRAFT_MODEL = "draft_model"  # a small model of the same tokenizer


@dataclass(frozen=True)
class EngineLimits:
    """Given by whoever makes the engine; what fits is computed from it in `memory_plan.py`.

    kv_cache_bytes is rounded down to whole blocks. None, for a device with memory of its own: what is left of
    memory_utilization, the share of the device's whole memory that may be in use, others' use included.

    swap_bytes: of the host's memory, page-locked, for the blocks of preempted sequences; rounded down to whole blocks,
    and without effect where the device's memory is the host's.

    num_drafts: of a sequence in one step, at most. draft_model_dir: a native checkpoint, where a draft model is the
    method.
    """

    kv_cache_bytes: int | None
    max_num_sequences: int = 64
    max_num_batched_tokens: int = 512
    kv_dtype: KVDtype = KVDtype.INT8
    memory_utilization: float = 0.9
    has_prefix_cache: bool = True
    swap_bytes: int = 0
    speculation: SpeculationMethod = SpeculationMethod.OFF
    num_drafts: int = MAX_DRAFTS
    draft_model_dir: Path | None = None

    def __post_init__(self) -> None:
        is_model = self.speculation is SpeculationMethod.DRAFT_MODEL
        assert is_model == (self.draft_model_dir is not None), "a draft model is given where it is the method"

    @property
    def max_verified(self) -> int:
        """Newest tokens and drafts of one step, where there are drafts."""
        return 0 if self.speculation is SpeculationMethod.OFF else MAX_VERIFIED_TOKENS
