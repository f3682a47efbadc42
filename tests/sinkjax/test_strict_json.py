"""What goes out is strict JSON, and what comes in fits its dataclass or is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest

from sinkjax.strict_json import from_json, parse, plain, to_json


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    kind: Literal["one", "two"] = "one"

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate: expected at least 0, got {self.rate}")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    steps: int = 3
    windows: tuple[int | None, ...] = (None,)
    parts: tuple[Inner, ...] = ()
    scale: float | None = None
    on: bool = False
    names: tuple[str, ...] = dataclasses.field(default_factory=tuple)


VALUE = Outer(Inner(0.1, "two"), windows=(7, None), parts=(Inner(2.0),), scale=3.0, names=("a",))


def test_what_is_not_finite_becomes_null_or_what_is_asked_for():
    data = {
        "a": np.float32(1.5),
        "b": [float("nan"), np.inf],
        "c": jnp.asarray([[2.0, -jnp.inf]], jnp.bfloat16),
        "d": Path("x/y"),
        3: ("é", None, True, np.int64(5)),
    }
    expected: dict[str, Any] = {"a": 1.5, "d": "x/y", "3": ["é", None, True, 5]}
    assert plain(data) == expected | {"b": [None, None], "c": [[2.0, None]]}
    assert plain(data, not_finite=str) == expected | {"b": ["nan", "inf"], "c": [[2.0, "-inf"]]}
    json.dumps(plain(data), allow_nan=False)


def test_a_round_trip_is_equal_and_hashable():
    back = from_json(Outer, to_json(VALUE))
    assert back == VALUE and hash(back) == hash(VALUE)
    # The mapping that the text holds, or the one it was made of, will do.
    assert from_json(Outer, json.loads(to_json(VALUE))) == VALUE
    assert from_json(Outer, dataclasses.asdict(VALUE)) == VALUE
    # A partial text takes the defaults, and an int stands for a float.
    partial = from_json(Outer, '{"inner": {"rate": 1}}')
    assert partial == Outer(Inner(1.0)) and type(partial.inner.rate) is float


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stepz": 3, "deep": 1}, "^run: unknown keys deep, stepz; expected some of inner, steps,"),
        ({"inner": {"lr": 3}}, "^run.inner: unknown keys lr; expected some of rate, kind$"),
        ({"inner": {"kind": "two"}}, "^run.inner: expected the key 'rate', got kind$"),
        ({"inner": {}}, "^run.inner: expected the key 'rate', got none$"),
        ({"inner": 3}, "^run.inner: expected a JSON object, got int$"),
        ({"inner": {"rate": -1}}, "^rate: expected at least 0, got -1.0$"),
        ({"inner": {"rate": 1, "kind": "x"}}, "^run.inner.kind: expected one of one, two; got 'x'"),
        ({"steps": "3"}, "^run.steps: expected int, got '3'$"),
        ({"steps": True}, "^run.steps: expected int, got True$"),
        ({"steps": 3.0}, "^run.steps: expected int, got 3.0$"),
        ({"on": 1}, "^run.on: expected bool, got 1$"),
        ({"scale": "x"}, "^run.scale: expected float or NoneType, got 'x'$"),
        ({"names": "abc"}, "^run.names: expected a list, got 'abc'$"),
        ({"windows": [3, "x"]}, r"^run.windows\[1\]: expected int or NoneType, got 'x'$"),
        ({"parts": [{"rate": 1}, 7]}, r"^run.parts\[1\]: expected a JSON object, got int$"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        from_json(Outer, {"inner": {"rate": 1}} | change, name="run")


def test_what_is_no_json_is_named():
    with pytest.raises(ValueError, match="^here.json: expected JSON, got"):
        from_json(Outer, "{", name="here.json")
    with pytest.raises(ValueError, match="^here.json: expected JSON, got"):
        parse("", "here.json")
    with pytest.raises(ValueError, match="^config: expected a JSON object, got list"):
        from_json(Outer, "[]")
