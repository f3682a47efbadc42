"""Output is a pytree whose leaves may be anything a transformation puts there."""

import jax
import jax.numpy as jnp

from sinkjax.models import Output


def test_pytree():
    output = Output(jnp.ones((2, 3, 5)), jnp.ones((2, 3, 7)), statistics={"entropy": jnp.ones(11)})
    assert len(jax.tree.leaves(output)) == 3 and output.cache is None and output.aux == {}
    shapes = jax.tree.map(lambda leaf: leaf.shape, output)
    assert isinstance(shapes, Output) and shapes.hidden == (2, 3, 7)
    traced = jax.eval_shape(lambda o: jax.tree.map(lambda leaf: leaf[..., 0], o), output)
    assert traced.statistics["entropy"].shape == ()
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(output)]
    assert paths == [".logits", ".hidden", ".statistics['entropy']"]
