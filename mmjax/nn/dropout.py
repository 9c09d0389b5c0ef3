"""Dropout whose masks are functions of a key that the train step makes of seed and step."""

import contextlib
import contextvars
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array

from mmjax.parallel.context import take_on_length

_KEY: contextvars.ContextVar[Array | None] = contextvars.ContextVar("dropout", default=None)


@contextlib.contextmanager
def dropout_key(key: Array | None) -> Iterator[None]:
    """Drop while a model is traced inside; None, the default, drops nothing.

    key: a traced PRNG key, a function of seed and step: one program serves all steps. A scan over
        layers folds the layer's index in, and whatever drops its name, so a mask is a function of
        (seed, step, layer, name) on any mesh, and rematerialisation draws it again. Chunks of the
        loss share one mask of the head, and there alone the mesh tells which rows they hold.
    """
    token = _KEY.set(key)
    try:
        yield
    finally:
        _KEY.reset(token)


def of_layer(index: Array) -> contextlib.AbstractContextManager[None]:
    """Return the scope of one layer: its own masks where any are drawn."""
    key = _KEY.get()
    return dropout_key(None if key is None else jax.random.fold_in(key, index))


def drop(x: Array, rate: float, name: str, *, at: Array | None = None, length: int = 0) -> Array:
    """Set a share ``rate`` of x to 0 and scale the others by 1 / (1 - rate), in training alone.

    name: two of one name, layer and shape draw one mask. at: int32[b, m], where x [b, m, d] was
    taken from a row of this ``length``: it gets the mask that it would have had there.
    """
    key = _KEY.get()
    if key is None or not rate:
        return x
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    shape = x.shape if at is None else (x.shape[0], length, *x.shape[2:])
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    if at is not None:
        keep = take_on_length(keep, at)
    # In float32: bfloat16 would round the factor itself, for every number that is kept.
    return jnp.where(keep, x.astype(jnp.float32) / (1.0 - rate), 0).astype(x.dtype)
