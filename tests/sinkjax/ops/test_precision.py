import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.ops.precision import at_least_float32


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64"), ("int32", "float32")],
)
def test_widens_what_is_narrow_and_leaves_the_rest(x64, dtype, expected):
    x = at_least_float32(jnp.asarray([[1, 2, 5]], dtype))
    assert x.dtype == expected
    np.testing.assert_array_equal(x, [[1, 2, 5]])
