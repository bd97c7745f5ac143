"""A quantised model as a `Source`, so that `checkpoint/convert.py` writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.source import Floats, RowFormat, Rows, Source
from nibble.engine.quantize.decoder import LINEARS, PARTS
from nibble.engine.quantize.work_files import WorkFiles

_PREFIX = "model.layers."
_PART_OF = {name: part for part, name in PARTS.items()}


class QuantizedSource:
    """The original with its layers replaced."""

    def __init__(self, original: Source, work: WorkFiles) -> None:
        self._original = original
        self._work = work
        self.label = original.label
        self.config = original.config

    def floats(self, name: str, rows: slice = slice(None)) -> Floats:
        place = _place(name)
        if place is None:
            return self._original.floats(name, rows)
        assert place[1] not in LINEARS, f"{name} is quantised: it has rows"
        return self._work.vector(*place)[rows]

    def format(self, name: str) -> RowFormat:
        place = _place(name)
        if place is None:
            return self._original.format(name)
        rows = self._work.rows(*place)
        return RowFormat("int4", rows.q.shape[1] // rows.scale.shape[1])

    def rows(self, name: str) -> Rows:
        place = _place(name)
        return self._original.rows(name) if place is None else self._work.rows(*place)

    def column_order(self, name: str) -> npt.NDArray[np.int32] | None:
        return self._original.column_order(name) if _place(name) is None else None

    def stored_type(self, name: str) -> str:
        return self._original.stored_type(name) if _place(name) is None else "INT4"

    def stored_bytes(self, name: str) -> int:
        place = _place(name)
        if place is None:
            return self._original.stored_bytes(name)
        return sum(array.nbytes for array in self._work.rows(*place))

    def write_tokenizer(self, directory: Path) -> None:
        self._original.write_tokenizer(directory)


def _place(name: str) -> tuple[int, str] | None:
    """(layer, part) of a tensor within a layer."""
    if not name.startswith(_PREFIX):
        return None
    index, _, rest = name.removeprefix(_PREFIX).partition(".")
    return int(index), _PART_OF[rest]
