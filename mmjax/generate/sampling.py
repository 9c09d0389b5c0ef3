"""How the next token is chosen from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mmjax.types import MMJaxError, is_count, is_number


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0, else a draw from the softmax.

    top_k: keep the k likeliest tokens, 0 for all. top_p: keep the smallest set of tokens whose
    probability reaches p (Holtzman et al. 2020), 1 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        numbers = is_number(self.temperature) and is_number(self.top_p) and is_count(self.top_k, 0)
        if not numbers or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise MMJaxError(
                f"sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
                f"temperature={self.temperature!r}, top_k={self.top_k!r}, top_p={self.top_p!r}"
            )

    def numbers(self) -> np.ndarray:
        """Return temperature and top_p, float32[2], which a program may be handed."""
        return np.float32([self.temperature, self.top_p])

    def shape(self) -> Sampling:
        """Return one of the same program: only whether the two numbers do something is kept."""
        return Sampling(float(self.temperature > 0), self.top_k, 0.5 if self.top_p < 1 else 1.0)

    def __call__(self, logits: Array, keys: Array, numbers: Array | None = None) -> Array:
        """Choose int32[b] from float32 logits [b, v]; keys: one PRNG key a row.

        numbers: float32[2], temperature and top_p in place of this one's own.
        """
        if self.temperature == 0:
            return _argmax(logits)
        temperature, top_p = self.numbers() if numbers is None else numbers
        logits = logits / temperature
        if self.top_k:
            kth = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
        if self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
            last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
            threshold = jnp.take_along_axis(ordered, last, axis=-1)
            logits = jnp.where(logits < threshold, -jnp.inf, logits)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _argmax(x: Array) -> Array:
    """Return the first index, int32[b], of the largest value of each row of [b, v].

    Two plain reductions: XLA's CPU backend runs ``jnp.argmax``, a reduction of pairs, element by
    element, which takes a small model as long as its head. A row with a NaN gives 0.
    """
    v = x.shape[-1]
    below = x < jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(below, v, jnp.arange(v, dtype=jnp.int32)), axis=-1)
