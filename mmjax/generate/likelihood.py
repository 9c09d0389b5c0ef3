"""How likely given answers are: each prompt runs once, its answers behind it token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mmjax.generate.loop import bucket, pad_batch
from mmjax.parallel.sharding import constrain
from mmjax.types import BadSample, Batch, Example


@dataclasses.dataclass(frozen=True)
class Continuations:
    """One prompt and the token sequences that may follow it.

    prompt: an Example. tokens: int32[n] each, none empty; counted: bool[n] each, which of them
    are the answer's: a token that reaches over the border is of prompt and answer, and is read but
    not counted.
    """

    prompt: Example
    tokens: tuple[np.ndarray, ...]
    counted: tuple[np.ndarray, ...]

    @property
    def longest(self) -> int:
        """Return the most tokens that follow the prompt."""
        return max(map(len, self.tokens))

    @property
    def counts(self) -> np.ndarray:
        """Return how many tokens of each answer are counted, int[answers]."""
        return np.array([mask.sum() for mask in self.counted])


def continuations(examples: Sequence[Example]) -> Continuations:
    """Return what examples that differ in their answers alone begin with, and how each goes on.

    examples: of one prompt, the answer a target in each (``loss_mask``). Raises BadSample
    ``no_answer`` where an answer has no token of its own, or nothing before it, and
    ``image_in_answer``.
    """
    first, shared = examples[0]["tokens"], len(examples[0]["tokens"])
    for example in examples:
        shared = min(shared, int(np.argmax(example["loss_mask"])))
        apart = example["tokens"][:shared] != first[:shared]
        shared = int(np.argmax(apart)) if apart.any() else shared
        if not shared or not example["loss_mask"].any():
            raise BadSample(
                "no_answer",
                "an answer has no token of its own behind its prompt; word one of them otherwise",
            )
    prompt = {name: x if name == "patches" else x[:shared] for name, x in examples[0].items()}
    for example in examples:
        seen = example["visual_index"][shared - 1 :]
        if ((seen[1:] != -1) & (seen[1:] != seen[0])).any():
            raise BadSample("image_in_answer", "an answer shows an image; give one of text alone")
    ends = [int(np.flatnonzero(e["loss_mask"])[-1]) + 1 for e in examples]
    return Continuations(
        prompt,
        tuple(e["tokens"][shared:end] for e, end in zip(examples, ends, strict=True)),
        tuple(e["loss_mask"][shared:end] for e, end in zip(examples, ends, strict=True)),
    )


def log_likelihoods(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    asked: Sequence[Continuations],
    *,
    rows: int,
    cache_dtype: str | None = None,
) -> list[np.ndarray]:
    """Return the log-likelihood of every continuation, float64[answers] a prompt.

    The sum over its counted tokens of log p(token | all before it). rows: so many prompts and so
    many answers run at a time, whatever there are, so that few programs are compiled.
    """
    batch, lengths = pad_batch([one.prompt for one in asked], rows)
    room = batch["tokens"].shape[1] + bucket(max(one.longest for one in asked), 16)
    logits, cache = _prefill(graphdef, room, cache_dtype, params, batch, lengths)
    owners = [(i, j) for i, one in enumerate(asked) for j in range(len(one.tokens))]
    width = room - batch["tokens"].shape[1]
    found: list[float] = []
    for start in range(0, len(owners), rows):
        some = owners[start : start + rows]
        tokens, counted = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
        for row, (i, j) in enumerate(some):
            n = len(asked[i].tokens[j])
            tokens[row, :n], counted[row, :n] = asked[i].tokens[j], asked[i].counted[j]
        of = np.zeros(rows, np.int32)
        of[: len(some)] = [i for i, _ in some]
        sums = _follow(graphdef, params, logits, cache, of, tokens, counted)
        found += np.asarray(jax.device_get(sums), np.float64)[: len(some)].tolist()
    ends = np.cumsum([len(one.tokens) for one in asked])
    return [np.array(x) for x in np.split(np.array(found), ends[:-1])]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(graphdef, room: int, cache_dtype, params, batch: Batch, lengths: Array):
    """Return the logits [b, v] behind right-padded prompts, and their cache of ``room`` places."""
    model = nnx.merge(graphdef, params)
    cache = model.init_cache(len(lengths), room, cache_dtype)
    hidden, cache = model.prefill(batch, lengths, cache)
    return model.logits(hidden), cache


@partial(jax.jit, static_argnums=0)
def _follow(graphdef, params, logits, cache, of: Array, tokens: Array, counted: Array) -> Array:
    """Return float32[r], the sums of r answers. of: int32[r], their prompts; the rest is [r, n]."""
    model = nnx.merge(graphdef, params)
    logits, cache = logits[of], cache.take(of)
    # Behind the longest answer of all there is nothing to read.
    last = jnp.max(jnp.where(counted, jnp.arange(tokens.shape[1]), 0))

    def add(total: Array, logits: Array, at: Array | int) -> Array:
        token = tokens[:, at]
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        own = jnp.take_along_axis(log_p, token[:, None], axis=1)[:, 0]
        return total + jnp.where(counted[:, at], own, 0)

    def going(carry):
        return carry[0] < last

    def body(carry):
        at, total, cache = carry
        hidden, cache = model.decode(tokens[:, at], cache)
        return at + 1, add(total, model.logits(hidden), at + 1), cache

    start = jnp.int32(0), add(jnp.zeros(len(of)), logits, 0), cache
    return constrain(jax.lax.while_loop(going, body, start)[1], None)
