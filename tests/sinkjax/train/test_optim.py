"""Who gets Muon, who decays, and how fast."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sinkjax.models.config import DecoderConfig
from sinkjax.models.parameters import abstract, parameters
from sinkjax.train.config import NO_DECAY, OptimizerConfig
from sinkjax.train.optim import decay_mask, make_optimizer, muon_parameters, schedule

MODEL = DecoderConfig(
    vocab_size=23,
    model_dim=11,
    num_layers=4,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    mlp_dim=17,
    context_length=13,
    sinks=True,
    qk_norm=True,
    gate="headwise",
    windows=(None, 5),
)
PLAIN = OptimizerConfig(
    warmup_steps=0, schedule="constant", clip_norm=None, weight_decay=0.0, learning_rate=0.1
)


def _params(seed):
    shapes = parameters(abstract(dataclasses.replace(MODEL, num_layers=2, windows=(None,))))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])


def _stack(params):
    """The two layers stacked, as `scan_layers` has them."""
    blocks = params["blocks"]
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), blocks[0], blocks[1])
    return params | {"blocks": {0: both}}


def _update(config, params, gradients):
    optimizer = make_optimizer(config, steps=10)
    # One program instead of hundreds of small ones.
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])
    return update(gradients, params)


@pytest.mark.parametrize("gate", ["none", "headwise", "elementwise"])
def test_muon_gets_the_seven_matrices_of_every_block_and_nothing_else(gate):
    names = ("query", "key", "value", "out")
    expected = {f"attention/{name}/kernel" for name in names}
    expected |= {f"mlp/{name}/kernel" for name in ("gate", "up", "down")}
    looped = muon_parameters(parameters(abstract(dataclasses.replace(MODEL, gate=gate))))
    assert len(looped) == 4 * 7
    assert set(looped) == {f"blocks/{i}/{name}" for i in range(4) for name in expected}
    scanned = dataclasses.replace(MODEL, gate=gate, scan_layers=True)
    stacked = muon_parameters(parameters(abstract(scanned)))
    assert len(stacked) == 2 * 7
    assert set(stacked) == {f"blocks/{i}/{name}" for i in range(2) for name in expected}


def test_muon_orthogonalises_the_matrix_that_attention_applies():
    params, gradients = _params(0), _params(1)
    config = dataclasses.replace(PLAIN, name="muon", muon_consistent_rms=None, learning_rate=1.0)
    block = _update(config, params, gradients)["blocks"][1]
    matrices = {
        "query": block["attention"]["query"]["kernel"].reshape(11, 48),
        "value": block["attention"]["value"]["kernel"].reshape(11, 24),
        "out": block["attention"]["out"]["kernel"].reshape(48, 11),
        "down": block["mlp"]["down"]["kernel"],
    }
    for name, matrix in matrices.items():
        rows, columns = matrix.shape
        scale = max(1.0, columns / rows) ** 0.5  # optax's scaling by shape
        singular = np.linalg.svd(np.asarray(matrix) / scale, compute_uv=False)
        # Five Newton-Schulz steps with Keller Jordan's coefficients end between 0.5 and 1.3.
        assert 0.5 < singular.min() and singular.max() < 1.3, name
    # Each head for itself would also have been orthogonal, with another result.
    head = np.linalg.svd(np.asarray(block["attention"]["query"]["kernel"][:, 0]), compute_uv=False)
    assert head.max() < 2.0 and head.min() < 0.7 * head.max()


def test_muon_treats_every_stacked_layer_by_itself():
    params, gradients = _params(0), _params(1)
    config = dataclasses.replace(PLAIN, name="muon", weight_decay=0.2)
    looped = _stack(_update(config, params, gradients))
    stacked = _update(config, _stack(params), _stack(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), looped, stacked)


def test_what_muon_leaves_moves_as_under_adamw_with_its_own_rate():
    params, gradients = _params(0), _params(1)
    muon = dataclasses.replace(PLAIN, name="muon", adam_learning_rate=0.05, weight_decay=0.3)
    adamw = dataclasses.replace(PLAIN, learning_rate=0.05, weight_decay=0.3)
    with_muon, without = (_update(c, params, gradients) for c in (muon, adamw))
    matrices = set(muon_parameters(params))
    for (keys, a), b in zip(
        jax.tree_util.tree_leaves_with_path(with_muon), jax.tree.leaves(without), strict=True
    ):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        same = np.allclose(a, b, atol=1e-7)
        assert same == (path not in matrices), path


def test_norms_sinks_and_attention_gates_do_not_decay():
    params = _params(0)
    mask = decay_mask(params, NO_DECAY)
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    paths = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in leaves}
    left_alone = {path for path, decays in paths.items() if not decays}
    per_block = {
        "attention_norm/scale",
        "mlp_norm/scale",
        "attention/sinks",
        "attention/gate/kernel",
        "attention/query_norm/scale",
        "attention/key_norm/scale",
    }
    expected = {f"blocks/{i}/{name}" for i in range(2) for name in per_block}
    assert left_alone == expected | {"final_norm/scale"}
    assert paths["blocks/0/mlp/gate/kernel"]
    # With a zero gradient decay is all that moves: by lr * wd * p.
    config = dataclasses.replace(PLAIN, weight_decay=0.3)
    moved = _update(config, params, jax.tree.map(jnp.zeros_like, params))
    for m, p, decays in zip(*map(jax.tree.leaves, (moved, params, mask)), strict=True):
        np.testing.assert_allclose(m, -0.03 * p if decays else 0 * p, rtol=1e-5)


# Every kind of parameter that a decoder may have, its shape in one layer, who moves it (with Muon
# on the matrices; "table" where `muon_embeddings` decides) and whether it decays.
KINDS = {
    "embedding/embedding": ((23, 11), "table", True),
    "head/kernel": ((11, 23), "table", True),
    "embedding_projection/kernel": ((11, 11), "muon", True),
    "head_projection/kernel": ((11, 11), "muon", True),
    "final_norm/scale": ((11,), "adamw", False),
    "attention/query/kernel": ((11, 6, 8), "muon", True),
    "attention/key/kernel": ((11, 3, 8), "muon", True),
    "attention/value/kernel": ((11, 3, 8), "muon", True),
    "attention/out/kernel": ((6, 8, 11), "muon", True),
    "mlp/gate/kernel": ((11, 17), "muon", True),
    "mlp/up/kernel": ((11, 17), "muon", True),
    "mlp/down/kernel": ((17, 11), "muon", True),
    "attention/query_norm/scale": ((8,), "adamw", False),
    "attention/key_norm/scale": ((8,), "adamw", False),
    "attention/sinks": ((6, 2), "adamw", False),
    "attention/gate/kernel": ((11, 6, 8), "adamw", False),
    "attention/gate/bias": ((6,), "adamw", False),
    "attention/gate/hidden": ((6, 8, 4), "adamw", False),
    "attention/kv_bias/key": ((3, 2, 8), "adamw", False),
    "attention/kv_bias/value": ((3, 2, 8), "adamw", False),
    "attention/forget/kernel": ((11, 6), "adamw", False),
    "attention/forget/bias": ((6,), "adamw", False),
    "attention/normalizer/offset": ((6,), "adamw", False),
    "attention/differential/query_1": ((8,), "adamw", False),
    "attention/differential/scale": ((16,), "adamw", False),
    "attention/distance_bias": ((6, 5), "adamw", False),
    "attention/token_sinks/kernel": ((11, 6), "adamw", False),
    "attention_norm/scale": ((11,), "adamw", False),
    "attention_norm/pre_scale": ((11,), "adamw", False),
    "attention_norm_out/scale": ((), "adamw", False),
    "mlp_norm/scale": ((11,), "adamw", False),
    "mlp_norm/alpha": ((), "adamw", False),
    "mlp_norm/bias": ((11,), "adamw", False),
    "mlp_norm/down": ((11, 4), "adamw", True),
    "mlp_norm/up": ((4, 11), "adamw", True),
}


def _everything(layers):
    """A tree with every kind of parameter, as shapes; 0 layers in each block: not stacked."""
    tree = {}
    for name, (shape, _, _) in KINDS.items():
        inside = re.match("attention|mlp", name)
        lead = (layers,) if layers and inside else ()
        *folders, last = (f"blocks/0/{name}" if inside else name).split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(int(folder) if folder == "0" else folder, {})
        place[last] = jnp.zeros(lead + shape)
    return tree


def _by_kind(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [(jax.tree_util.keystr(k, simple=True, separator="/"), v) for k, v in leaves]
    return {path.removeprefix("blocks/0/"): value for path, value in paths}


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("embeddings", [False, True])
def test_every_parameter_has_one_optimiser_and_only_matrices_decay(layers, embeddings):
    tree = _everything(layers)
    muon = {"muon", "table"} if embeddings else {"muon"}
    paths = [path.removeprefix("blocks/0/") for path in muon_parameters(tree, embeddings)]
    assert sorted(paths) == sorted(name for name, (_, who, _) in KINDS.items() if who in muon)
    assert _by_kind(decay_mask(tree, NO_DECAY)) == {name: d for name, (_, _, d) in KINDS.items()}
    config = dataclasses.replace(PLAIN, name="muon", muon_embeddings=embeddings)
    state: Any = make_optimizer(config, 3).init(tree)
    # Each parameter has exactly one momentum, in the state of its optimiser.
    for name, expected in {"muon": paths, "adamw": set(KINDS) - set(paths)}.items():
        moments = optax.tree.get_all_with_path(state.inner_states[name], "mu")
        held = [path for _, moment in moments for path in _by_kind(moment)]
        assert sorted(held) == sorted(expected)


def test_a_model_with_an_embedding_projection_has_no_other_kinds():
    model = dataclasses.replace(
        MODEL, gate="elementwise", embedding_projection=True, norm="single_scale"
    )
    params = parameters(abstract(model))
    assert {re.sub(r"^blocks/\d+/", "", path) for path in _paths(params)} <= set(KINDS)
    assert {"embedding_projection/kernel", "head_projection/kernel"} <= set(muon_parameters(params))


def _paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]


def test_muon_on_everything_orthogonalises_the_tables():
    rng = np.random.default_rng(2)
    params = {
        "embedding": {"embedding": jnp.asarray(rng.normal(size=(23, 11)), jnp.float32)},
        "head": {"kernel": jnp.asarray(rng.normal(size=(11, 23)), jnp.float32)},
        "final_norm": {"scale": jnp.ones(11)},
    }
    gradients = jax.tree.map(lambda x: x**3, params)
    config = dataclasses.replace(PLAIN, name="muon", muon_embeddings=True, learning_rate=1.0)
    found = _update(config, params, gradients)
    for matrix in (found["embedding"]["embedding"], found["head"]["kernel"]):
        singular = np.linalg.svd(np.asarray(matrix), compute_uv=False) / (0.2 * 23**0.5)
        assert 0.5 < singular.min() and singular.max() < 1.3
    np.testing.assert_allclose(found["final_norm"]["scale"], -np.ones(11), rtol=1e-5)  # Adam


def test_orthoadam_is_adamw_in_another_basis():
    rng = np.random.default_rng(3)
    params = {"w": jnp.asarray(rng.normal(size=(7, 5)), jnp.float32), "sinks": jnp.ones(3)}
    gradients = jax.tree.map(lambda x: x + 1, params)
    adamw = dataclasses.replace(PLAIN, weight_decay=0.3)
    signs = dataclasses.replace(adamw, name="orthoadam", rotation_block_size=1)
    rotated = dataclasses.replace(signs, rotation_block_size=256)
    one, same, other = (_update(c, params, gradients) for c in (adamw, signs, rotated))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, same)
    assert jnp.abs(one["w"] - other["w"]).max() > 0.01
    # Adam's first step is a sign in its own basis, so of the same length in any.
    step = 0.1 * 35**0.5
    free = dataclasses.replace(rotated, weight_decay=0.0)
    moved = _update(free, params, gradients)
    assert jnp.linalg.norm(moved["w"]) == pytest.approx(step, rel=1e-4)
    decay = jax.tree.map(lambda a, b: a - b, other, moved)
    np.testing.assert_allclose(decay["w"], -0.03 * params["w"], atol=1e-6)
    np.testing.assert_allclose(decay["sinks"], 0, atol=1e-7)


def test_schedules():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1)

    def values(kind):
        rate = schedule(dataclasses.replace(config, schedule=kind), 14)
        return np.asarray([rate(step) for step in (0, 1, 3, 4, 9, 14, 20)])

    np.testing.assert_allclose(values("constant"), [0.5, 1, 2, 2, 2, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(values("linear"), [0.5, 1, 2, 2, 1.1, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(values("cosine"), [0.5, 1, 2, 2, 1.1, 0.2, 0.2], rtol=1e-6)
    assert schedule(dataclasses.replace(config, warmup_steps=0), 14)(0) == 2.0
    wsd = dataclasses.replace(config, schedule="wsd", decay_fraction=0.5, final_fraction=0.0)
    rate = schedule(wsd, 16)  # 4 up, 4 level, 8 down
    found = np.asarray([rate(step) for step in (0, 3, 4, 8, 10, 12, 16, 30)])
    np.testing.assert_allclose(found, [0.5, 2, 2, 2, 1.5, 1, 0, 0], atol=1e-6)


def test_clipping_bounds_the_global_norm_before_adam():
    params, gradients = _params(0), _params(1)
    clipped = dataclasses.replace(PLAIN, clip_norm=0.5)
    optimizer = make_optimizer(clipped, steps=10)
    state = optimizer.update(gradients, optimizer.init(params), params)[1]
    moments = optax.tree.get(state, "mu")
    assert optax.tree.norm(moments) == pytest.approx(0.1 * 0.5, rel=1e-5)


def test_a_kernel_of_another_rank_is_refused():
    params = {"blocks": {0: {"attention": {"query": {"kernel": jnp.zeros((11, 48))}}}}}
    with pytest.raises(ValueError, match="blocks/0/attention/query/kernel: expected 3 axes"):
        muon_parameters(params)
    with pytest.raises(ValueError, match="'muon' matches no parameter"):
        make_optimizer(dataclasses.replace(PLAIN, name="muon"), 3).init({"w": jnp.zeros((3, 5))})
