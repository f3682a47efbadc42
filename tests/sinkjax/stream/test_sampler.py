import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.stream import Sampler

LOGITS = np.array([1.3, -0.4, 2.1, 0.0, 1.9, -3.0, 0.7])
DRAWS = 20_000


def distribution(temperature=1.0, kept=None):
    """The probabilities of the kept tokens, in float64."""
    p = np.exp(LOGITS / temperature)
    if kept is not None:
        p = np.where(np.isin(np.arange(7), kept), p, 0)
    return p / p.sum()


def frequencies(sampler, forbidden=()):
    logits, keys = jnp.asarray(LOGITS, jnp.float32), jax.random.split(jax.random.key(3), DRAWS)
    drawn = jax.jit(jax.vmap(lambda key: sampler(key, logits, forbidden)))(keys)
    return np.bincount(np.asarray(drawn), minlength=7) / DRAWS


@pytest.mark.parametrize(
    ("sampler", "forbidden", "want"),
    [
        (Sampler(), (), distribution()),
        (Sampler(temperature=0.5), (), distribution(0.5)),
        (Sampler(temperature=2.0), (), distribution(2.0)),
        (Sampler(top_k=3), (), distribution(kept=[2, 4, 0])),
        (Sampler(top_k=100), (), distribution()),
        # softmax: .365 .299 .164 .090 ...: 0.6 is reached with the second
        (Sampler(top_p=0.6), (), distribution(kept=[2, 4])),
        (Sampler(top_p=0.7), (), distribution(kept=[2, 4, 0])),
        (Sampler(top_p=1.0), (), distribution()),
        # after top_k the two are .55 and .45: the nucleus is measured on what top_k left
        (Sampler(top_k=2, top_p=0.5), (), distribution(kept=[2])),
        # a colder distribution has a smaller nucleus
        (Sampler(temperature=0.25, top_p=0.6), (), distribution(0.25, kept=[2])),
        (Sampler(), (2, 0), distribution(kept=[1, 3, 4, 5, 6])),
        (Sampler(top_k=2), (2,), distribution(kept=[4, 0])),
    ],
)
def test_distribution(sampler, forbidden, want):
    got = frequencies(sampler, forbidden)
    # four standard deviations of a binomial frequency
    assert (np.abs(got - want) <= 4 * np.sqrt(want * (1 - want) / DRAWS)).all()


def test_the_boundaries_of_the_nucleus():
    p = distribution()[np.argsort(-LOGITS)].cumsum()
    assert p[0] < 0.6 < p[1] < 0.7 < p[2]


def test_greedy():
    key = jax.random.key(0)
    greedy = Sampler(temperature=0)
    logits = jnp.asarray([[0.0, 2.0, 2.0], [5.0, -1.0, 4.0]])
    np.testing.assert_array_equal(greedy(key, logits), [1, 0])
    np.testing.assert_array_equal(greedy(key, logits, (0, 1)), [2, 2])
    assert greedy(key, logits[0]).shape == ()


def test_the_likeliest_survives_any_cut():
    key, logits = jax.random.key(0), jnp.zeros((5, 11)).at[:, 3].set(0.1)
    np.testing.assert_array_equal(Sampler(top_p=1e-6)(key, logits), 3)
    np.testing.assert_array_equal(Sampler(top_k=1)(key, logits), 3)


def test_it_is_a_function_of_the_key():
    logits = jnp.zeros((50, 11))
    a, b = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(Sampler()(a, logits), Sampler()(a, logits))
    assert (Sampler()(a, logits) != Sampler()(b, logits)).any()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_impossible_values(options):
    with pytest.raises(ValueError, match=f"Sampler.{next(iter(options))}: expected"):
        Sampler(**options)
