"""What a row may say next, given what stands in it already: changes of scores before the choice."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from mmjax.types import MMJaxError, is_count, is_number


@dataclasses.dataclass(frozen=True)
class Constraints:
    """Options that look at the tokens of a row, prompt and answer alike, as transformers' do.

    repetition_penalty: scores of tokens that the row holds are divided by it where they are
        positive and multiplied where they are negative (Keskar et al. 2019, section 4.1); 1 is off.
    no_repeat_ngram_size: no n-gram of this size occurs twice in a row; 0 is off.
    min_new_tokens: a row does not end before it has this many new tokens.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0

    def __post_init__(self):
        if not is_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise MMJaxError(
                f"repetition_penalty is {self.repetition_penalty!r}; give a number above 0 (1 is "
                "off)"
            )
        if not is_count(self.no_repeat_ngram_size, 0) or not is_count(self.min_new_tokens, 0):
            raise MMJaxError(
                f"no_repeat_ngram_size is {self.no_repeat_ngram_size!r} and min_new_tokens is "
                f"{self.min_new_tokens!r}; both are whole numbers from 0 up (0 is off)"
            )

    def __call__(
        self, scores: Array, history: Array, filled: Array, step: Array, ends: Array
    ) -> Array:
        """Return the changed scores, float32[b, v].

        history: int32[b, s], tokens of each row from 0, of which ``filled``, int32[b], count.
        step: how many of them are new. ends: int32[e], tokens that end a row.
        """
        there = jnp.arange(history.shape[1]) < filled[:, None]
        if self.repetition_penalty != 1:
            penalty = self.repetition_penalty
            changed = jnp.where(scores < 0, scores * penalty, scores / penalty)
            scores = jnp.where(_members(history, there, scores), changed, scores)
        n = self.no_repeat_ngram_size
        if 0 < n <= history.shape[1]:
            # What follows each earlier occurrence of the row's last n - 1 tokens is banned.
            windows = history.shape[1] - n + 1
            hit = there[:, n - 1 :]
            for i in range(n - 1):
                at = jnp.maximum(filled - (n - 1) + i, 0)[:, None]
                hit &= history[:, i : i + windows] == jnp.take_along_axis(history, at, axis=1)
            scores = jnp.where(_members(history[:, n - 1 :], hit, scores), -jnp.inf, scores)
        if self.min_new_tokens:
            end = jnp.isin(jnp.arange(scores.shape[1]), ends)
            scores = jnp.where(end & (step < self.min_new_tokens), -jnp.inf, scores)
        return scores


def _members(tokens: Array, chosen: Array, scores: Array) -> Array:
    """Return bool[b, v]: is v among those tokens [b, s] of its row that are ``chosen`` [b, s]?"""
    v = scores.shape[1]
    rows = jnp.arange(tokens.shape[0])[:, None]
    none = jnp.zeros(scores.shape, bool)
    return none.at[rows, jnp.where(chosen, tokens, v)].set(True, mode="drop")
