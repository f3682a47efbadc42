# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: jupytext,kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attention sinks in JAX: the main job in small
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sinkjax/sinkjax/blob/main/colab/00_quickstart.ipynb)
#
# Softmax weights must sum to one. Where a head has nothing to do it still has to look somewhere, and
# it learns to look at a token without meaning, most often the first one (BOS). That token is an
# **attention sink**. This notebook grows a sink and removes it, trains a small language model, streams
# that model far past its context, and reads its sinks. A CPU is enough: it takes a few minutes.
#
# Installation comes first. If the cell asks for a restart, do that and run it again.

# %%
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("sinkjax") is None:
    on_tpu = "TPU_ACCELERATOR_TYPE" in os.environ or os.path.exists("/dev/accel0")
    extra = "[tpu]" if on_tpu else "[cuda]" if shutil.which("nvidia-smi") else ""
    source = f"sinkjax{extra} @ git+https://github.com/sinkjax/sinkjax"
    # %pip install --quiet --upgrade "{source}"


def check_runtime(installed: dict[str, str]) -> None:
    """Refuses a runtime whose jax is too old, or that has imported what was replaced since."""

    def minor(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    loaded = {name: sys.modules[name].__version__ for name in installed if name in sys.modules}
    stale = [
        f"{name} {old}" for name, old in loaded.items() if minor(old) != minor(installed[name])
    ]
    if stale:
        raise RuntimeError(
            f"This runtime still holds {', '.join(stale)}, which the installation has replaced. "
            "Restart it (in Colab: Runtime, Restart session) and run this cell again."
        )
    if minor(installed["jax"]) < (0, 10):
        raise RuntimeError(
            f"sinkjax needs jax 0.10 or newer, this runtime has {installed['jax']}. Run "
            "`pip install --upgrade jax flax`, restart the runtime and run this cell again."
        )


versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
check_runtime(versions)
print("Python", platform.python_version(), *(f"· {name} {v}" for name, v in versions.items()))

# %%
# %matplotlib inline
import inspect
import tempfile
from pathlib import Path

import jax
import numpy as np

from sinkjax import diagnose, models, ops, stream, train
from sinkjax.cache import SinkWindow
from sinkjax.diagnose import plots

SMOKE = bool(os.environ.get("SINKJAX_SMOKE"))  # a few steps only: shows that everything runs
RUNS = Path(tempfile.mkdtemp(prefix="sinkjax-"))
print(f"{jax.devices()[0].device_kind} × {jax.device_count()}, runs go to {RUNS}")

# %% [markdown]
# ## A sink forms, and vanishes
#
# In the Bigram-Backcopy task ([Guo et al. 2024](https://arxiv.org/abs/2410.13835)) most symbols are
# drawn given the one before. Only after a *trigger* is there something to copy from further back, and
# everywhere else the head of a one-layer model is idle. We train that model twice, alike but for the
# normaliser: softmax, and softmax1, which adds one to softmax's denominator, so that a head may attend
# to nothing.

# %%
steps = 20 if SMOKE else 400
names = ("softmax", "softmax1")
runs = {name: train.fit(train.backcopy_run(name, RUNS / name, steps=steps)) for name in names}

rows = train.held_out_rows()
for name, run in runs.items():
    weights = np.asarray(diagnose.capture(run.model, rows["tokens"]).weights[0])  # [B, N, T, S]
    share = train.attention_to_bos(weights, rows["is_trigger"] == 1)
    loss = run.metrics[-1]["nll"]
    print(f"{name:8}  attention of idle queries to BOS {share:.3f}  loss {loss:.3f} nats per token")

# %% [markdown]
# The same head on one row that neither model has seen. The bright first column is the sink.

# %%
row = train.held_out_rows(1)["tokens"]
maps = {name: diagnose.capture(run.model, row).weights[0, 0, 0] for name, run in runs.items()}
plots.what_a_sink_is(
    maps["softmax"],
    maps["softmax1"],
    ["BOS", *map(str, row[0, 1:])],
    note="One head of each model, trained on the same task for the same number of steps.",
)

# %% [markdown]
# ## A language model on bytes
#
# The same happens in language models. This small one reads bytes: by default the source of the
# standard library of the Python that runs it, with BOS at the head of every row. `fit` writes
# checkpoints and metrics to a folder; after an interruption the same call goes on from the newest one.

# %%
text_steps = 20 if SMOKE else 2000
run = train.fit(
    train.RunConfig(
        model=models.preset("tiny"),
        data=train.DataConfig(batch_size=16, max_bytes=200_000 if SMOKE else None),
        # High rate, strong decay of everything: so small a model shows a sink early.
        optimizer=train.OptimizerConfig(
            learning_rate=1e-2, weight_decay=0.3, no_decay=(), schedule="constant"
        ),
        path=str(RUNS / "text"),
        steps=text_steps,
        eval_every=text_steps // 20,
        eval_batches=4,
        checkpoint_every=text_steps,
    )
)
print(f"{models.count(run.config.model):,} parameters, {run.step} steps")
print(f"loss on files held out: {run.metrics[-1]['nll']:.2f} nats per byte")

# %% [markdown]
# While the loss falls, watch two signs of a sink: the mean attention to BOS, against what uniform
# attention would give it (dashed), and the norm of BOS's value, against that of the others. A sink
# draws attention and gives little back. Attention becomes local first, and BOS loses; then it may win
# back a share that its content does not explain. How much differs from seed to seed at this size.

# %%
context = run.config.model.context_length
plots.over_steps(
    run.metrics,
    {"nll": "nll", "importance": "importance", "value_drain": "value_drain"},
    baselines={"importance": ops.statistics.uniform_importance(context)},
    title="Byte-level model: loss, attention to BOS, value of BOS",
)

# %% [markdown]
# ## A stream past the context
#
# A cache that drops its oldest entries drops the sink first. `SinkWindow` keeps the first few tokens
# for ever beside a window of recent ones ([Xiao et al. 2023](https://arxiv.org/abs/2309.17453)): the
# stream may go on without end, in constant memory. So small a model writes things that look like
# Python from afar.

# %%
tokenizer = train.ByteTokenizer()
events = list(
    stream.generate(
        run.model,
        "def ",
        cache=SinkWindow(num_sink_tokens=4, window=context - 4),
        sampler=stream.Sampler(temperature=0.8),
        tokenizer=tokenizer,
        max_new_tokens=200 if SMOKE else 5000,
    )
)
text = "".join(event.text for event in events)
state = events[-1].statistics
print(
    f"{len(events):,} tokens from a model with a context of {context}, {state.evicted:,} evicted;"
)
print(f"{state.cache_slots} slots and {state.cache_bytes:,} bytes of cache from first to last.")
print(f"\nIt begins\n{'-' * 40}\ndef {text[:200]}\n{'-' * 40}\nand ends\n{'-' * 40}\n{text[-200:]}")

# %% [markdown]
# ## Reading its sinks
#
# `analyze` measures a model on ids or texts. The text here is a module of this library: Python code,
# and not part of the standard library that the model was trained on. Every number comes with its
# definition.

# %%
source_text = inspect.getsource(ops.attention)
report = diagnose.analyze(run.model, [source_text], tokenizer=tokenizer)
print(report)

# %% [markdown]
# Where the attention goes: how important each position is to the queries that see it, in each layer.
# The last positions are seen by their neighbours only; a sink lifts the very first above those next
# to it.

# %%
plots.importance_by_position(report["importance_by_position"])

# %% [markdown]
# And on the first bytes of that text, weight by weight.

# %%
ids = np.asarray([tokenizer.bos_id, *tokenizer.encode(source_text)[: context - 1]])
plots.attention_maps(diagnose.capture(run.model, ids[None]).weights[:, 0])

# %% [markdown]
# ## From here
#
# - Another way to live without a sink: `train.VARIANTS` lists what `train.backcopy_run` knows.
# - The loss of a stream against recomputing every token, and against a window without sinks:
#   `stream.evaluate`.
# - All figures and numbers on one page: `diagnose.write_report`.
# - The same at full length from a terminal: `sinkjax quickstart`, and `sinkjax --help`.
