"""Optimisers from optax, with the masks and the dimension numbers that decoders need.

Everything here works on parameters as nested dictionaries (`sinkjax.models.parameters`) and goes
by their paths, such as `blocks/0/attention/query/kernel`.
"""

import re
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from sinkjax.train.config import OptimizerConfig
from sinkjax.train.orthoadam import scale_by_orthoadam

# (path, number of axes in one layer, what Muon takes for a matrix). Axes are counted from the end,
# so a leading layer axis is a batch axis: every layer is orthogonalised by itself. Without these
# numbers optax gives Muon every 2-D array (embedding and head too) and hands attention kernels and
# all stacked kernels to AdamW without a word. What no rule names is AdamW's: gates, forget gates and
# token sinks, which score heads and do not mix features; low-rank norms; and all that is no matrix
# (gains, biases, sinks, learned keys and values, constants of normalisers, distance biases).
MUON_RULES: tuple[tuple[str, int, MuonDimensionNumbers], ...] = (
    (r"attention/(query|key|value)/kernel$", 3, MuonDimensionNumbers(-3, (-2, -1))),
    (r"attention/out/kernel$", 3, MuonDimensionNumbers((-3, -2), -1)),
    (r"mlp/(gate|up|down)/kernel$", 2, MuonDimensionNumbers(-2, -1)),
    # Every expert is a matrix of its own; the router scores and stays with AdamW.
    (r"mlp/experts/(gate|up|down)/kernel$", 3, MuonDimensionNumbers(-2, -1)),
    (r"^(embedding|head)_projection/kernel$", 2, MuonDimensionNumbers(-2, -1)),
)
# With `muon_embeddings` also the tables, as maps from a one-hot token and onto the logits.
EMBEDDING_RULES: tuple[tuple[str, int, MuonDimensionNumbers], ...] = (
    (r"^embedding/embedding$", 2, MuonDimensionNumbers(-2, -1)),
    (r"^head/kernel$", 2, MuonDimensionNumbers(-2, -1)),
)


def muon_dimensions(params: Any, embeddings: bool = False) -> Any:
    """The matrix each parameter is to Muon, None for what stays with AdamW.

    Args:
      params: nested dictionary of arrays, layers stacked or not.
      embeddings: give it the embedding table and the head too.

    Returns:
      The same tree of `MuonDimensionNumbers` or None.

    Raises:
      ValueError: a kernel named in the rules has another number of axes than it should.
    """
    rules = MUON_RULES + EMBEDDING_RULES if embeddings else MUON_RULES

    def dimensions(keys: Any, leaf: Any) -> MuonDimensionNumbers | None:
        path = _path(keys)
        for pattern, axes, numbers in rules:
            if re.search(pattern, path):
                if len(leaf.shape) not in (axes, axes + 1):
                    raise ValueError(
                        f"parameter {path}: expected {axes} axes, or {axes + 1} with stacked "
                        f"layers, got shape {leaf.shape}"
                    )
                return numbers
        return None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def muon_parameters(params: Any, embeddings: bool = False) -> list[str]:
    """Paths of the parameters that Muon gets, in the order of the tree; AdamW has the others."""
    is_leaf = lambda x: x is None or isinstance(x, MuonDimensionNumbers)  # noqa: E731
    numbers = muon_dimensions(params, embeddings)
    leaves = jax.tree_util.tree_leaves_with_path(numbers, is_leaf=is_leaf)
    return [_path(keys) for keys, value in leaves if value is not None]


def decay_mask(params: Any, no_decay: tuple[str, ...]) -> Any:
    """True for the parameters that weight decay shrinks.

    Args:
      params: nested dictionary of arrays.
      no_decay: regular expressions over paths that are left alone.

    Returns:
      The same tree of bools.
    """

    def decays(keys: Any, _: Any) -> bool:
        return not any(re.search(pattern, "/" + _path(keys)) for pattern in no_decay)

    return jax.tree_util.tree_map_with_path(decays, params)


def schedule(config: OptimizerConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant, cosine, linear or wsd.

    `wsd` (warm-up, stable, decay) is constant until the last `decay_fraction` of the run and goes
    down in a line there.

    Args:
      config: shape and peak.
      steps: length of the run; the decay ends there.
      peak: replaces `config.learning_rate`.

    Returns:
      A function step → learning rate.
    """
    peak = config.learning_rate if peak is None else peak
    warmup, end = config.warmup_steps, peak * config.final_fraction
    rest = max(steps - warmup, 1)
    decay = min(max(round(config.decay_fraction * steps), 1), rest)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "wsd": lambda: optax.linear_schedule(peak, end, decay, rest - decay),
    }[config.schedule]()
    if warmup == 0:
        return after
    # Step 0 already moves: (step + 1) / warmup of the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optax chain of a run: clipping by the global norm, then AdamW, Muon or OrthoAdam.

    Why Muon with AdamW beside it: orthogonalised updates are for matrices between hidden states;
    embedding and head look up symbols, norms, sinks and gates are vectors or nearly so. AdamW on the
    embeddings alone leaves most outliers in place, though: Muon there too (`muon_embeddings`) or an
    embedding projection between them and the residual stream takes many of them away.

    Args:
      config: which, how fast, what decays.
      steps: length of the run, for the schedule.

    Returns:
      The transformation; its state follows the tree of the parameters.

    Source: Loshchilov and Hutter, arXiv 1711.05101 (AdamW); Jordan, modded-nanogpt, 2024 (Muon);
      Park et al., arXiv 2506.19697 (Muon on embeddings); `orthoadam.py`.
    """

    def mask(params: Any) -> Any:
        return decay_mask(params, config.no_decay)

    def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=mask,
        )

    rate = schedule(config, steps)
    if config.name == "adamw":
        main = adamw(rate)
    elif config.name == "orthoadam":
        main = optax.chain(
            scale_by_orthoadam(
                config.beta1,
                config.beta2,
                config.epsilon,
                seed=config.rotation_seed,
                block_size=config.rotation_block_size,
            ),
            optax.add_decayed_weights(config.weight_decay, mask),
            optax.scale_by_learning_rate(rate),
        )
    else:
        embeddings = config.muon_embeddings
        muon = optax.contrib.muon(
            rate,
            beta=config.muon_beta,
            weight_decay=config.weight_decay,
            weight_decay_mask=mask,
            muon_weight_dimension_numbers=lambda params: muon_dimensions(params, embeddings),
            consistent_rms=config.muon_consistent_rms,
        )
        # optax's own fallback inside `muon` is AdamW with Nesterov, without a mask: keep our AdamW.
        other = adamw(schedule(config, steps, config.adam_learning_rate))
        main = optax.partition({"muon": muon, "adamw": other}, lambda p: _labels(p, embeddings))
    if config.clip_norm is None:
        return main
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), main)


def _labels(params: Any, embeddings: bool) -> Any:
    chosen = set(muon_parameters(params, embeddings))
    if not chosen:
        raise ValueError(
            "optimizer.name: 'muon' matches no parameter of this model; see MUON_RULES"
        )
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: "muon" if _path(keys) in chosen else "adamw", params
    )


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
