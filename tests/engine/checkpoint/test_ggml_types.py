from __future__ import annotations

import gguf
import numpy as np
import pytest

from nibble.engine.checkpoint.ggml_types import DEQUANTIZABLE, GGML_TYPES, dequantize


@pytest.mark.parametrize("name", sorted(DEQUANTIZABLE))
def test_dequantised_numbers_are_those_of_the_gguf_package_bit_for_bit(name: str) -> None:
    """Random bytes are random blocks: all scales occur, infinite, NaN and subnormal ones too."""
    number = gguf.GGMLQuantizationType[name]
    kind = GGML_TYPES[number]
    data = np.random.default_rng(0).integers(0, 256, (48, 256 // kind.block_values * kind.block_bytes), dtype=np.uint8)
    ours = dequantize(data, kind)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(data, number)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), np.ascontiguousarray(theirs).view(np.uint32))


def test_every_known_type_has_the_name_and_size_that_the_gguf_package_knows() -> None:
    for number, kind in GGML_TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (kind.name, (kind.block_values, kind.block_bytes)) == (theirs.name, gguf.GGML_QUANT_SIZES[theirs])
