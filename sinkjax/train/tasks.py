"""Bigram-Backcopy: the smallest task on which a softmax model grows an attention sink."""

import dataclasses

import numpy as np

# 64 symbols and BOS; the first three symbols are the triggers.
NUM_SYMBOLS = 64
NUM_TRIGGERS = 3
BOS_ID = NUM_SYMBOLS
VOCAB_SIZE = NUM_SYMBOLS + 1
# What the draw of a Dirichlet(1) row is raised by on each trigger, so that triggers are common.
TRIGGER_BOOST = 0.05
TABLE_SEED = 0


def bigram_table() -> np.ndarray:
    r"""Probabilities of the next symbol, one row per current symbol, drawn once for everybody.

    $$ p_i \propto d_i + 0.05 \cdot 1[\text{trigger}], \qquad d_i \sim \mathrm{Dirichlet}(1) $$

    Returns:
      float64 array [64, 64], rows sum to 1.
    """
    table = np.random.default_rng(TABLE_SEED).dirichlet(np.ones(NUM_SYMBOLS), NUM_SYMBOLS)
    table[:, :NUM_TRIGGERS] += TRIGGER_BOOST
    return table / table.sum(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Backcopy:
    r"""Rows of the Bigram-Backcopy task.

    $$ x_{t+1} = x_{t-1} \text{ if } x_t \text{ is a trigger, else } x_{t+1} \sim p(\cdot | x_t) $$

    A head that copies the token before a trigger has nothing to do at every other position; a
    softmax head must put its attention somewhere and learns to put it on BOS, where the value
    drains to zero. Heads that may attend to nothing do not. The first symbol is uniform over the
    non-triggers (with two triggers in front a row would be stuck), so no row ever holds two
    triggers in a row.

    Args:
      length: T, tokens of a row, BOS included.
      seed: seed of the rows; row `i` is a pure function of `(seed, i)`.

    Source: Guo et al., "Active-Dormant Attention Heads", arXiv 2410.13835, section 2.
    """

    length: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 3:
            raise ValueError(f"length: expected at least 3 tokens, got {self.length}")

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Batch of the rows `indices`.

        Args:
          indices: integers [B].

        Returns:
          int32 arrays [B, T]: the batch dictionary of `sinkjax.train.data`, and `is_trigger`, 1
          where the token, as a query, is a trigger.
        """
        T = self.length
        cumulative = np.cumsum(bigram_table(), axis=1)
        cumulative[:, -1] = 1.0
        uniform = _uniform(self.seed, np.asarray(indices, np.uint64), T)
        row = np.empty((len(indices), T + 1), np.int32)
        row[:, 0] = BOS_ID
        free = NUM_SYMBOLS - NUM_TRIGGERS
        row[:, 1] = NUM_TRIGGERS + (uniform[:, 0] * free).astype(np.int32)
        for t in range(1, T):
            drawn = (uniform[:, t, None] >= cumulative[row[:, t]]).sum(axis=1)
            row[:, t + 1] = np.where(row[:, t] < NUM_TRIGGERS, row[:, t - 1], drawn)
        ones = np.ones((len(indices), T), np.int32)
        return {
            "tokens": row[:, :T],
            "targets": row[:, 1:],
            "positions": ones * np.arange(T, dtype=np.int32),
            "segment_ids": ones,
            "loss_mask": ones.copy(),
            "is_trigger": (row[:, :T] < NUM_TRIGGERS).astype(np.int32),
        }


def _uniform(seed: int, indices: np.ndarray, count: int) -> np.ndarray:
    # One counter-based draw per (seed, row, place): a generator per row would cost more than the
    # training step. SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number
    # generators", OOPSLA 2014; multiplication wraps modulo 2**64 on purpose.
    start = _mix(np.asarray([seed], np.uint64)) + indices
    counter = _mix(start)[:, None] + np.arange(count, dtype=np.uint64)
    return (_mix(counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = state * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
