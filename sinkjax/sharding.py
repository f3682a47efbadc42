"""Where arrays live: meshes, rules from parameter path to layout, and constraints inside a program.

Models carry no sharding. A table of regular expressions places their parameters, and `constrain`
places activations; both mean the same on a mesh with explicit axes, one with automatic axes, and
no mesh at all.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

AXES = ("data", "expert", "sequence", "model")
"""Every mesh axis sinkjax speaks of, in the order in which a mesh has them: the innermost talk most."""

ROWS = ("data", "expert")
"""Axes along which the rows of a batch are cut: what is no expert sees `expert` as more of `data`."""

FSDP = ("data", "expert", "sequence")
"""Axes along which a weight is cut to be gathered layer by layer: all that cut the tokens of a batch."""

Rules: TypeAlias = tuple[tuple[str, PartitionSpec], ...]
"""`(regular expression, layout)` pairs for `shardings`, in order of preference."""

# Weights are cut twice: over `model` as in tensor parallelism (heads, feed-forward channels,
# vocabulary), and over `FSDP` along the model width.
DECODER_RULES: Rules = (
    (r"embedding/embedding$", PartitionSpec("model", FSDP)),
    # A vocabulary such as 257 divides by nothing.
    (r"embedding/embedding$", PartitionSpec(None, (*FSDP, "model"))),
    # A width such as 2,880 does not divide by 4 x 32: `expert` cuts what a width has beside it.
    (r"embedding/embedding$", PartitionSpec(("expert", "model"), ("data", "sequence"))),
    (r"attention/query/kernel$", PartitionSpec(FSDP, "model", None)),
    (r"attention/(key|value)/kernel$", PartitionSpec(FSDP, "model", None)),
    # Fewer key heads than model shards: every shard works with them all.
    (r"attention/(key|value)/kernel$", PartitionSpec((*FSDP, "model"), None, None)),
    (r"attention/(key|value)/kernel$", PartitionSpec(FSDP, None, None)),
    (
        r"attention/(query|key|value)/kernel$",
        PartitionSpec(("data", "sequence"), "model", "expert"),
    ),
    (r"attention/out/kernel$", PartitionSpec("model", None, FSDP)),
    (r"attention/out/kernel$", PartitionSpec("model", "expert", ("data", "sequence"))),
    (r"attention/sinks$", PartitionSpec("model")),
    (r"attention/sinks$", PartitionSpec("model", None)),  # several per head
    (r"attention/gate/kernel$", PartitionSpec(FSDP, "model")),
    (r"attention/gate/kernel$", PartitionSpec(FSDP, "model", None)),
    # Gates on few key/value heads or on a head's own slice: small, and every shape divides.
    (r"attention/gate/kernel$", PartitionSpec(None, None)),
    (r"attention/gate/kernel$", PartitionSpec(None, None, None)),
    (r"mlp/(gate|up)/kernel$", PartitionSpec(FSDP, "model")),
    (r"mlp/down/kernel$", PartitionSpec("model", FSDP)),
    # An expert's kernels are gathered over what cuts the tokens, never over `expert`.
    (r"mlp/experts/(gate|up)/kernel$", PartitionSpec("expert", ("data", "sequence"), "model")),
    (r"mlp/experts/down/kernel$", PartitionSpec("expert", "model", ("data", "sequence"))),
    (r"mlp/experts/(gate|up)/bias$", PartitionSpec("expert", "model")),
    (r"mlp/experts/down/bias$", PartitionSpec("expert", ("data", "sequence"))),
    (r"mlp/experts/down/bias$", PartitionSpec("expert", None)),
    (r"mlp/router/kernel$", PartitionSpec(FSDP, None)),
    (r"mlp/router/kernel$", PartitionSpec(("data", "sequence"), None)),
    (r"mlp/router/bias$", PartitionSpec(None)),
    (r"norm/scale$", PartitionSpec(None)),
    (r"norm/scale$", PartitionSpec()),  # one gain for all channels
    (r"(embedding|head)_projection/kernel$", PartitionSpec(FSDP, "model")),
    (r"head/kernel$", PartitionSpec(FSDP, "model")),
    (r"head/kernel$", PartitionSpec((*FSDP, "model"), None)),
    (r"head/kernel$", PartitionSpec(("data", "sequence"), ("expert", "model"))),
)
"""Layout of the parameters of `sinkjax.models.Decoder`, scanned over layers or not."""


def make_mesh(
    data: int = 1,
    model: int = 1,
    *,
    expert: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
    explicit: bool = False,
) -> Mesh:
    """A mesh with the axes `data` (rows of the batch) and `model` (parts of a layer), and others.

    Why: with both axes always there, a program for one device is a program for a pod. `expert` and
    `sequence` are there when they cut something.

    Args:
      data: devices along `data`; -1 takes all that the other axes leave.
      model: devices along `model`.
      expert: devices along which experts are cut; rows of the batch are cut along them too.
      sequence: devices along which the tokens of a row are cut.
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
    sizes = {"data": data, "expert": expert, "sequence": sequence, "model": model}
    for name, size in sizes.items():
        if size < 1 and (name, size) != ("data", -1):
            expected = "at least 1, or -1 for all remaining" if name == "data" else "at least 1"
            raise ValueError(f"{name}: expected {expected}, got {size}")
    if data == -1:
        others = expert * sequence * model
        sizes["data"], rest = divmod(len(pool), others)
        if rest or not sizes["data"]:
            names = ", ".join(n for n in ("expert", "sequence", "model") if sizes[n] > 1)
            raise ValueError(f"{names}: expected a divisor of {len(pool)} devices, got {others}")
    sizes = {n: size for n, size in sizes.items() if size > 1 or n in ("data", "model")}
    count = math.prod(sizes.values())
    if count > len(pool):
        raise ValueError(
            f"{', '.join(sizes)}: expected at most {len(pool)} devices in all, "
            f"got {' x '.join(map(str, sizes.values()))}"
        )
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes), devices=pool[:count]
    )


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of one number or more per row: the first dimension over `ROWS`, the rest whole."""
    return NamedSharding(mesh, _on_mesh(PartitionSpec(ROWS), mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch [B, T]: rows over `ROWS`, their tokens over `sequence`."""
    return NamedSharding(mesh, _on_mesh(PartitionSpec(ROWS, "sequence"), mesh))


def cache_shardings(cache: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The layout of every array of a KV cache: rows over `ROWS`, key/value heads over `model`.

    A leaf of three dimensions or more is `[B, K, ...]` and cut along both (`queries` are
    `[B, w, N, H]`); positions that all heads share and clocks are whole on every `model` shard. Rows
    that do not divide stay whole, and heads do where those of any leaf of their layer do not divide:
    attention of a layer is cut as a whole or not at all.

    Why: rows and heads do not see each other, so a step moves nothing of the cache between devices.

    Args:
      cache: a `sinkjax.cache.Cache`, of arrays or `jax.ShapeDtypeStruct`.
      mesh: where it goes, with or without the axes; inside a program the abstract one.

    Returns:
      The same tree with a `NamedSharding` for each leaf.

    Example:
      >>> leaf = jax.ShapeDtypeStruct((2, 4, 1024, 64), "bfloat16")
      >>> tuple(cache_shardings({"key": leaf}, make_mesh())["key"].spec)
      ('data', 'model')
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(cache)
    named = [(jax.tree_util.keystr(keys, simple=True, separator="/"), x) for keys, x in leaves]
    axes = [_head_axis(path, leaf.shape) for path, leaf in named]
    whole = {  # layers whose heads do not divide
        _layer(path)
        for (path, leaf), axis in zip(named, axes, strict=True)
        if axis is not None and leaf.shape[axis] % mesh.shape.get("model", 1)
    }
    placed = []
    for (path, leaf), axis in zip(named, axes, strict=True):
        spec: list[Any] = [ROWS if dimension == 0 else None for dimension in range(leaf.ndim)]
        if axis is not None and _layer(path) not in whole:
            spec[axis] = "model"
        fitting = list(divisible(PartitionSpec(*spec), leaf.shape, mesh))
        while fitting and fitting[-1] is None:
            fitting.pop()
        placed.append(NamedSharding(mesh, PartitionSpec(*fitting)))
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


def divisible(spec: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """`spec` on `mesh`, whole along every dimension of `shape` that it does not divide.

    Args:
      spec: the layout.
      shape: of the array.
      mesh: concrete or abstract; axes that it lacks are left out.
    """
    spec = _on_mesh(spec, mesh)
    sizes = [math.prod(mesh.shape[name] for name in _names(entry)) for entry in spec]
    fitting = zip(spec, shape, sizes, strict=True)
    return PartitionSpec(*(entry if size % parts == 0 else None for entry, size, parts in fitting))


def _misfit(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Any) -> str | None:
    """Why an array of this shape cannot have this layout, or None if it can."""
    for dimension, (size, entry) in enumerate(zip(shape, spec, strict=True)):
        shards = math.prod(mesh.shape[name] for name in _names(entry))
        if size % shards:
            return (
                f"parameter {path}: expected dimension {dimension} to be divisible by {shards} "
                f"(mesh axis {entry!r}), got size {size} in shape {shape}"
            )
    return None


def shardings(params: Any, mesh: Mesh | AbstractMesh, rules: Rules = DECODER_RULES) -> Any:
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
      mesh: where the arrays go, concrete or abstract; axes of a rule that it lacks are dropped.
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


def resident(rules: Rules = DECODER_RULES) -> Rules:
    """The table for streaming: weights cut over `model` and `expert` alone, so that none is gathered.

    Why: a training step gathers each weight once for thousands of tokens; a decode step would do it
    for one token of each row.

    Args:
      rules: the table for training.

    Example:
      >>> rule, spec = resident(((r"mlp/up/kernel$", PartitionSpec(FSDP, "model")),))[0]
      >>> tuple(spec)
      (None, 'model')
    """

    def stays(entry: Any) -> Any:
        if isinstance(entry, tuple):  # FSDP: what counts experts is cut by `expert` alone
            entry = tuple(name for name in entry if name == "model")
            return entry[0] if entry else None
        return entry if entry in ("model", "expert") else None

    return tuple((rule, PartitionSpec(*map(stays, spec))) for rule, spec in rules)


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


def laid_out_by_compiler(run: Callable[..., Any], spec: PartitionSpec, *operands: Any) -> Any:
    """`run(*operands)`, where explicit axes are automatic ones inside and results come out as `spec`.

    Why: sorts, cumulative sums and lookups along a dimension that is cut, or beside one, have no
    layout of their own on an explicit mesh and are refused. On every other mesh nothing changes.

    Args:
      run: of arrays or trees of them, to one or the other.
      spec: layout of every result, cut short to its dimensions; what does not divide stays whole.
      operands: arrays or trees of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = {name for name, kind in kinds if kind == AxisType.Explicit}
    if not explicit:
        return run(*operands)

    def bare(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    out = jax.tree.map(
        lambda x: divisible(
            _keep(PartitionSpec(*(*spec, *[None] * x.ndim)[: x.ndim]), explicit), x.shape, mesh
        ),
        jax.eval_shape(run, *jax.tree.map(bare, operands)),
    )
    return jax.sharding.auto_axes(run, axes=tuple(explicit), out_sharding=out)(*operands)


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
    out = None
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        out = PartitionSpec(*jax.typeof(index).sharding.spec, None)
    return table.at[index].get(mode=mode, out_sharding=out)
