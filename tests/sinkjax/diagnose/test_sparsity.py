"""Recall on a model's own queries and keys, against its dense weights."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sinkjax import diagnose, models
from sinkjax.ops.sparse import AShape


def test_recall_is_the_weight_that_the_pattern_lets_through():
    config = models.DecoderConfig(
        vocab_size=23, model_dim=14, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
        mlp_dim=9, context_length=31,
    )  # fmt: skip
    model = models.Decoder(config, rngs=nnx.Rngs(1))
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 23, (2, 29)))
    pattern = AShape(num_sink_tokens=2, window=5, block_size=4)
    everything = AShape(num_sink_tokens=1, window=40, block_size=4)
    kept = diagnose.sparse_recall(model, tokens, {"a": pattern, "all": everything})
    weights = np.asarray(diagnose.capture(model, tokens).weights)  # [L, B, N, T, S]
    t, s = np.arange(29)[:, None], np.arange(29)
    chosen = (s < 2) | (t - s < 5)
    want = (weights * chosen).sum(-1).mean((1, 3))
    np.testing.assert_allclose(kept["a"].recall, want, atol=1e-5)
    np.testing.assert_allclose(kept["all"].recall, 1, atol=1e-5)
    assert (kept["all"].read == 1).all() and (0.3 < kept["a"].read).all()
    assert (kept["a"].read < 1).all() and not kept["a"].truncated.any()
