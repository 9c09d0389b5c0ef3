"""Generation: one prefill for each length bucket, then one ``while_loop`` on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mmjax.generate import beam, copies
from mmjax.generate.beam import Beams, Prefilled
from mmjax.generate.constraints import Constraints
from mmjax.generate.sampling import Sampling
from mmjax.nn.cache import DTYPES
from mmjax.parallel.sharding import constrain, shards
from mmjax.types import Batch, Example, MMJaxError, is_count


def bucket(n: int, smallest: int = 32) -> int:
    """Return the padded size for n: powers of two and their halves-between, so few programs."""
    size = smallest
    while size < n:
        if size * 3 // 2 >= n:
            return size * 3 // 2
        size *= 2
    return size


def check_cache_dtype(dtype: str | None) -> None:
    """Raise MMJaxError for what keys and values cannot be stored in."""
    if dtype not in (None, *DTYPES):
        known = ", ".join(f'"{name}"' for name in DTYPES)
        raise MMJaxError(
            f"cache_dtype is {dtype!r}; give one of {known}, or None for the model's own"
        )


def room_for(t: int, max_new_tokens: int) -> int:
    """Return the cache's places for prompts padded to t and their answers.

    The answer alone is rounded: were the sum, 3,072 + 128 would become 4,096, and a third more keys
    and values would be read for each token.
    """
    return t + bucket(max_new_tokens, 16)


def pad_batch(examples: Sequence[Example], rows: int | None = None) -> tuple[Batch, np.ndarray]:
    """Right-pad prompts to one batch of bucketed shape; returns (batch, lengths int32[b]).

    rows: pad to this many rows with one-token prompts; default, the number of examples.
    """
    rows = len(examples) if rows is None else rows
    t = bucket(max(len(e["tokens"]) for e in examples))
    lengths = np.ones(rows, np.int32)
    batch = {
        "tokens": np.zeros((rows, t), np.int32),
        "positions": np.tile(np.arange(t, dtype=np.int32), (rows, 1)),
        "visual_index": np.full((rows, t), -1, np.int32),
        "segment_ids": np.zeros((rows, t), np.int32),
    }
    most = max(len(e["patches"]) for e in examples)
    if most:
        some = next(e["patches"] for e in examples if len(e["patches"]))
        dtypes = {e["patches"].dtype for e in examples if len(e["patches"])}
        if len(dtypes) > 1:
            raise MMJaxError(
                "a batch mixes images given as grey levels with images given as normalised "
                "floats; give all of them in one form"
            )
        batch["patches"] = np.zeros((rows, bucket(most, 1), some.shape[1]), some.dtype)
    for row, example in enumerate(examples):
        n = lengths[row] = len(example["tokens"])
        for name in ("tokens", "visual_index"):
            batch[name][row, :n] = example[name]
        batch["segment_ids"][row, :n] = 1
        if len(example["patches"]):
            batch["patches"][row, : len(example["patches"])] = example["patches"]
    return batch, lengths


def check_settings(
    sampling: Sampling = Sampling(),  # noqa: B008
    beams: Beams = Beams(),  # noqa: B008
    *,
    cache_dtype: str | None = None,
    **counts: int,
) -> None:
    """Raise MMJaxError for settings that no model can answer with, before one is read.

    counts: whole numbers from 1 up by name, such as max_new_tokens and batch_size.
    """
    for name, value in counts.items():
        if not is_count(value):
            raise MMJaxError(f"{name} is {value!r}; give a whole number from 1 up")
    check_cache_dtype(cache_dtype)
    if beams.num_beams > 1 and sampling.temperature > 0:
        raise MMJaxError(
            f"num_beams is {beams.num_beams} with temperature {sampling.temperature}; beams take "
            "the likeliest tokens and draw none: give temperature=0, or num_beams=1"
        )


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates from prompts with one model. The parameters are an argument: they may change.

    graphdef: of the model. eos: token ids that end a row. sampling: how tokens are chosen, or
    beams: beam search, which needs temperature 0. constraints: what a row may not say.
    cache_dtype: what keys and values are stored in, one of ``mmjax.nn.cache.DTYPES``; None for the
    model's compute dtype. Raises MMJaxError for another. beside: bytes that stay on the device
    beside the parameters while it answers, such as an optimizer's.
    """

    graphdef: nnx.GraphDef
    eos: tuple[int, ...]
    sampling: Sampling = Sampling()  # noqa: RUF009
    cache_dtype: str | None = None
    beams: Beams = Beams()  # noqa: RUF009
    constraints: Constraints = Constraints()  # noqa: RUF009
    beside: int = 0

    def __post_init__(self):
        check_settings(self.sampling, self.beams, cache_dtype=self.cache_dtype)

    def __call__(
        self,
        params: nnx.State,
        examples: Sequence[Example],
        max_new_tokens: int,
        *,
        seed: int = 0,
        rows: int | None = None,
        places: Sequence[int] | None = None,
    ) -> list[np.ndarray] | list[list[np.ndarray]]:
        """Return the new tokens of each prompt, int32[<= max_new_tokens], without the end token.

        With num_return_sequences above 1, a list of so many for each prompt, the best first.
        rows: the batch is padded to this many rows, so that a last, smaller batch compiles
            nothing new. places: numbers of the prompts, by default 0, 1, ...: a prompt's draws
            depend on (seed, its place) alone.
        """
        if self.constraints.min_new_tokens > max_new_tokens:
            raise MMJaxError(
                f"min_new_tokens is {self.constraints.min_new_tokens} and max_new_tokens "
                f"{max_new_tokens}; the least cannot be above the most"
            )
        batch, lengths = pad_batch(examples, rows)
        numbers = np.zeros(len(lengths), np.int32)
        numbers[: len(examples)] = range(len(examples)) if places is None else places
        room = room_for(batch["tokens"].shape[1], max_new_tokens)
        ranking = self.beams.ranking(room)
        # What ``ranking`` and the numbers of ``sampling`` say must not compile anew.
        beams = dataclasses.replace(self.beams, length_penalty=1.0, early_stopping=False)
        tokens, counts = _generate(
            dataclasses.replace(self, beams=beams, sampling=self.sampling.shape()), room,
            self._copy(params, len(lengths), room), params, batch, lengths,
            (jax.random.key(seed), numbers, self.sampling.numbers()), ranking,
            jnp.int32(max_new_tokens), jnp.int32(len(examples)),
        )  # fmt: skip
        tokens, counts = jax.device_get((tokens, counts))
        rows = [
            [some[:count] for some, count in zip(*row, strict=True)]
            for row in zip(tokens[: len(examples)], counts[: len(examples)], strict=True)
        ]
        return rows if self.beams.num_return_sequences > 1 else [row[0] for row in rows]

    def _copy(self, params: nnx.State, b: int, room: int) -> str | None:
        """Return which copy of the weights b prompts and their answers leave room for."""
        if jax.default_backend() == "cpu":
            return copies.APART_FIRST

        def init(params):
            model = nnx.merge(self.graphdef, params)
            return model.init_cache(b * self.beams.num_beams, room, self.cache_dtype)

        kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(init, params)))
        return copies.choose(params, kept // shards("batch", b), self.beside)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(how, room, copy, params, batch, lengths, draws, ranking, max_new, real):
    """Return (tokens [b, r, room - t], counts [b, r]) of a right-padded batch, r answers a row.

    how: a Generator. copy: of the weights, see ``copies.choose``. draws: (key, places int32[b],
    what ``Sampling.numbers`` returns). real: rows from here on are padding.
    """
    model = nnx.merge(how.graphdef, params)
    b, t = batch["tokens"].shape
    ends = jnp.asarray(how.eos, jnp.int32)
    real = jnp.arange(b) < real
    history = jnp.pad(batch["tokens"], ((0, 0), (0, room - t)))

    cache = model.init_cache(b, room, how.cache_dtype)
    layers = None
    if copy == copies.APART_FIRST:
        layers, cache = copies.make(model), cache.unstack()
    # The head runs on each prompt's last position only.
    hidden, cache = model.prefill(batch, lengths, cache, layers)
    if copy == copies.APART:
        layers, cache = copies.make(model), cache.unstack()
    logits = model.logits(hidden)
    if how.beams.num_beams > 1:
        cache = cache.take(jnp.repeat(jnp.arange(b), how.beams.num_beams))

    def decode(tokens, cache):
        hidden, cache = model.decode(tokens, cache, layers)
        return model.logits(hidden), cache

    prompts = Prefilled(decode, logits, cache, history, lengths, real, max_new, ends)
    if how.beams.num_beams > 1:
        history, counts = beam.search(prompts, how.beams, ranking, how.constraints)
    else:
        history, counts = _draw(prompts, draws, how.sampling, how.constraints)
    new = (lengths[:, None] + jnp.arange(room - t))[:, None]
    tokens = jnp.take_along_axis(history, new, axis=2)
    # Whole on every device: each process of a run reads them.
    return constrain(tokens, None, None, None), constrain(counts, None, None)


def _draw(
    prompts: Prefilled, draws: tuple, sampling: Sampling, constraints: Constraints
) -> tuple[Array, Array]:
    """Choose one token a row and step; returns (rows int32[b, 1, w], counts int32[b, 1])."""
    lengths, ends = prompts.lengths, prompts.ends
    rows = jnp.arange(len(lengths))
    key, places, numbers = draws
    keys = jax.vmap(partial(jax.random.fold_in, key))(places)

    def choose(logits, history, step):
        step_keys = jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
        logits = constraints(logits, history, lengths + step, step, ends)
        return sampling(logits, step_keys, numbers)

    def take(step, logits, done, counts, history):
        token = choose(logits, history, step)
        done = done | jnp.isin(token, ends)
        history = history.at[rows, lengths + step].set(token, mode="promise_in_bounds")
        return token, done, counts + ~done, history

    def going(carry):
        step, _, done, *_ = carry
        return (step < prompts.max_new) & ~jnp.all(done)

    def body(carry):
        step, token, done, counts, history, cache = carry
        logits, cache = prompts.decode(token, cache)
        return step + 1, *take(step, logits, done, counts, history), cache

    # The first token stands outside of the loop: nothing is decoded after the last.
    none = jnp.zeros_like(lengths)
    first = take(jnp.int32(0), prompts.logits, ~prompts.real, none, prompts.history)
    start = (jnp.int32(1), *first, prompts.cache)
    _, _, _, counts, history, _ = jax.lax.while_loop(going, body, start)
    return history[:, None], counts[:, None]
