"""The table of methods: complete, and nothing in it that is not there."""

import dataclasses
import re
from pathlib import Path

import sinkjax.ops
from sinkjax.models import DecoderConfig
from sinkjax.modules.variant import GATES
from sinkjax_kernels import normalizers

TEXT = (Path(sinkjax.ops.__file__).parent / "README.md").read_text(encoding="utf-8")
TESTS = Path(__file__).parents[2]


def test_every_normalizer_gate_and_field_is_in_the_table():
    for name in normalizers.NAMES.values():
        assert re.search(rf"`(normalizer=\")?{name}[(\"`]", TEXT), name
    for gate in set(GATES) - {"none"}:
        assert f'"{gate}"' in TEXT, gate
    plain = {
        "vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
        "context_length", "tied_head", "scan_layers", "remat", "norm_epsilon", "init_std", "dtype",
        "param_dtype", "rope_theta", "scale", "num_sink_tokens", "gate", "kv_bias", "normalizer",
    }  # fmt: skip
    for field in {f.name for f in dataclasses.fields(DecoderConfig)} - plain:
        assert f"`{field}" in TEXT, field


def test_every_test_that_is_named_is_there():
    paths = re.findall(r"`((?:kernels|sinkjax|parity)/[\w/]+\.py)`", TEXT)
    assert len(paths) > 50
    for path in set(paths):
        assert (TESTS / path).exists(), path


def test_every_description_that_is_spelled_out_can_be_read():
    for spec in re.findall(r"`(\w+\([\w=., -]+\))`", TEXT):
        description = normalizers.resolve(spec)
        assert spec.startswith(normalizers.NAMES[type(description)])
