"""Gates whose kernels are cut over a mesh: forward and gradients of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sinkjax.modules import AttentionConfig, Gate
from sinkjax.sharding import make_mesh, shardings

B, T, D, N, K, H = 8, 3, 16, 4, 2, 6
CONFIG = AttentionConfig(
    model_dim=D, num_heads=N, num_kv_heads=K, head_dim=H, gate="shared", gate_open=0.25
)
SUBJECTS = {"query": N, "key": K, "value": K, "attention": N}


# The four that need more than the plain rule: a kernel for all heads, the residual stream, few
# key/value heads, slices of the input.
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("kind", ["shared", "output", "value_state", "conditional_token_mlp"])
def test_gate_on_a_mesh(kind, explicit):
    gate = Gate(dataclasses.replace(CONFIG, gate=kind), rngs=nnx.Rngs(0))
    graph, state = nnx.split(gate)
    mesh = make_mesh(4, 2, explicit=explicit)
    rng = np.random.default_rng(0)
    shape = (B, T, D) if gate.place == "output" else (B, T, SUBJECTS[gate.place], H)
    spec = P("data") if gate.place == "output" else P("data", None, "model", None)
    subject, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, (B, T, D)))

    def run(state, subject, x):
        def loss(*operands):
            out = nnx.merge(graph, operands[0])(*operands[1:])
            return (out**2).sum(), out

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(state, subject, x)

    expected = run(state, subject, x)
    pure = nnx.to_pure_dict(state)
    placed = shardings({"attention": {"gate": pure}}, mesh)["attention"]["gate"]
    with jax.set_mesh(mesh):
        nnx.replace_by_pure_dict(state, jax.device_put(pure, placed))
        subject = jax.device_put(subject, NamedSharding(mesh, spec))
        found = jax.jit(run)(state, subject, jax.device_put(x, NamedSharding(mesh, P("data"))))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), found, expected
    )
