"""cuDNN's fused attention as two calls of ours, with the residuals that its backward pass takes.

XLA's GPU compiler knows these call targets and turns their JSON configuration (`GpuBackendConfig`)
into a cuDNN graph. `jax.nn.dot_product_attention(implementation="cudnn")` makes the same calls and
is what a test compares them with, but its own derivative cannot be given another output and
log-sum-exp, and drops the cotangent of the latter.
"""

import dataclasses
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from sinkjax_kernels.varying import struct

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"

# Per matrix product: contracted axes of left and right, then their batch axes. Q, K, V and their
# gradients are [B, T, N, H], logits [B, N, T, S].
_PRODUCTS = {
    FORWARD: {
        "bmm1_dot_dimension_numbers": (3, 3, (0, 2), (0, 2)),  # Q K'
        "bmm2_dot_dimension_numbers": (3, 1, (0, 1), (0, 2)),  # P V
    },
    BACKWARD: {
        "bmm1_grad_gemm1_dot_dimension_numbers": (2, 1, (0, 1), (0, 2)),  # dX' Q
        "bmm1_grad_gemm2_dot_dimension_numbers": (3, 1, (0, 1), (0, 2)),  # dX K
        "bmm2_grad_gemm1_dot_dimension_numbers": (2, 1, (0, 1), (0, 2)),  # P' dO
        "bmm2_grad_gemm2_dot_dimension_numbers": (3, 3, (0, 2), (0, 2)),  # dO V'
    },
}
_BY_HEAD = (0, 2, 1, 3)  # a result [B, N, T, H] that lies in memory as [B, T, N, H]


@dataclasses.dataclass(frozen=True)
class Cudnn:
    """A `cudnn_sinks.Kernel`: bfloat16 or float16, all keys or causal with queries and keys from 0 on.

    Args:
        window: keys that a query sees back, itself included; None is all of them. Only if causal.
    """

    scale: float
    is_causal: bool
    window: int | None = None

    def forward(self, query, key, value) -> tuple[Array, Array]:
        def call(query, key, value):
            B, T, N, _ = query.shape
            operands = (query, key, value)
            results = [
                _result((B, N, T, value.shape[-1]), query.dtype, operands),
                _result((B, N, T), jnp.float32, operands),
            ]
            return self._call(FORWARD, operands, results, [_BY_HEAD, None])

        out, lse = _in_one_batch(call)(query, key, value)
        return out.swapaxes(1, 2), lse

    def backward(self, query, key, value, out, lse, d_out) -> tuple[Array, Array, Array]:
        def call(*operands):
            results = [
                _result((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype, operands)
                for x in operands[:3]
            ]
            return self._call(BACKWARD, operands, results, [_BY_HEAD] * 3)

        grads = _in_one_batch(call)(query, key, value, lse, d_out, out)
        d_query, d_key, d_value = (x.swapaxes(1, 2) for x in grads)
        return d_query, d_key, d_value

    def _call(self, target: str, operands, results, layouts) -> list[Array]:
        workspace = _result((0,), jnp.uint8, operands)  # XLA puts in its size when it compiles
        call = jax.ffi.ffi_call(
            target,
            [*results, workspace],
            output_layouts=[*layouts, None],
            custom_call_api_version=2,
            legacy_backend_config=self.config(target, operands[0], operands[1]),
        )
        return list(call(*operands))[:-1]

    def config(self, target: str, query, key) -> str:
        """The `GpuBackendConfig` of a call."""
        B, T, N, _ = query.shape
        logits = {
            "element_type": {"bfloat16": "BF16", "float16": "F16"}[query.dtype.name],
            "dimensions": [str(n) for n in (B, N, T, key.shape[1])],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        }
        products = {
            name: {
                "lhs_contracting_dimensions": [str(left)],
                "rhs_contracting_dimensions": [str(right)],
                "lhs_batch_dimensions": [str(n) for n in left_batch],
                "rhs_batch_dimensions": [str(n) for n in right_batch],
            }
            for name, (left, right, left_batch, right_batch) in _PRODUCTS[target].items()
        }
        attention = {
            "algorithm": {
                "algo_id": "0",
                "math_type": "TENSOR_OP_MATH",
                "tuning_knobs": {"17": "1", "24": "0"},
                "is_cudnn_frontend": True,
                "workspace_size": "0",
            },
            "fmha_scale": self.scale,
            "intermediate_tensor_shape": logits,
            "is_flash_attention": True,
            "mask_type": "CAUSAL" if self.is_causal else "NO_MASK",
            "dropout_rate": 0.0,
            "seed": 42,
            "sliding_window_length": self.window or 0,
            "max_seg_per_batch": 1,
            "is_paged_attention": False,
        }
        return json.dumps(
            {"operation_queue_id": "0", "cudnn_fmha_backend_config": attention | products}
        )


def _result(shape: tuple[int, ...], dtype, operands) -> jax.ShapeDtypeStruct:
    """A result that varies as the operands do; unlike a Pallas call, this one wants the mesh named."""
    plain = struct(shape, dtype, *operands)
    if not plain.manual_axis_type.varying:
        return plain
    mesh = jax.typeof(operands[0]).sharding.mesh
    return plain.update(sharding=NamedSharding(mesh, PartitionSpec()))


def _in_one_batch(call: Callable) -> Callable:
    """The call, whose operands and results lead with the batch: under `jax.vmap` one larger call."""
    mapped_call = custom_vmap(call)

    @mapped_call.def_vmap
    def rule(size, is_mapped, *operands):
        wide = [
            x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, mapped in zip(operands, is_mapped, strict=True)
        ]
        results = mapped_call(*(x.reshape(-1, *x.shape[2:]) for x in wide))
        split = [x.reshape(size, -1, *x.shape[1:]) for x in results]
        return split, [True] * len(split)

    return mapped_call
