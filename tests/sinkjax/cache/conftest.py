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
        bias=None,
        log_forget=None,
        slots=None,
        differential=False,
    ):
        """[T, N, H] from a whole text; `position_cap` = C − 1 in cache_relative, None in absolute.

        theta None: no rotation. sinks [N] or [T, N]; bias: a function of distances [T, T] to
        [N, T, T]; log_forget [T, N]; slots: (key [K, m, H], value [K, m, H], mode, position).
        """
        query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
        T, N, H = query.shape
        group = N // key.shape[1]
        if differential:
            value = cls.pairs(value)
        key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
        t = offset + np.arange(T)

        def turn(x, positions):
            return x if theta is None else cls.rotate(x, positions, theta)

        logits = np.einsum("tnh,snh->nts", turn(query, t), turn(key, t))
        if position_cap is not None:
            near = turn(query, np.minimum(t, position_cap))
            at_sinks = np.einsum("tnh,snh->nts", near, turn(key, t))
            logits = np.where(t[None, None, :] < num_sink_tokens, at_sinks, logits)

        def scored(logits):
            logits = logits * (H**-0.5 if scale is None else scale)
            if logits_soft_cap is not None:
                logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
            return logits

        logits = scored(logits)
        distance = t[:, None] - t[None, :]
        where = distance >= 0
        if window is not None:
            where &= (distance < window) | (t[None, :] < num_sink_tokens)
        start = t if position_cap is None else np.minimum(t, position_cap)
        if bias is not None:
            is_sink = t[None, :] < num_sink_tokens
            logits = logits + bias(np.where(is_sink, start[:, None] - t[None, :], distance))
        if log_forget is not None:
            total = np.asarray(log_forget, np.float64).cumsum(0).T
            logits = logits + total[:, :, None] - total[:, None, :]
        where = np.broadcast_to(where, logits.shape)
        mode, added = None, 0.0
        if slots is not None:
            slot_key, slot_value, mode, position = slots
            near = turn(query, start) if position == "start" else query
            if mode != "value":
                slot_key = np.repeat(slot_key, group, axis=0)
                at_slots = scored(np.einsum("tnh,nmh->ntm", near, slot_key))
            if mode != "key":
                slot_value = np.repeat(
                    cls.pairs(slot_value, 0) if differential else slot_value, group, axis=0
                )
        if sinks is not None:
            sinks = np.broadcast_to(sinks, (T, N)).T
        if mode in ("key", "key_value"):
            logits = np.concatenate([at_slots, logits], axis=-1)
            where = np.concatenate([np.ones_like(at_slots, bool), where], axis=-1)
        elif mode == "context":
            both = np.concatenate([at_slots, logits], axis=-1)
            visible = np.concatenate([np.ones_like(at_slots, bool), where], axis=-1)
            shares = cls.normalize(normalizer, both, visible, sinks, parameter)
            added = np.einsum("ntm,nmh->tnh", shares[..., : at_slots.shape[-1]], slot_value)
        elif mode == "value":
            added = slot_value.sum(1)
        weights = cls.normalize(normalizer, logits, where, sinks, parameter)
        if mode in ("key", "key_value"):
            m = at_slots.shape[-1]
            if mode == "key_value":
                added = np.einsum("ntm,nmh->tnh", weights[..., :m], slot_value)
            weights = weights[..., m:]
        return np.einsum("nts,snh->tnh", weights, value) + added

    @staticmethod
    def pairs(value, axis=1):
        """Values of both heads of a pair, for both."""
        first, second = np.split(value, 2, axis=axis)
        pair = np.concatenate([first, second], axis=-1)
        return np.concatenate([pair, pair], axis=axis)


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle
