"""Beam search on the device, with the scores and the stopping rules of transformers' generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mmjax.generate.constraints import Constraints
from mmjax.types import MMJaxError, is_count, is_number

# The score of what is no candidate. Finite, as in transformers: where constraints forbid every
# token (-inf), such a row still ranks below the empty beams and never turns into a NaN.
NEVER = -1e9


@dataclasses.dataclass(frozen=True)
class Beams:
    """How many beams a prompt has, how ended ones are ranked, and when its search stops.

    num_beams: 1 is no beam search. length_penalty: an ended beam's score is the sum of its log
        probabilities over (its new tokens, the end token among them) ** length_penalty.
    early_stopping: True stops as soon as num_beams have ended; False when the best running beam,
        ranked at its present length, is below the worst ended one; "never" ranks it at the
        greatest length when length_penalty is positive, so that no better beam is missed.
    num_return_sequences: how many ended beams each prompt gives back, the best first.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1

    def __post_init__(self):
        if not is_count(self.num_beams):
            raise MMJaxError(f"num_beams is {self.num_beams!r}; give a whole number from 1 up")
        if not is_number(self.length_penalty):
            raise MMJaxError(f"length_penalty is {self.length_penalty!r}; give a finite number")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise MMJaxError(
                f'early_stopping is {self.early_stopping!r}; give False, True or "never"'
            )
        several = self.num_return_sequences
        if not is_count(several) or several > self.num_beams:
            raise MMJaxError(
                f"num_return_sequences is {several!r} with num_beams="
                f"{self.num_beams}; give 1 to num_beams, or more beams"
            )

    def check_vocabulary(self, size: int) -> None:
        """Raise MMJaxError for more beams than there are tokens for the first one to go on with."""
        if self.num_beams > size:
            raise MMJaxError(
                f"num_beams is {self.num_beams}, more than the vocabulary of {size}; give fewer"
            )

    def ranking(self, most: int) -> Ranking:
        """Return the part that is data to the program, so that its values compile nothing anew."""
        lengths = np.arange(1, most + 1, dtype=np.float64)
        return Ranking(
            np.float32(lengths**self.length_penalty),
            np.bool_(self.early_stopping is True),
            np.bool_(self.early_stopping == "never" and self.length_penalty > 0),
        )


class Prefilled(NamedTuple):
    """Prompts that are in the cache, and how their answers go on and end."""

    decode: Callable[[Array, Any], tuple[Array, Any]]
    """(tokens int32[rows of the cache], cache) -> (logits float32[rows, v], cache)."""
    logits: Array  # float32[b, v], after the prompts
    cache: Any
    history: Array  # int32[b, w], the prompts; w is the cache's room
    lengths: Array  # int32[b]
    real: Array  # bool[b], rows that are no padding
    max_new: Array  # int32[]
    ends: Array  # int32[e], tokens that end an answer


class Ranking(NamedTuple):
    """divisors: float32[most], of scores by length - 1. first, longest: the stopping rule."""

    divisors: Any
    first: Any
    longest: Any


class _Ended(NamedTuple):
    """The best ended beams of each prompt, n places a prompt, the best first."""

    rows: Array  # int32[b, n, w], prompt and new tokens
    scores: Array  # float32[b, n], divided by the length penalty
    counts: Array  # int32[b, n], new tokens without the end token
    full: Array  # bool[b, n], is this place taken?


class _State(NamedTuple):
    """Running beams, n a prompt, the best first, and ended ones. w is the cache's room."""

    step: Array  # how many new tokens the running beams have
    running: Array  # int32[b, n, w], prompt and new tokens
    scores: Array  # float32[b, n], sums of log probabilities
    parents: Array  # int32[b, n], which beam of the step before each continues
    ended: _Ended
    open: Array  # bool[b], can a prompt's answer still change?


class _Candidates(NamedTuple):
    """The likeliest continuations of a prompt's running beams, c a prompt, the best first."""

    rows: Array  # int32[b, c, w], with the new token
    scores: Array  # float32[b, c], sums of log probabilities
    parents: Array  # int32[b, c], which running beam each continues
    ends: Array  # bool[b, c], is the new token an end token?


def search(
    prompts: Prefilled, beams: Beams, ranking: Ranking, constraints: Constraints
) -> tuple[Array, Array]:
    """Return (rows int32[b, r, w], counts int32[b, r]): each prompt's r best, and their new tokens.

    The cache of the prompts has ``num_beams`` rows for each of them.
    """
    b, n, max_new = len(prompts.history), beams.num_beams, prompts.max_new

    def advance(state: _State, logits: Array) -> _State:
        found = _candidates(state, logits, prompts.lengths, prompts.ends, constraints)
        step = state.step + 1
        over = found.ends | (step == max_new)
        scores, best = jax.lax.top_k(found.scores + jnp.where(over, NEVER, 0.0), n)
        ended = _ended(state, found, over, ranking)
        return _State(
            step,
            _pick(found.rows, best),
            scores,
            _pick(found.parents, best),
            ended,
            state.open & _may_change(scores[:, 0], ended, step, max_new, ranking),
        )

    def going(carry):
        state, _ = carry
        return (state.step < max_new) & jnp.any(state.open)

    def body(carry):
        state, cache = carry
        cache = cache.take((jnp.arange(b)[:, None] * n + state.parents).reshape(-1))
        at = (prompts.lengths + state.step - 1)[:, None, None]
        tokens = jnp.take_along_axis(state.running, at, axis=2).reshape(-1)
        logits, cache = prompts.decode(tokens, cache)
        return advance(state, logits), cache

    logits = jnp.repeat(prompts.logits, n, axis=0)
    first = advance(_start(prompts.history, prompts.real, n), logits)
    state, _ = jax.lax.while_loop(going, body, (first, prompts.cache))
    r = beams.num_return_sequences
    return state.ended.rows[:, :r], state.ended.counts[:, :r]


def _start(history: Array, real: Array, n: int) -> _State:
    """Return the state before the first new token."""
    b = len(history)
    rows, never = jnp.repeat(history[:, None], n, axis=1), jnp.full((b, n), NEVER)
    zeros = jnp.zeros((b, n), jnp.int32)
    ended = _Ended(rows, never, zeros, jnp.zeros((b, n), bool))
    # All beams of a prompt are alike at first, so only one of them has candidates.
    return _State(jnp.int32(0), rows, never.at[:, 0].set(0.0), zeros, ended, real)


def _candidates(
    state: _State, logits: Array, lengths: Array, ends: Array, constraints: Constraints
) -> _Candidates:
    """Return so many continuations that n of them do not end. logits: float32[b * n, v]."""
    b, n, w = state.running.shape
    at = lengths + state.step
    scores = constraints(
        jax.nn.log_softmax(logits), state.running.reshape(b * n, w), jnp.repeat(at, n),
        state.step, ends,
    )  # fmt: skip
    v = scores.shape[-1]
    scores = scores.reshape(b, n, v) + state.scores[:, :, None]
    # With one more than all end tokens a beam, n of the candidates do not end, whatever comes.
    keep = max(2, 1 + ends.shape[0]) * n
    scores, index = jax.lax.top_k(scores.reshape(b, n * v), keep)
    parents, tokens = index // v, index % v
    rows = _pick(state.running, parents)
    rows = jnp.where(jnp.arange(w) == at[:, None, None], tokens[:, :, None], rows)
    return _Candidates(rows, scores, parents, jnp.isin(tokens, ends))


def _ended(state: _State, found: _Candidates, over: Array, ranking: Ranking) -> _Ended:
    """Return the best n of the beams that had ended and those that end now.

    over: bool[b, c], candidates that end, by their token or because no more are wanted.
    """
    n = state.running.shape[1]
    # Only the first n candidates may end; the others are there to keep n beams running.
    ending = over & (jnp.arange(over.shape[1]) < n) & state.open[:, None]
    now = _Ended(
        found.rows,
        jnp.where(ending, found.scores / ranking.divisors[state.step], NEVER),
        state.step + 1 - found.ends.astype(jnp.int32),
        ending,
    )
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), state.ended, now)
    _, first = jax.lax.top_k(both.scores, n)
    return jax.tree.map(lambda x: _pick(x, first), both)


def _may_change(best: Array, ended: _Ended, step: Array, max_new: Array, ranking: Ranking) -> Array:
    """Tell of each prompt whether a running beam may still displace an ended one, bool[b].

    best: float32[b], the score of its best running beam. step: the new tokens of running beams.
    """
    all_full = jnp.all(ended.full, axis=1)
    length = jnp.where(ranking.longest, max_new, step)
    hope = best / ranking.divisors[length - 1]
    better = hope > jnp.where(all_full, ended.scores[:, -1], NEVER)
    return better & ~(all_full & ranking.first)


def _pick(x: Array, index: Array) -> Array:
    """Return x [b, n, ...] at index, int32[b, m], of its second axis."""
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
