"""int4_linear against the matrix in float64, its weights rounded to fp16 as the kernels do.

All of it twice on a device whose architecture has a kernel of its own: with that one, and with the one of all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nibble.kernels.interface import Int4Weight, Mode
from nibble.kernels.pack import dequantize_int4, pack_int4
from tests.kernels import reference

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels
    from nibble.kernels.cuda.device import Device

pytestmark = pytest.mark.gpu

SHAPES = [
    (64, 32, 32),
    (48, 96, 32),
    (576, 576, 32),
    (960, 576, 32),
    (3072, 576, 32),
    (576, 1536, 32),
    (130, 192, 64),
    (72, 704, 64),
    (200, 128, 128),
    (8, 384, 128),
    (1024, 2048, 128),
    (520, 4096, 128),
    (256, 14336, 128),
]
NUM_TOKENS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 100, 130)


@pytest.fixture(params=["own kernel", "general kernel"], autouse=True)
def _which_kernel(request: pytest.FixtureRequest, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    from nibble.kernels.cuda import int4_linear

    if device.architecture not in int4_linear.LAUNCHERS and request.param == "own kernel":
        pytest.skip(f"{device.architecture} has none of its own")
    if request.param == "general kernel":
        monkeypatch.setattr(int4_linear, "LAUNCHERS", {})


@dataclass(frozen=True)
class Matrix:
    packed: np.ndarray
    values: np.ndarray  # float64 (N, K), rounded to fp16
    group_size: int

    def weight(self, kernels: CUDAKernels) -> Int4Weight:
        rows, columns = self.values.shape
        return Int4Weight(kernels.to_device(self.packed), rows, columns, self.group_size)


def random_matrix(rng: np.random.Generator, rows: int, columns: int, group_size: int, spread: float = 0.02) -> Matrix:
    """A weight as quantisers make them: minimum = -8 * scale, and anything else."""
    groups = columns // group_size
    q = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    scale = (rng.random((rows, groups)) * spread).astype(np.float16)
    minimum = np.where(rng.random((rows, groups)) < 0.5, -8 * scale, rng.standard_normal((rows, groups)) * 3 * spread)
    packed = pack_int4(q, scale, minimum.astype(np.float16))
    values = dequantize_int4(packed, rows, columns, group_size).astype(np.float16).astype(np.float64)
    return Matrix(packed, values, group_size)


def random_x(rng: np.random.Generator, num_tokens: int, columns: int) -> np.ndarray:
    return rng.standard_normal((num_tokens, columns)).astype(np.float16)


def bound(x: np.ndarray, matrix: Matrix, expected: np.ndarray) -> np.ndarray:
    """The largest error of an fp16 result.

    A tensor-core step adds 16 products to the sum after cutting all to a common exponent: less than 17 * 2^-24 of the
    largest term, K / 16 times. Slices and the epilogue add a few roundings more. Then half a unit of fp16.
    """
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(matrix.values).T
    limit: np.ndarray = 2.0**-19 * (x.shape[1] / 16 + 16) * magnitude + 2.0**-11 * np.abs(expected) + 2.0**-24
    return limit


def run(
    kernels: CUDAKernels, x: np.ndarray, weight: Int4Weight, mode: Mode = Mode.DECODE, **options: Any
) -> np.ndarray:
    arrays = {
        name: kernels.to_device(value) if isinstance(value, np.ndarray) else value for name, value in options.items()
    }
    out: np.ndarray = kernels.to_host(kernels.int4_linear(kernels.to_device(x), weight, mode=mode, **arrays))
    return out


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_product_matches_the_dequantized_matrix(
    kernels: CUDAKernels, rng: np.random.Generator, rows: int, columns: int, group_size: int, mode: Mode
) -> None:
    matrix = random_matrix(rng, rows, columns, group_size)
    weight = matrix.weight(kernels)
    for num_tokens in NUM_TOKENS:
        x = random_x(rng, num_tokens, columns)
        with kernels.temporaries():
            out = run(kernels, x, weight, mode)
        assert out.shape == (num_tokens, rows)
        assert out.dtype == np.float16
        expected = x.astype(np.float64) @ matrix.values.T
        assert (np.abs(out - expected) <= bound(x, matrix, expected)).all(), num_tokens


@pytest.mark.parametrize("mode", Mode)
def test_large_prefill_matches_the_dequantized_matrix(
    kernels: CUDAKernels, rng: np.random.Generator, mode: Mode
) -> None:
    matrix = random_matrix(rng, 448, 1024, 128)
    weight = matrix.weight(kernels)
    for num_tokens in (256, 511, 1030, 4100):
        x = random_x(rng, num_tokens, 1024)
        with kernels.temporaries():
            out = run(kernels, x, weight, mode)
        expected = x.astype(np.float64) @ matrix.values.T
        assert (np.abs(out - expected) <= bound(x, matrix, expected)).all(), num_tokens


@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [
        (48, 96, 32),
        (960, 576, 32),
        (130, 192, 64),
        (1024, 2048, 128),
        (256, 14336, 128),
        (5120, 2048, 128),
        (28672, 512, 128),
    ],
)
def test_decode_row_does_not_depend_on_the_batch(
    kernels: CUDAKernels, rng: np.random.Generator, rows: int, columns: int, group_size: int
) -> None:
    """Any number of tokens and any order give the bits of one token alone."""
    weight = random_matrix(rng, rows, columns, group_size).weight(kernels)
    x = random_x(rng, 130, columns)
    residual = rng.standard_normal((130, rows)).astype(np.float32)
    alone = np.concatenate([_two_outputs(kernels, x[i : i + 1], weight, residual[i : i + 1]) for i in range(130)])
    counts = range(1, 131) if rows * columns < 1 << 20 else (*NUM_TOKENS, 24, 31, 32, 48, 63, 127, 128)
    for num_tokens in counts:
        order = rng.permutation(130)[:num_tokens]
        out = _two_outputs(kernels, x[order], weight, residual[order])
        np.testing.assert_array_equal(out, alone[order], err_msg=f"{num_tokens} tokens")


def _two_outputs(kernels: CUDAKernels, x: np.ndarray, weight: Int4Weight, residual: np.ndarray) -> np.ndarray:
    """With a residual (the float32 bits of the sums), and gated."""
    with kernels.temporaries():
        sums = run(kernels, x, weight, residual=residual)
        if weight.out_features % 16:
            return sums
        return np.concatenate((sums, run(kernels, x, weight, gated=True).astype(np.float32)), axis=1)


def test_unused_tokens_of_a_block_do_not_matter(kernels: CUDAKernels, rng: np.random.Generator) -> None:
    """A NaN or an infinity stays in its row."""
    weight = random_matrix(rng, 192, 512, 128).weight(kernels)
    for num_tokens in (3, 8, 20, 64, 100):
        x = random_x(rng, num_tokens, 512)
        expected = run(kernels, x, weight)
        x[1, 50], x[2, 7] = np.nan, np.inf
        out = run(kernels, x, weight)
        assert np.isnan(out[1]).all()
        assert not np.isfinite(out[2]).any()
        keep = [i for i in range(num_tokens) if i not in (1, 2)]
        np.testing.assert_array_equal(out[keep], expected[keep])


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 33, 64, 70, 200])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(104, 96, 32), (512, 1024, 128)])
def test_bias_residual_and_gate(
    kernels: CUDAKernels,
    rng: np.random.Generator,
    rows: int,
    columns: int,
    group_size: int,
    num_tokens: int,
    mode: Mode,
) -> None:
    matrix = random_matrix(rng, rows, columns, group_size)
    weight = matrix.weight(kernels)
    x = random_x(rng, num_tokens, columns)
    bias = rng.standard_normal(rows).astype(np.float32)
    residual = rng.standard_normal((num_tokens, rows)).astype(np.float32) * 100
    product = x.astype(np.float64) @ matrix.values.T
    error = bound(x, matrix, product)
    roundings = 2 if mode is Mode.PREFILL else 1  # of the bias, of the product

    out = run(kernels, x, weight, mode, bias=bias)
    assert (np.abs(out - (product + bias)) <= roundings * bound(x, matrix, np.abs(product) + np.abs(bias))).all()
    exact = 2.0**-22 * np.abs(residual) + error - 2.0**-11 * np.abs(product)
    out = run(kernels, x, weight, mode, residual=residual)
    assert (np.abs(out - (product + residual)) <= exact).all()
    out = run(kernels, x, weight, mode, bias=bias, residual=residual)
    assert (np.abs(out - (product + bias + residual)) <= exact + 2.0**-22 * np.abs(bias)).all()
    if rows % 16 == 0:
        _check_gate(run(kernels, x, weight, mode, gated=True), product, error)
        _check_gate(run(kernels, x, weight, mode, gated=True, bias=bias), product + bias, roundings * error + 2**-9)


def _check_gate(out: np.ndarray, gate_up: np.ndarray, error: np.ndarray) -> None:
    """|d silu(g) * u| <= 1.1 |u| dg + |silu(g)| du, and the rounding of the result."""
    expected = reference.silu_and_mul(gate_up)
    runs, errors = (array.reshape(len(array), -1, 2, 8) for array in (gate_up, error))
    gate, up = np.abs(runs[:, :, 0]) + errors[:, :, 0], np.abs(runs[:, :, 1]) + errors[:, :, 1]
    slack = (1.1 * up * errors[:, :, 0] + gate * errors[:, :, 1]).reshape(expected.shape)
    assert out.shape == expected.shape
    assert (np.abs(out - expected) <= slack + 2.0**-10 * np.abs(expected) + 2.0**-24).all()


def test_residual_is_updated_in_place(kernels: CUDAKernels, rng: np.random.Generator) -> None:
    weight = random_matrix(rng, 192, 512, 128).weight(kernels)
    residual = kernels.to_device(np.zeros((3, 192), np.float32))
    x = kernels.to_device(random_x(rng, 3, 512))
    assert kernels.int4_linear(x, weight, residual=residual, mode=Mode.DECODE) is residual


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("num_tokens", [1, 20, 64, 90])
def test_extreme_values(kernels: CUDAKernels, rng: np.random.Generator, num_tokens: int, mode: Mode) -> None:
    """The largest fp16 activations against the smallest and largest scales: exact in range, infinite beyond it."""
    matrix = random_matrix(rng, 128, 1024, 128)
    x = random_x(rng, num_tokens, 1024)
    x[:, 3] = 65504
    x[-1] = 0
    residual = np.zeros((num_tokens, 128), np.float32)
    out = run(kernels, x, matrix.weight(kernels), mode, residual=residual)
    expected = x.astype(np.float64) @ matrix.values.T
    assert (np.abs(out - expected) <= bound(x, matrix, expected)).all()
    assert (out[-1] == 0).all()
    tiny = random_matrix(rng, 128, 1024, 128, spread=2.0**-18)  # subnormal scales and weights
    out = run(kernels, x, tiny.weight(kernels), mode, residual=residual)
    expected = x.astype(np.float64) @ tiny.values.T
    assert (np.abs(out - expected) <= bound(x, tiny, expected)).all()
    large = random_matrix(rng, 128, 1024, 128, spread=500.0)
    out = run(kernels, x[:-1] if num_tokens > 1 else np.full_like(x, 65504), large.weight(kernels), mode)
    assert np.isinf(out).any()


@pytest.mark.parametrize("mode", Mode)
def test_no_tokens_give_no_rows(kernels: CUDAKernels, rng: np.random.Generator, mode: Mode) -> None:
    weight = random_matrix(rng, 96, 96, 32).weight(kernels)
    assert run(kernels, np.empty((0, 96), np.float16), weight, mode).shape == (0, 96)


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 128])
def test_graph_replays_give_the_same(
    kernels: CUDAKernels,
    rng: np.random.Generator,
    replay: Callable[[Callable[[], None]], None],
    num_tokens: int,
) -> None:
    """A chain of linears as a layer has them; each replay starts from what the one before left."""
    first, second = random_matrix(rng, 512, 1024, 128), random_matrix(rng, 1024, 256, 128)
    first_weight, second_weight = first.weight(kernels), second.weight(kernels)
    x = kernels.to_device(random_x(rng, num_tokens, 1024))
    residual = kernels.zeros((num_tokens, 1024), np.float32)

    def step() -> None:
        hidden = kernels.int4_linear(x, first_weight, mode=Mode.DECODE, gated=True)
        kernels.int4_linear(hidden, second_weight, residual=residual, mode=Mode.DECODE)

    step()
    once = kernels.to_host(residual).astype(np.float64)
    replay(step)  # once for real, twice as a graph
    total = kernels.to_host(residual)
    np.testing.assert_allclose(total, 4 * once, rtol=1e-6, atol=1e-6)
    assert np.abs(once).max() > 0.01


def test_two_streams_do_not_disturb_each_other(kernels: CUDAKernels, rng: np.random.Generator) -> None:
    cupy = pytest.importorskip("cupy")
    weight = random_matrix(rng, 512, 4096, 128).weight(kernels)
    xs = [kernels.to_device(random_x(rng, 8, 4096)) for _ in range(2)]
    expected = [kernels.to_host(kernels.int4_linear(x, weight, mode=Mode.DECODE)) for x in xs]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    outs: list[list[Any]] = [[], []]
    try:
        for _ in range(50):
            for i, stream in enumerate(streams):
                stream.use()
                outs[i].append(_own_memory(kernels, xs[i], weight))
    finally:
        kernels.device.stream.use()
    for stream in streams:
        stream.synchronize()
    for i in range(2):
        for out in outs[i]:
            np.testing.assert_array_equal(kernels.to_host(out), expected[i])


def _own_memory(kernels: CUDAKernels, x: Any, weight: Int4Weight) -> Any:
    """The result; the workspace moves on by more than the call used, so that no other call gets that."""
    out = kernels.int4_linear(x, weight, mode=Mode.DECODE)
    kernels.device.empty((1 << 20,), np.uint8)
    return out
