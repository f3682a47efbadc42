"""Few bits: the formula in numpy, the bytes, and half a step at most whatever the scales are stored in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops.quantize import Quantized, dequantize, pack, packed_size, quantize, unpack
from sinkjax_kernels.decode import int8

B, S, H = 3, 5, 13
BITS = (2, 4, 8)
X = np.random.default_rng(0).normal(size=(B, S, H)).astype(np.float32) * 3 + 20
HERE = np.arange(S) != 2  # one token is not there


CODES = {bits: np.random.default_rng(1).integers(0, 2**bits, (2, H), np.uint8) for bits in BITS}
WAYS = [(b, symmetric, "bfloat16") for b in BITS for symmetric in (False, True)]
WAYS += [(b, False, "float32") for b in BITS] + [(4, True, "float16")]


@functools.lru_cache
def results():
    """All that the tests look at, as one program."""

    def run(x, here, codes):
        found: dict = {}
        for bits, symmetric, dtype in WAYS:
            q = quantize(x, bits=bits, axis=-2, symmetric=symmetric, where=here, dtype=dtype)
            back = dequantize(q, bits=bits, size=H, dtype=jnp.float32)
            found[bits, symmetric, dtype] = q, back
        equal = jnp.where(here, 0.3, x[0])
        q = quantize(equal, bits=2, axis=0, where=here & (jnp.arange(H) > 0), dtype="bfloat16")
        found["equal"] = dequantize(q, bits=2, size=H, dtype=jnp.float32)
        found["zeros"] = dequantize(
            quantize(x * 0, bits=4, axis=0), bits=4, size=H, dtype=jnp.float32
        )
        found["symmetric"] = quantize(x - 20, bits=8, axis=-1, symmetric=True)
        found["int8"] = int8.quantize(x - 20)
        for bits, code in codes.items():
            packed = pack(code, bits)
            found["packed", bits] = packed, unpack(packed, bits, H)
        names.extend(found)
        return list(found.values())

    names: list = []
    values = jax.jit(run)(X, HERE[:, None], CODES)
    return dict(zip(names, jax.tree.map(np.asarray, values), strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_the_formula(bits):
    q, back = results()[bits, False, "float32"]
    there = X[:, HERE]
    low, high = there.min(1, keepdims=True), there.max(1, keepdims=True)
    scale = (high - low) / np.float32(2**bits - 1)
    np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(q.zero, low)
    want = low + scale * np.round((there - low) / scale)
    np.testing.assert_allclose(back[:, HERE], want, rtol=1e-6)
    assert q.codes.dtype == np.uint8 and q.codes.shape == (B, S, -(-H * bits // 8))
    np.testing.assert_array_equal(q.codes[:, ~HERE], 0)


@pytest.mark.parametrize("way", WAYS)
def test_no_number_is_further_than_half_a_scale(way):
    """Also where scales are coarse: a zero near 20 in bfloat16 is off by many of the steps of 8 bits."""
    q, back = results()[way]
    assert q.scale.dtype == jnp.dtype(way[2]) and (q.zero is None) == way[1]
    scale = q.scale.astype(np.float32)
    error = np.abs(back - X)[:, HERE]
    assert (error <= scale * (0.5 + 1e-3)).all() and (error > scale * 0.4).any()


def test_eight_symmetric_bits_are_those_of_the_decode_kernel():
    q, (codes, scale) = results()["symmetric"], results()["int8"]
    np.testing.assert_array_equal(q.codes.astype(np.int32) - 127, codes)
    np.testing.assert_allclose(q.scale[..., 0], scale, rtol=1e-6)


def test_equal_numbers_and_nobody():
    np.testing.assert_allclose(results()["equal"][HERE, 1:], 0.3, rtol=1e-5)
    np.testing.assert_array_equal(results()["equal"][:, 0], 0)
    np.testing.assert_array_equal(results()["zeros"], 0)


@pytest.mark.parametrize("bits", BITS)
def test_bits_are_really_packed(bits):
    packed, unpacked = results()["packed", bits]
    n = packed_size(H, bits)
    assert packed.shape == (2, n) and packed.dtype == np.uint8
    for i in range(H):
        byte = packed[:, i % n].astype(int)
        np.testing.assert_array_equal(byte >> i // n * bits & 2**bits - 1, CODES[bits][:, i])
    np.testing.assert_array_equal(unpacked, CODES[bits])


def test_refuses():
    with pytest.raises(ValueError, match="bits: expected one of 2, 4, 8, got 3"):
        quantize(jnp.ones((2, 3)), bits=3, axis=0)
    with pytest.raises(ValueError, match="bits: expected one of 2, 4, 8, got 16"):
        dequantize(
            Quantized(jnp.ones((2, 3), jnp.uint8), jnp.ones((1, 3))),
            bits=16,
            size=3,
            dtype="float32",
        )
