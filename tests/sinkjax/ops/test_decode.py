"""What `decode_attention` accepts, refuses and dispatches."""

from typing import Any

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sinkjax.ops import decode
from sinkjax.ops.decode import decode_attention, decode_step
from sinkjax.ops.dispatch import Implementation

B, T, S, N, K, H = 2, 3, 7, 6, 2, 4


def call(**changes: Any) -> Any:
    draw = np.random.default_rng(0).standard_normal
    arguments: dict[str, Any] = {
        "query": jnp.asarray(draw((B, T, N, H)), jnp.float32),
        "key": jnp.asarray(draw((B, K, S, H)), jnp.float32),
        "value": jnp.asarray(draw((B, K, S, H)), jnp.float32),
        "query_positions": jnp.broadcast_to(jnp.arange(4, 4 + T), (B, T)),
        "key_positions": jnp.broadcast_to(jnp.arange(S), (B, S)),
    } | changes
    return decode_attention(**arguments)


def test_defaults():
    out = call()
    np.testing.assert_array_equal(out, call(scale=H**-0.5, normalizer="softmax"))
    np.testing.assert_array_equal(out, call(implementation="reference"))
    positions = jnp.broadcast_to(jnp.arange(S), (B, K, S))
    np.testing.assert_array_equal(out, call(key_positions=positions))
    assert np.abs(out - call(scale=1.0)).max() > 1e-3


def test_residual():
    out, lse = call(return_residual=True, sinks=jnp.zeros(N))
    one, same = call(return_residual=True, normalizer="softmax1")
    np.testing.assert_allclose(out, one, rtol=0, atol=1e-6)
    np.testing.assert_allclose(lse, same, rtol=0, atol=1e-6)
    assert lse.shape == (B, T, N)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window: expected at least 1 or None, got 0"),
        ({"num_sink_tokens": -1}, "num_sink_tokens: expected at least 0, got -1"),
        ({"num_sink_slots": S + 1}, f"num_sink_slots: expected 0 to S={S}, got {S + 1}"),
        ({"sinks": jnp.zeros(N), "normalizer": "softmax1"}, "only softmax takes sink logits"),
        ({"normalizer": "softmin"}, "expected one of softmax"),
        ({"return_residual": True, "normalizer": "softpick"}, "softpick has no log-sum-exp"),
        ({"normalizer": "ssmax", "normalizer_params": {"bias": jnp.zeros(N)}}, "got \\['bias'\\]"),
        (
            {"normalizer": "ssmax", "normalizer_params": {"scale": jnp.zeros(K)}},
            "normalizer_params\\['scale'\\]: expected \\[N=6\\], got \\(2,\\)",
        ),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap: expected more than 0"),
        ({"implementation": "cuda"}, "implementation: expected one of .*reference.* got 'cuda'"),
        ({"implementation": ()}, "implementation: expected one of .*reference"),
        ({"query": jnp.zeros((B, T, 5, H))}, "got N=5, K=2"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_bad_bias():
    # The shape checks of the tests would come before those of the function.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        for shape in [(1, K, 1, S), (N, T, S), (B, N, T, S + 1)]:
            with pytest.raises(ValueError, match="bias: expected a shape broadcastable to"):
                call(bias=jnp.zeros(shape))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_dispatch_falls_through_and_lists_reasons(monkeypatch):
    def check(**call):
        raise NotImplementedError("needs a TPU")

    for name in ("tpu", "gpu"):
        monkeypatch.setitem(decode.IMPLEMENTATIONS, name, Implementation(print, check))
    np.testing.assert_array_equal(call(implementation=("tpu", "reference")), call())
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        call(implementation="tpu")
    with pytest.raises(ExceptionGroup) as group:
        call(implementation=("tpu", "gpu"))
    assert len(group.value.exceptions) == 2


def test_a_step_writes_and_attends():
    draw = np.random.default_rng(1).standard_normal
    new_key, new_value = (jnp.asarray(draw((B, 1, K, H)), jnp.float32) for _ in range(2))
    leaves = [jnp.asarray(draw((B, K, S, H)), jnp.float32) for _ in range(2)]
    positions = {
        "query_positions": jnp.full((B, 1), S),
        "key_positions": jnp.broadcast_to(jnp.arange(S), (B, S)).at[0, 2].set(S),
        "sinks": jnp.zeros(N),
    }
    query = jnp.asarray(draw((B, 1, N, H)), jnp.float32)
    slots = jnp.array([2, -1])  # the second row writes nothing
    step = decode_step(query, new_key, new_value, *leaves, slots=slots, **positions)
    written = [
        x.at[0, :, 2].set(n[0, 0]) for x, n in zip(leaves, (new_key, new_value), strict=True)
    ]
    np.testing.assert_array_equal(step.key, written[0])
    np.testing.assert_array_equal(step.value, written[1])
    out, lse = decode_attention(query, *written, return_residual=True, **positions)
    np.testing.assert_allclose(step.out, out, atol=1e-6)
    np.testing.assert_allclose(step.lse, lse, atol=1e-6)
    with pytest.raises(NotImplementedError, match="elu maps its keys"):
        options = positions | {"sinks": None, "normalizer": "elu"}
        decode_step(query, new_key, new_value, *leaves, slots=slots, **options)
