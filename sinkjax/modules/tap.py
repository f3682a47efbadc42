"""One door for intermediates: values leave a module only while somebody captures them."""

from collections.abc import Callable

import jax
from flax import nnx


def tap(module: nnx.Module, name: str, value: jax.Array | Callable[[], jax.Array]) -> None:
    """Record ``value`` as the intermediate ``name`` of ``module``, only under ``nnx.capture``.

    A bare ``module.sow`` outside a capture warns and leaves state behind in the module
    (flax 0.12.8 and later); this does neither, so it may stand in code that is trained.
    Under rematerialisation or a scan over layers nothing arrives: analyse an unrolled model.

    Args:
      module: the module that owns the value.
      name: key of the value in the captured state.
      value: the array, or a function that makes it. The function is called only when the value is
        wanted, so a dense [T, S] attention map costs nothing otherwise.
    """
    captures = getattr(module, "__captures__", ())
    if any(type(variable) is nnx.Intermediate for variable in captures):
        module.sow(nnx.Intermediate, name, value() if callable(value) else value)
