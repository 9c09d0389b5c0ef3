"""Generation: one prefill for each length bucket, then one ``while_loop`` on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.generate.sampling import Sampling
from mmjax.parallel.sharding import constrain
from mmjax.types import Batch, Example, MMJaxError


def bucket(n: int, smallest: int = 32) -> int:
    """Return the padded size for n: powers of two and their halves-between, so few programs."""
    size = smallest
    while size < n:
        if size * 3 // 2 >= n:
            return size * 3 // 2
        size *= 2
    return size


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
        batch["patches"] = np.zeros((rows, bucket(most, 8), some.shape[1]), some.dtype)
    for row, example in enumerate(examples):
        n = lengths[row] = len(example["tokens"])
        for name in ("tokens", "visual_index"):
            batch[name][row, :n] = example[name]
        batch["segment_ids"][row, :n] = 1
        if len(example["patches"]):
            batch["patches"][row, : len(example["patches"])] = example["patches"]
    return batch, lengths


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates from prompts with one model. The parameters are an argument: they may change.

    graphdef: of the model. eos: token ids that end a row. sampling: how tokens are chosen.
    """

    graphdef: nnx.GraphDef
    eos: tuple[int, ...]
    sampling: Sampling = Sampling()  # noqa: RUF009
    cache_dtype: str | None = None

    def __call__(
        self,
        params: nnx.State,
        examples: Sequence[Example],
        max_new_tokens: int,
        *,
        seed: int = 0,
        rows: int | None = None,
        places: Sequence[int] | None = None,
    ) -> list[np.ndarray]:
        """Return the new tokens of each prompt, int32[<= max_new_tokens], without the end token.

        rows: the batch is padded to this many rows, so that a last, smaller batch compiles
            nothing new. places: numbers of the prompts, by default 0, 1, ...: a prompt's draws
            depend on (seed, its place) alone.
        """
        batch, lengths = pad_batch(examples, rows)
        numbers = np.zeros(len(lengths), np.int32)
        numbers[: len(examples)] = range(len(examples)) if places is None else places
        room = bucket(batch["tokens"].shape[1] + max_new_tokens)
        tokens, counts = _generate(
            self.graphdef, params, batch, lengths, (jax.random.key(seed), numbers),
            jnp.int32(max_new_tokens), len(examples), self.eos, self.sampling, room,
            self.cache_dtype,
        )  # fmt: skip
        tokens, counts = jax.device_get((tokens, counts))
        return [tokens[i, : counts[i]] for i in range(len(examples))]


@partial(jax.jit, static_argnums=(0, 6, 7, 8, 9, 10))
def _generate(
    graphdef, params, batch, lengths, draws, max_new, real, eos, sampling, room, cache_dtype
):
    """Return (tokens [b, room - t], counts [b]) of a right-padded batch.

    draws: (key, places int32[b]).
    """
    model = nnx.merge(graphdef, params)
    b, t = batch["tokens"].shape
    key, places = draws
    keys = jax.vmap(partial(jax.random.fold_in, key))(places)
    ends = jnp.asarray(eos, jnp.int32)

    def choose(hidden, step):
        step_keys = jax.vmap(lambda k: jax.random.fold_in(k, step))(keys)
        return sampling(model.logits(hidden), step_keys)

    cache = model.init_cache(b, room, cache_dtype)
    hidden, cache = model.prefill(batch, lengths, cache)
    # The head runs on each prompt's last position only.
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token = choose(last, 0)
    done = jnp.isin(token, ends) | (jnp.arange(b) >= real)
    out = jnp.zeros((b, room - t), jnp.int32)
    layers = None
    if jax.default_backend() == "cpu":
        # A scan copies each layer's weights and cache out of their stacks for every token. Taken
        # apart once, before the loop, they are read where they lie; it costs a second copy of the
        # weights, which a CPU has room for.
        layers, cache = model.unstack(), cache.unstack()

    def going(carry):
        step, _, done, *_ = carry
        return (step < max_new) & ~jnp.all(done)

    def body(carry):
        step, token, done, counts, out, cache = carry
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
        counts = counts + ~done
        hidden, cache = model.decode(token, cache, layers)
        token = choose(hidden, step + 1)
        return step + 1, token, done | jnp.isin(token, ends), counts, out, cache

    start = (jnp.int32(0), token, done, jnp.zeros((b,), jnp.int32), out, cache)
    _, _, _, counts, out, _ = jax.lax.while_loop(going, body, start)
    # Whole on every device: each process of a run reads them.
    return constrain(out, None, None), constrain(counts, None)
