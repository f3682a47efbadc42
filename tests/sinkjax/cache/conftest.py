"""Dense attention over a whole text in plain numpy float64: shares no line with the library."""

import numpy as np
import pytest


class Oracle:
    """The closed form of StreamingLLM with its own rotation, mask and normalisers."""

    @staticmethod
    def rotate(x, positions, theta=10000.0):
        """Rotate-half RoPE of [T, heads, H] at [T] positions, in float64."""
        half = x.shape[-1] // 2
        frequency = theta ** (-np.arange(half) / half)
        angle = np.asarray(positions, np.float64)[:, None, None] * frequency
        cos, sin = np.cos(angle), np.sin(angle)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    @staticmethod
    def normalize(name, logits, where, sinks=None, parameter=None):
        """Weights of [..., S] logits; `sinks` broadcast to the rows."""
        masked = np.where(where, logits, -np.inf)
        if name == "sigmoid":
            return np.where(where, 1 / (1 + np.exp(-(logits + parameter))), 0.0)
        if name == "softpick":
            excess = np.where(where, np.exp(logits) - 1, 0.0)
            return np.maximum(excess, 0) / (np.abs(excess).sum(-1, keepdims=True) + 1e-8)
        extra = {"softmax": 0.0, "softmax1": 1.0, "softmax_n": parameter}[name]
        if sinks is not None:
            extra = np.exp(sinks)[..., None]
        total = np.exp(masked).sum(-1, keepdims=True) + extra
        return np.where(total > 0, np.exp(masked) / np.where(total > 0, total, 1), 0.0)

    @classmethod
    def attention(
        cls,
        query,
        key,
        value,
        *,
        window=None,
        num_sink_tokens=0,
        position_cap=None,
        theta=10000.0,
        normalizer="softmax",
        parameter=None,
        sinks=None,
        scale=None,
        logits_soft_cap=None,
        offset=0,
    ):
        """[T, N, H] from a whole text; `position_cap` = C − 1 in cache_relative, None in absolute.

        theta None: no rotation.
        """
        query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
        T, N, H = query.shape
        group = N // key.shape[1]
        key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
        t = offset + np.arange(T)

        def turn(x, positions):
            return x if theta is None else cls.rotate(x, positions, theta)

        logits = np.einsum("tnh,snh->nts", turn(query, t), turn(key, t))
        if position_cap is not None:
            near = turn(query, np.minimum(t, position_cap))
            at_sinks = np.einsum("tnh,snh->nts", near, turn(key, t))
            logits = np.where(t[None, None, :] < num_sink_tokens, at_sinks, logits)
        logits = logits * (H**-0.5 if scale is None else scale)
        if logits_soft_cap is not None:
            logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
        distance = t[:, None] - t[None, :]
        where = distance >= 0
        if window is not None:
            where &= (distance < window) | (t[None, :] < num_sink_tokens)
        per_row = None if sinks is None else np.broadcast_to(np.asarray(sinks)[:, None], (N, T))
        weights = cls.normalize(normalizer, logits, where[None], per_row, parameter)
        return np.einsum("nts,snh->tnh", weights, value)


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle
