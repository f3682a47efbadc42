"""Registers come after the tokens and go again."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sinkjax.modules import Registers

B, T, R, D = 2, 5, 3, 700


def test_they_follow_the_tokens_and_are_dropped():
    registers = Registers(R, D, init_std=0.5, param_dtype="bfloat16", rngs=nnx.Rngs(0))
    rows = registers.embedding[...]
    assert rows.shape == (R, D) and rows.dtype == jnp.bfloat16
    assert abs(float(rows.astype(jnp.float32).std()) - 0.5) < 0.03
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    longer = registers(x)
    assert longer.shape == (B, T + R, D) and longer.dtype == jnp.float32
    np.testing.assert_array_equal(longer[:, :T], x)
    for row in range(B):
        np.testing.assert_array_equal(longer[row, T:], rows.astype(jnp.float32))
    np.testing.assert_array_equal(registers.drop(longer), x)


def test_what_is_refused():
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        Registers(0, D, rngs=nnx.Rngs(0))
    registers = Registers(R, D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="x: expected more than 3 tokens, got shape"):
        registers.drop(jnp.ones((B, R, D)))
