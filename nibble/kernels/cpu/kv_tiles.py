"""Blocks of keys and values as bf16 tiles, the B operands of `amx.py`.

INT8 values become bf16 exactly (8 bits); their scales and zeros stay outside of the products. fp16 values are rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nibble.kernels.cpu import amx, memory, simd
from nibble.kernels.cpu.jit import inline_jit
from nibble.kernels.cpu.vector_ir import F16, F32X16, I8, I32X16, LANES, VECTOR_BYTES, load_at, shuffle, store_at
from nibble.kernels.layout import BLOCK_SIZE

PARAMETER_BYTES = 4  # (scale, zero) fp16


def _floats(builder: Any, values: Any) -> Any:
    if values.type.element == F16:
        return builder.fpext(values, F32X16)
    return builder.sitofp(builder.sext(values, I32X16), F32X16)


def _key_tile(element: Any) -> Any:
    def typed(typingctx: Any, keys: Any, stride: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            keys, stride, out = args
            rows = []
            for _ in range(amx.TILE):
                values = load_at(builder, keys, ir.VectorType(element, amx.TILE_DEPTH))
                pair = [shuffle(builder, values, values, list(range(odd, amx.TILE_DEPTH, 2))) for odd in range(2)]
                rows.append(amx.bfloat16_pairs(builder, *(_floats(builder, half) for half in pair)))
                keys = builder.add(keys, stride)
            for i, pairs in enumerate(amx.transpose(builder, rows)):
                store_at(builder, out, pairs, i * VECTOR_BYTES)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp), codegen

    return intrinsic(typed)


def _value_pairs(element: Any) -> Any:
    def typed(typingctx: Any, first: Any, second: Any, out: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            rows = [_floats(builder, load_at(builder, place, ir.VectorType(element, LANES))) for place in args[:2]]
            store_at(builder, args[2], amx.bfloat16_pairs(builder, *rows))
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp), codegen

    return intrinsic(typed)


int8_key_tile = _key_tile(I8)  # (keys, stride, out): 32 dims of 16 tokens, stride bytes apart, as a tile
float16_key_tile = _key_tile(F16)
int8_value_pairs = _value_pairs(I8)  # (first, second, out): 16 dims of two tokens as a row of a tile
float16_value_pairs = _value_pairs(F16)


@inline_jit
def unpack_keys(keys, head_dim, is_float16, out):
    """out: for each 32 dims the 4 tiles of a block's 64 tokens."""
    for dim in range(0, head_dim, amx.TILE_DEPTH):
        for token in range(0, BLOCK_SIZE, amx.TILE):
            if is_float16:
                float16_key_tile(keys + (token * head_dim + dim) * 2, head_dim * 2, out)
            else:
                int8_key_tile(keys + token * head_dim + dim, head_dim, out)
            out += amx.TILE_BYTES


@inline_jit
def unpack_values(values, head_dim, count, is_float16, out):
    """out: for each 32 tokens the D / 16 tiles of a block's values; tokens from `count` on are 0 (they may be NaN)."""
    tiles = head_dim // amx.TILE
    for token in range(0, BLOCK_SIZE, 2):
        place = out + (token // amx.TILE_DEPTH * tiles * amx.TILE + token % amx.TILE_DEPTH // 2) * VECTOR_BYTES
        first = token * head_dim
        second = first + head_dim
        for dim in range(0, head_dim, LANES):
            if token + 1 >= count:
                memory.store(place, simd.broadcast(np.float32(0)))
            elif is_float16:
                float16_value_pairs(values + (first + dim) * 2, values + (second + dim) * 2, place)
            else:
                int8_value_pairs(values + first + dim, values + second + dim, place)
            place += amx.TILE_BYTES
    if count % 2:
        _last_value(values, head_dim, count - 1, is_float16, out)


@inline_jit
def _last_value(values, head_dim, token, is_float16, out):
    """A token without a partner: pairs of it and itself, whose second half meets a weight of 0."""
    tiles = head_dim // amx.TILE
    place = out + (token // amx.TILE_DEPTH * tiles * amx.TILE + token % amx.TILE_DEPTH // 2) * VECTOR_BYTES
    for dim in range(token * head_dim, (token + 1) * head_dim, LANES):
        if is_float16:
            float16_value_pairs(values + dim * 2, values + dim * 2, place)
        else:
            int8_value_pairs(values + dim, values + dim, place)
        place += amx.TILE_BYTES


@inline_jit
def unpack_parameters(parameters, count, has_parameters, out):
    """out fp32 (4, 64): K scales, K zeros, V scales, V zeros; 0 from `count` on, 1 and 0 for blocks without."""
    for which in range(2):
        scales = out + 2 * which * BLOCK_SIZE * 4
        zeros = scales + BLOCK_SIZE * 4
        for t in range(BLOCK_SIZE):
            scale, zero = np.float32(0), np.float32(0)
            if t < count:
                scale = np.float32(1)
                if has_parameters:
                    place = parameters + (which * BLOCK_SIZE + t) * PARAMETER_BYTES
                    scale, zero = memory.float16_at(place), memory.float16_at(place + 2)
            memory.store_float32(scales + t * 4, scale)
            memory.store_float32(zeros + t * 4, zero)
