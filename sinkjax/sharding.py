"""Where arrays live: meshes, rules from parameter path to layout, and constraints inside a program.

Models carry no sharding. A table of regular expressions places their parameters, and `constrain`
places activations; both mean the same on a mesh with explicit axes, one with automatic axes, and
no mesh at all.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

AXES = ("data", "model", "expert", "sequence")
"""Every mesh axis sinkjax speaks of; a mesh may have any of them."""

Rules: TypeAlias = tuple[tuple[str, PartitionSpec], ...]
"""`(regular expression, layout)` pairs for `shardings`, in order of preference."""

# Weights are cut twice: over `model` as in tensor parallelism (heads, feed-forward channels,
# vocabulary), and over `data` along the model width, to be gathered layer by layer.
DECODER_RULES: Rules = (
    (r"embedding/embedding$", PartitionSpec("model", "data")),
    # A vocabulary such as 257 divides by nothing.
    (r"embedding/embedding$", PartitionSpec(None, ("data", "model"))),
    (r"attention/query/kernel$", PartitionSpec("data", "model", None)),
    (r"attention/(key|value)/kernel$", PartitionSpec("data", "model", None)),
    # Fewer key heads than model shards: every shard keeps them all.
    (r"attention/(key|value)/kernel$", PartitionSpec("data", None, None)),
    (r"attention/out/kernel$", PartitionSpec("model", None, "data")),
    (r"attention/sinks$", PartitionSpec("model")),
    (r"attention/sinks$", PartitionSpec("model", None)),  # several per head
    (r"attention/gate/kernel$", PartitionSpec("data", "model")),
    (r"attention/gate/kernel$", PartitionSpec("data", "model", None)),
    # Gates on few key/value heads or on a head's own slice: small, and every shape divides.
    (r"attention/gate/kernel$", PartitionSpec(None, None)),
    (r"attention/gate/kernel$", PartitionSpec(None, None, None)),
    (r"mlp/(gate|up)/kernel$", PartitionSpec("data", "model")),
    (r"mlp/down/kernel$", PartitionSpec("model", "data")),
    (r"norm/scale$", PartitionSpec(None)),
    (r"norm/scale$", PartitionSpec()),  # one gain for all channels
    (r"(embedding|head)_projection/kernel$", PartitionSpec("data", "model")),
    (r"head/kernel$", PartitionSpec("data", "model")),
    (r"head/kernel$", PartitionSpec(("data", "model"), None)),
)
"""Layout of the parameters of `sinkjax.models.Decoder`, scanned over layers or not."""


def make_mesh(
    data: int = 1,
    model: int = 1,
    *,
    devices: Sequence[Any] | None = None,
    explicit: bool = False,
) -> Mesh:
    """A mesh with the axes `data` (rows of the batch) and `model` (parts of a layer).

    Why: with both axes always there, a program for one device is a program for a pod.

    Args:
      data: devices along `data`; -1 takes all that `model` leaves.
      model: devices along `model`.
      devices: `jax.Device`s to build from; all by default. Surplus devices are left out.
      explicit: make the axes explicit (layouts are part of the types and nothing moves unasked)
        instead of automatic (the compiler decides).

    Returns:
      The mesh. `with jax.set_mesh(mesh):` makes it current.

    Raises:
      ValueError: the sizes are not positive or ask for more devices than there are.

    Example:
      >>> dict(make_mesh().shape)
      {'data': 1, 'model': 1}
    """
    pool = list(jax.devices() if devices is None else devices)
    if model < 1:
        raise ValueError(f"model: expected at least 1, got {model}")
    if data == -1:
        data, rest = divmod(len(pool), model)
        if rest:
            raise ValueError(f"model: expected a divisor of {len(pool)} devices, got {model}")
    if data < 1:
        raise ValueError(f"data: expected at least 1, or -1 for all remaining, got {data}")
    if data * model > len(pool):
        raise ValueError(
            f"data, model: expected at most {len(pool)} devices in all, got {data} x {model}"
        )
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(
        (data, model), ("data", "model"), axis_types=(kind, kind), devices=pool[: data * model]
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch: its first dimension over `data`, whole on every `model` shard."""
    return NamedSharding(mesh, PartitionSpec("data"))


def cache_shardings(cache: Any, mesh: Mesh) -> Any:
    """The layout of every array of a KV cache: rows over `data`, key/value heads over `model`.

    A leaf of three dimensions or more is `[B, K, ...]` and cut along both (`queries` are
    `[B, w, N, H]`); positions that all heads share and clocks are whole on every `model` shard. Rows
    that do not divide stay whole, and heads do where those of any leaf of their layer do not divide:
    attention of a layer is cut as a whole or not at all.

    Why: rows and heads do not see each other, so a step moves nothing of the cache between devices.

    Args:
      cache: a `sinkjax.cache.Cache`, of arrays or `jax.ShapeDtypeStruct`.
      mesh: where it goes, with or without the two axes.

    Returns:
      The same tree with a `NamedSharding` for each leaf.

    Example:
      >>> leaf = jax.ShapeDtypeStruct((2, 4, 1024, 64), "bfloat16")
      >>> tuple(cache_shardings({"key": leaf}, make_mesh())["key"].spec)
      ('data', 'model')
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(cache)
    named = [(jax.tree_util.keystr(keys, simple=True, separator="/"), x) for keys, x in leaves]
    sizes = mesh.shape

    def cut(name: str, size: int) -> bool:
        return name in sizes and size % sizes[name] == 0

    axes = [_head_axis(path, leaf.shape) for path, leaf in named]
    whole = {  # layers whose heads do not divide
        _layer(path)
        for (path, leaf), axis in zip(named, axes, strict=True)
        if axis is not None and not cut("model", leaf.shape[axis])
    }
    placed = []
    for (path, leaf), axis in zip(named, axes, strict=True):
        spec: list[str | None] = [None] * leaf.ndim
        if leaf.ndim and cut("data", leaf.shape[0]):
            spec[0] = "data"
        if axis is not None and _layer(path) not in whole:
            spec[axis] = "model"
        while spec and spec[-1] is None:
            spec.pop()
        placed.append(NamedSharding(mesh, PartitionSpec(*spec)))
    return jax.tree_util.tree_unflatten(treedef, placed)


def _head_axis(path: str, shape: tuple[int, ...]) -> int | None:
    """The dimension of a cache leaf that counts heads."""
    name = path.rsplit("/", 1)[-1]
    if len(shape) < 3 or (name == "positions" and shape[1] == 1):
        return None
    return 2 if name == "queries" else 1


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _on_mesh(spec: PartitionSpec, mesh: Any) -> PartitionSpec:
    """`spec` without the axes that `mesh` does not have."""
    unknown = {n for entry in spec for n in _names(entry)} - set(AXES) - set(mesh.axis_names)
    if unknown:
        raise ValueError(f"spec: expected mesh axes among {AXES}, got {sorted(unknown)} in {spec}")
    return _keep(spec, set(mesh.axis_names))


def _keep(spec: PartitionSpec, axes: set[str]) -> PartitionSpec:
    """`spec` with only the mesh axes in `axes`."""
    entries = []
    for entry in spec:
        if entry is PartitionSpec.UNCONSTRAINED:
            entries.append(entry)
            continue
        names = tuple(n for n in _names(entry) if n in axes)
        entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*entries)


def _misfit(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> str | None:
    """Why an array of this shape cannot have this layout, or None if it can."""
    for dimension, (size, entry) in enumerate(zip(shape, spec, strict=True)):
        shards = math.prod(mesh.shape[name] for name in _names(entry))
        if size % shards:
            return (
                f"parameter {path}: expected dimension {dimension} to be divisible by {shards} "
                f"(mesh axis {entry!r}), got size {size} in shape {shape}"
            )
    return None


def shardings(params: Any, mesh: Mesh, rules: Rules = DECODER_RULES) -> Any:
    """The layout of every array of a tree, from a table of rules.

    A leaf's path is its keys joined by `/`, such as `blocks/0/attention/query/kernel`. The first
    rule whose expression is found in the path and whose layout divides the array is taken, so a
    later rule for the same path is a fallback. A path that no rule matches is replicated.

    A rule names every dimension of one layer's parameter. Stacked layers have a leading axis more,
    on all leaves below one `.../<number>/`, and that axis stays whole.

    Why: parameters, gradients and optimiser moments share the ends of their paths, so one table
    lays out a whole training state.

    Args:
      params: tree of arrays or `jax.ShapeDtypeStruct`, for example `nnx.to_pure_dict(state)`.
      mesh: where the arrays go; axes of a rule that the mesh lacks are dropped.
      rules: the table.

    Returns:
      The same tree with a `NamedSharding` for each leaf.

    Raises:
      ValueError: no layout for the path fits the array; names parameter, dimension and mesh axis.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    candidates: list[tuple[str, tuple[int, ...], list[PartitionSpec]]] = []
    stacked: dict[str, int] = {}
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        specs = [_on_mesh(spec, mesh) for rule, spec in rules if re.search(rule, path)]
        candidates.append((path, tuple(leaf.shape), specs))
        if specs:
            # A gate has a rule of two and one of three dimensions: its own rank does not tell
            # whether it is stacked, the norms beside it do.
            extra = min(len(leaf.shape) - len(spec) for spec in specs)
            stacked[_layer(path)] = max(extra, stacked.get(_layer(path), 0))
    placed = []
    for path, shape, specs in candidates:
        lead = stacked.get(_layer(path), 0)
        fitting = [PartitionSpec(*[None] * lead, *s) for s in specs if len(s) + lead == len(shape)]
        if specs and not fitting:
            raise ValueError(
                f"parameter {path}: expected {' or '.join(str(len(s)) for s in specs)} dimensions "
                f"after {lead} layer axes, got shape {shape}"
            )
        problems = [_misfit(path, shape, spec, mesh) for spec in fitting]
        if fitting and None not in problems:
            raise ValueError("; ".join(p for p in problems if p))
        spec = fitting[problems.index(None)] if fitting else PartitionSpec()
        placed.append(NamedSharding(mesh, spec))
    return jax.tree_util.tree_unflatten(treedef, placed)


def _layer(path: str) -> str:
    """The part of a path that names its layer: up to its last number, or all of it."""
    found = re.match(r"(.*/)?\d+(?=/)", path)
    return found.group() if found else path


def constrain(x: Shaped[Array, "..."], spec: PartitionSpec) -> Shaped[Array, "..."]:
    """`x` with the layout `spec` on the current mesh; `x` itself where there is none.

    Why: JAX wants `reshard` for explicit axes (where a constraint is only an assertion) and
    `with_sharding_constraint` for automatic ones (where `reshard` raises). Inside `jax.shard_map`
    an array is one shard already, so manual axes are left out.

    Args:
      x: any array.
      spec: the layout; axes that the current mesh lacks are left out.

    Returns:
      `x`, same shape and values.

    Raises:
      ValueError: `spec` names an axis that is neither in `AXES` nor in the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = _on_mesh(spec, mesh)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = {name for name, kind in kinds.items() if kind == AxisType.Explicit}
    auto = {name for name, kind in kinds.items() if kind == AxisType.Auto}
    if explicit:
        x = jax.sharding.reshard(x, _keep(spec, explicit))
    if auto:
        x = _constraint(x, _keep(spec, auto))
    return x


# Outside of jit a bare constraint refuses an array that lies on one device.
_constraint = jax.jit(jax.lax.with_sharding_constraint, static_argnums=1, inline=True)


def take_rows(
    table: Shaped[Array, "rows D"], index: Int[Array, "*batch"], *, mode: str = "clip"
) -> Shaped[Array, "*batch D"]:
    """`table[index]`, laid out as the index is.

    Why: on an explicit mesh a lookup with a sharded index is an error until the layout of its
    result is given, on an automatic mesh giving one is.

    Args:
      table: `[rows, D]`, an embedding for example.
      index: `[...]`, row numbers.
      mode: what an index outside the table means, as in `jnp.ndarray.at[...].get`.

    Returns:
      `[..., D]`: the rows.
    """
    layout = jax.typeof(index).sharding
    out = None
    if AxisType.Explicit in layout.mesh.axis_types:
        out = PartitionSpec(*layout.spec, None)
    return table.at[index].get(mode=mode, out_sharding=out)
