"""Sinks on top of cuDNN: the algebra with a stand-in for it, and the calls it would be given.

cuDNN runs on a GPU only. `Plain` is its definition in plain JAX: a backward pass that takes its weights
from the log-sum-exp and D from the output that it is handed, whatever these are.
"""

import dataclasses
import itertools
import json
import pathlib
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from sinkjax._compat import enable_x64
from sinkjax_kernels import masks, normalizers
from sinkjax_kernels.flash import cudnn, cudnn_sinks, reference
from sinkjax_kernels.flash.cudnn_calls import BACKWARD, FORWARD, Cudnn

SINKS = np.array([-1e4, -20.0, 0.0, 5.0, 60.0, 1e4], np.float32)
STATIC: dict[str, Any] = {
    "normalizer": normalizers.Softmax(), "scale": 0.3, "logits_soft_cap": None
}  # fmt: skip
MASKS = {
    "full": {"is_causal": False},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "local_window_size": (4, 0)},
}
TARGET = pathlib.Path(__file__).with_name("gpu_target_h100.txtpb")


@dataclasses.dataclass(frozen=True)
class Plain:
    """What cuDNN computes, in the dtype of the operands or wider, rounded where cuDNN rounds."""

    scale: float
    is_causal: bool
    window: int | None = None
    calls: ClassVar[list[str]] = []

    def _products(self, query, key, value):
        wide = jnp.promote_types(query.dtype, jnp.float32)
        group = query.shape[2] // key.shape[2]
        q, k, v = (x.astype(wide) for x in (query, key, value))
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        logits = self.scale * jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest")
        t, s = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])
        seen = (s <= t) | (not self.is_causal)
        if self.window is not None:
            seen &= t - s < self.window
        return q, k, v, jnp.where(seen, logits, -jnp.inf)

    def forward(self, query, key, value):
        self.calls.append("forward")
        _, _, v, logits = self._products(query, key, value)
        lse = jax.nn.logsumexp(logits, axis=-1)
        weights = jnp.exp(logits - lse[..., None])
        out = jnp.einsum("BNTS,BSNH->BTNH", weights, v, precision="highest")
        return out.astype(query.dtype), lse

    def backward(self, query, key, value, out, lse, d_out):
        self.calls.append("backward")
        assert out.dtype == d_out.dtype == query.dtype and lse.dtype == jnp.promote_types(
            query.dtype, jnp.float32
        )
        q, k, v, logits = self._products(query, key, value)
        by, out = (x.astype(lse.dtype) for x in (d_out, out))
        weights = jnp.exp(logits - lse[..., None])
        delta = (by * out).sum(-1).swapaxes(1, 2)
        d_weights = jnp.einsum("BTNH,BSNH->BNTS", by, v, precision="highest")
        d_logits = self.scale * weights * (d_weights - delta[..., None])
        d_query = jnp.einsum("BNTS,BSNH->BTNH", d_logits, k, precision="highest")
        d_key = jnp.einsum("BNTS,BTNH->BSNH", d_logits, q, precision="highest")
        d_value = jnp.einsum("BNTS,BTNH->BSNH", weights, by, precision="highest")
        d_key, d_value = (
            x.reshape(*key.shape[:3], -1, x.shape[-1]).sum(3) for x in (d_key, d_value)
        )
        return tuple(x.astype(query.dtype) for x in (d_query, d_key, d_value))


def operands(T=13, S=17, dtype="float64", batch=2, N=6, K=2, H=8):
    rng = np.random.default_rng(0)
    shapes = (batch, T, N, H), (batch, S, K, H), (batch, S, K, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def gradients(attention, arrays, sinks, *, by_out=True, by_lse=True):
    """out, lse and every gradient of a random loss; `attention` gives lse as [B, T, N]."""
    rng = np.random.default_rng(1)
    shape = arrays[0].shape
    d_out = rng.normal(size=shape) * (rng.uniform(size=(*shape[:3], 1)) < 0.7)  # rows of no slope
    d_lse = rng.normal(size=shape[:3])
    leaves = arrays if sinks is None else [*arrays, sinks]

    def loss(*leaves):
        out, lse = attention(*leaves[:3], leaves[3] if len(leaves) > 3 else None)
        total = (out.astype(lse.dtype) * d_out).sum() if by_out else 0
        return total + ((lse * d_lse).sum() if by_lse else 0), (out, lse)

    grads, results = jax.jit(jax.grad(loss, argnums=tuple(range(len(leaves))), has_aux=True))(
        *leaves
    )
    return [*results, *grads]


def by_adapter(kernel):
    def attention(query, key, value, sinks):
        out, lse = cudnn_sinks.attend(kernel, query, key, value, sinks)
        return out, lse.swapaxes(1, 2)

    return attention


def by_reference(visibility):
    def attention(query, key, value, sinks):
        return reference.attention(query, key, value, None, None, visibility, sinks, **STATIC)

    return attention


LOSSES = {"both": {}, "out": {"by_lse": False}, "lse": {"by_out": False}}
ALL = list(itertools.product(MASKS, LOSSES, (True, False), ((13, 17), (17, 13))))
FEW = [("window", "both", True, (13, 17)), ("full", "lse", False, (17, 13))]


@pytest.mark.parametrize(
    ("name", "loss", "has_sinks", "sizes"),
    [pytest.param(*x, marks=() if x in FEW else pytest.mark.slow) for x in ALL],
)
def test_sinks_are_exact(name, loss, has_sinks, sizes, x64):
    """In float64: output, log-sum-exp and all gradients, d_sinks included, to rounding."""
    if name == "window":
        sizes = sorted(sizes)  # fewer keys would leave rows that see nothing, which is refused
    arrays = operands(*sizes)
    visibility = masks.build((2, *sizes, 2), **MASKS[name])
    kernel = Plain(STATIC["scale"], MASKS[name]["is_causal"], cudnn._window(visibility, *sizes))
    assert (kernel.window == 5) == (name == "window")
    sinks = jnp.asarray(SINKS, "float64") if has_sinks else None
    got = gradients(by_adapter(kernel), arrays, sinks, **LOSSES[loss])
    want = gradients(by_reference(visibility), arrays, sinks, **LOSSES[loss])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_rounded_as_cudnn_rounds():
    """In bfloat16: the sink costs no more precision than the format has."""
    arrays = [x.astype(jnp.bfloat16) for x in operands(dtype="float32")]
    sinks = jnp.asarray([-3.0, 0.0, 1.0, 2.0, 4.0, 8.0], jnp.float32)
    visibility = masks.build((2, 13, 17, 2), is_causal=True)
    got = gradients(by_adapter(Plain(STATIC["scale"], True)), arrays, sinks)
    assert [x.dtype.name for x in got] == [
        "bfloat16", "float32", "bfloat16", "bfloat16", "bfloat16", "float32"
    ]  # fmt: skip
    with enable_x64():
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (*arrays, sinks)]
        want = gradients(by_reference(visibility), wide[:3], wide[3])
        want = [np.asarray(x) for x in want]
    for a, b in zip(got, want, strict=True):
        error = np.asarray(a, np.float64) - b
        assert np.sqrt((error**2).mean()) <= 6e-3 * np.sqrt((b**2).mean())


def test_only_a_differentiated_log_sum_exp_costs_more():
    kernel = Plain(0.3, True)
    counts = {}
    for name in ("out", "both"):
        kernel.calls.clear()
        jax.eval_shape(
            lambda *x, name=name: gradients(by_adapter(kernel), list(x), SINKS, **LOSSES[name]),
            *operands(dtype="float32"),
        )
        counts[name] = sorted(kernel.calls)
    assert counts == {"out": ["backward", "forward"], "both": ["backward"] * 2 + ["forward"] * 2}


def shapes(T=256, S=256, N=8, K=2, H=64, batch=3, dtype=jnp.bfloat16, **place):
    return [
        jax.ShapeDtypeStruct(shape, dtype, **place)
        for shape in ((batch, T, N, H), (batch, S, K, H), (batch, S, K, H))
    ]


def lowered(f, *arrays) -> list[tuple[str, dict, str]]:
    """Target, configuration, and layouts and types of each call of cuDNN in the program for a GPU."""
    text = jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    found = []
    for line in text.splitlines():
        if match := re.search(r'custom_call @(__cudnn\$\w+)\((.*?)\).*?backend_config = "', line):
            config, _, rest = line[match.end() :].partition('", ')
            config = re.sub(r"\\([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), config)
            config = json.loads(config.replace('\\"', '"'))["cudnn_fmha_backend_config"]
            found.append((match[1], config, rest))
    return found


def attention(query, key, value, sinks=None, static=STATIC, **mask):
    B, T, S, K = query.shape[0], query.shape[1], *key.shape[1:3]
    visibility = masks.build((B, T, S, K), **mask)
    return cudnn.attention(query, key, value, None, None, visibility, sinks, **static)


def test_calls():
    """Without CUDA: one call forward, one backward, with the mask, the scale and our residuals."""

    def loss(*leaves):
        out, lse = attention(*leaves, is_causal=True, local_window_size=(99, 7))
        assert lse.shape == leaves[0].shape[:3]
        return out.astype(jnp.float32).sum()

    arrays = *shapes(), jax.ShapeDtypeStruct((8,), "float32")
    calls = lowered(jax.grad(loss, argnums=(0, 1, 2, 3)), *arrays)
    assert [target for target, _, _ in calls] == [FORWARD, BACKWARD]
    for _, config, _ in calls:
        assert config["mask_type"] == "CAUSAL" and config["sliding_window_length"] == 100
        assert config["fmha_scale"] == 0.3
        assert config["intermediate_tensor_shape"]["dimensions"] == ["3", "8", "256", "256"]
    full = "tensor<3x256x8x64xbf16>"
    grouped = "tensor<3x256x2x64xbf16>"
    rows = "tensor<3x8x256xf32>"
    turned = [x.replace("256x8", "8x256").replace("256x2x", "2x256x") for x in (full, grouped)]
    layouts, types = calls[0][2].split("} : ")
    assert "result_layouts = [dense<[3, 1, 2, 0]>" in layouts
    assert types == (
        f"({full}, {grouped}, {grouped}) -> (tensor<3x8x256x64xbf16>, {rows}, tensor<0xui8>)"
    )
    layouts, types = calls[1][2].split("} : ")
    assert layouts.count("dense<[3, 1, 2, 0]>") == 3
    assert types == (
        f"({full}, {grouped}, {grouped}, {rows}, {full}, {full}) -> "
        f"({turned[0]}, {turned[1]}, {turned[1]}, tensor<0xui8>)"
    )


def test_masks_and_dtypes():
    def configs(mask, **of):
        (call,) = lowered(lambda *x: attention(*x, **mask)[0], *shapes(**of))
        return call[1]

    full = configs({}, dtype=jnp.float16)
    assert full["mask_type"] == "NO_MASK" and full["sliding_window_length"] == 0
    assert full["intermediate_tensor_shape"]["element_type"] == "F16"
    wide = configs({"is_causal": True, "local_window_size": (255, 0)})  # hides nothing
    assert wide["mask_type"] == "CAUSAL" and wide["sliding_window_length"] == 0
    all_seen = {"is_causal": True, "local_window_size": (250, 0), "num_sink_tokens": 5}
    assert configs(all_seen)["sliding_window_length"] == 0


def test_under_vmap_and_remat():
    """A mapped axis goes into the batch of one call."""

    def loss(*leaves):
        out, lse = attention(*leaves, is_causal=True)
        return out.astype(jnp.float32).sum() + lse.sum()

    arrays = [jax.ShapeDtypeStruct((5, *x.shape), x.dtype) for x in shapes()]
    sinks = jax.ShapeDtypeStruct((8,), "float32")
    mapped = jax.vmap(jax.grad(jax.checkpoint(loss), argnums=(0, 3)), in_axes=(0, 0, 0, None))
    calls = lowered(mapped, *arrays, sinks)
    assert {target for target, _, _ in calls} == {FORWARD, BACKWARD}
    for _, config, types in calls:
        assert "} : (tensor<15x256x8x64xbf16>" in types
        assert config["intermediate_tensor_shape"]["dimensions"][0] == "15"


def test_inside_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = jax.sharding.PartitionSpec("data")

    def loss(*leaves):
        return attention(*leaves, is_causal=True)[0]

    split = jax.shard_map(
        loss, mesh=mesh, in_specs=(spec,) * 3 + (jax.sharding.PartitionSpec(),), out_specs=spec
    )

    def total(*leaves):
        return split(*leaves).astype(jnp.float32).sum()

    arrays = *shapes(), jax.ShapeDtypeStruct((8,), "float32")
    calls = lowered(jax.grad(total, argnums=(0, 1, 2, 3)), *arrays)
    assert [target for target, _, _ in calls] == [FORWARD, BACKWARD]


def test_what_is_not_served_says_why():
    def run(arrays=None, bias=None, mask=None, sinks=None, more={}, T=256, S=256, **visibility):  # noqa: B006
        arrays = arrays or shapes(T, S)
        given = {"is_causal": True} | visibility
        built = masks.build((3, arrays[0].shape[1], arrays[1].shape[1], 2), **given)
        query, key, value = arrays
        cudnn.check(query, key, value, bias, mask, built, sinks, **(STATIC | more))

    run()
    run(local_window_size=(99, 0))
    run(more={"normalizer": normalizers.SoftmaxN(2.5)})
    run(T=512, S=256)
    run(is_causal=False, T=512, S=256, local_window_size=(511, 300))  # hides nothing
    run(shapes(H=192), more={"largest_head": 256})
    ids = jnp.zeros(256, int)
    window = {"local_window_size": (99, 0)}
    refused = {
        "window without causality": {"is_causal": False} | window,
        "sink tokens beside a window": {"num_sink_tokens": 4} | window,
        "rows that see nothing": {"T": 512, "S": 256} | window,
        "segments": {"query_segment_ids": ids, "key_segment_ids": ids},
        "lengths": {"key_value_seq_lengths": jnp.array([3, 4, 5])},
        "positions": {"query_positions": np.arange(256) + 1},
        "bias": {"bias": jnp.zeros((1, 1, 256, 256))},
        "mask: ": {"mask": jnp.ones((1, 1, 256, 256), bool)},
        "logits_soft_cap": {"more": {"logits_soft_cap": 20.0}},
        "per token": {"sinks": jnp.zeros((3, 256, 8))},
        "got softpick": {"more": {"normalizer": normalizers.Softpick()}},
        "got float32": {"arrays": shapes(dtype=jnp.float32)},
        "multiples of 8 up to 128": {"arrays": shapes(H=136)},
        "head size": {"arrays": shapes(H=68)},
        "127 queries": {"T": 127},
    }
    for reason, options in refused.items():
        with pytest.raises(NotImplementedError, match=reason):
            run(**options)
    with pytest.raises(ValueError, match=r"\[3, 256, 8, 64\], \[3, 256, 3, 64\]"):
        run(shapes(K=3))


@pytest.mark.gpu_aot
@pytest.mark.parametrize("mask", MASKS)
def test_configuration_is_that_of_jax(mask):
    """Field by field what `jax.nn` sends, which fills in defaults that we leave out."""

    def theirs(query, key, value):
        return jax.nn.dot_product_attention(
            query, key, value, scale=0.3, implementation="cudnn", **MASKS[mask]
        )

    def ours(*arrays):
        return attention(*arrays, **MASKS[mask])[0]

    def agree(ours, theirs):
        if isinstance(ours, dict):
            return all(agree(x, theirs[name]) for name, x in ours.items())
        return ours == theirs

    def by(f):
        return jax.grad(lambda *x: f(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))

    got, want = (sorted(lowered(by(f), *shapes()), key=lambda x: x[0]) for f in (ours, theirs))
    assert [x[0] for x in got] == [x[0] for x in want] == [FORWARD, BACKWARD]
    for a, b in zip(got, want, strict=True):
        assert a[1].keys() == b[1].keys()
        assert agree(a[1], b[1]), (a[1], b[1])
        assert a[2] == b[2]  # operands and results, their order and layouts


@pytest.mark.gpu_aot
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles(mask, head_dim):
    """XLA accepts the calls for an H100; cuDNN itself chooses its kernels where there is a GPU."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=TARGET.read_text(), topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def loss(*leaves):
        out, lse = attention(*leaves, **MASKS[mask])
        return out.astype(jnp.float32).sum() + lse.sum()

    arrays = (
        *shapes(H=head_dim, sharding=place),
        jax.ShapeDtypeStruct((8,), "float32", sharding=place),
    )
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*arrays).compile()
    text = str(program.as_text())
    assert text.count(f'custom_call_target="{FORWARD}"') == 2
    assert text.count(f'custom_call_target="{BACKWARD}"') == 2


def test_a_kernel_is_one_key_of_the_cache():
    """Equal descriptions are one static argument, so that nothing is traced twice."""
    assert hash(Cudnn(0.5, True, 7)) == hash(Cudnn(0.5, True, 7))
    assert isinstance(Cudnn(0.5, True), cudnn_sinks.Kernel)
