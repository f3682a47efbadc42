"""tap records under nnx.capture and leaves no trace otherwise."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sinkjax.modules import tap


class Doubler(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.array(2.0))
        self.evaluated = 0

    def __call__(self, x):
        y = x * self.scale[...]
        tap(self, "doubled", y)
        tap(self, "square", lambda: self._square(y))
        return y

    def _square(self, y):
        calls.append(1)
        return y**2


calls = []


@pytest.fixture(autouse=True)
def fresh():
    calls.clear()


@pytest.fixture(params=["graph", "tree"])
def mode(request):
    graph = request.param == "graph"
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        yield request.param


def names(module):
    return sorted(str(path) for path, _ in nnx.to_flat_state(nnx.state(module)))


def test_without_capture_nothing_happens(mode):
    module, x = Doubler(), jnp.arange(3.0)
    before = names(module), set(vars(module))
    module(x)
    jax.jit(lambda m, x: m(x))(module, x)
    assert (names(module), set(vars(module))) == before
    assert not calls, "a lazy value was computed though nobody wanted it"


@pytest.mark.parametrize("compiled", [False, True])
def test_capture_returns_the_values(mode, compiled):
    module, x = Doubler(), jnp.arange(3.0)

    def run(module, x):
        return nnx.capture(module, nnx.Intermediate)(x)

    y, found = (jax.jit(run) if compiled else run)(module, x)
    found = nnx.to_pure_dict(found)
    assert jnp.array_equal(y, 2 * x)
    assert jnp.array_equal(found["doubled"][0], 2 * x)
    assert jnp.array_equal(found["square"][0], 4 * x**2)
    assert names(module) == ["('scale',)"]


def test_capture_of_another_kind_does_not_evaluate(mode):
    class Other(nnx.Variable):
        pass

    _, found = nnx.capture(Doubler(), Other)(jnp.arange(3.0))
    assert not nnx.to_pure_dict(found)
    assert not calls
