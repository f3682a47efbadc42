import numpy as np


def test_swiglu_is_silu_times_up(x64: None) -> None:
    import jax.numpy as jnp

    from sinkjax.ops import activations

    rng = np.random.default_rng(0)
    gate, up = rng.normal(size=(2, 3, 5, 7)) * 4
    expected = gate / (1 + np.exp(-gate)) * up
    got = activations.swiglu(jnp.asarray(gate), jnp.asarray(up))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, rtol=1e-13)
