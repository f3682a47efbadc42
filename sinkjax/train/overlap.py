"""Options of the TPU's compiler under which communication hides behind arithmetic."""

from jax.sharding import Mesh

# The compiler then cuts a collective into steps that ride along in the fusions of matrix products. By
# default v5p waits for every gather; the same names as flags do for LIBTPU_INIT_ARGS.
OVERLAP = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
}


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """`compiler_options` of `jax.jit` for a training step on a mesh; None where it is no TPU's.

    Why: FSDP gathers every weight of a layer before the layer. `sinkjax plan` counts which of these
    gathers run beside matrix products; on v5p without these options none does.
    """
    return dict(OVERLAP) if mesh.devices.flat[0].platform == "tpu" else None
