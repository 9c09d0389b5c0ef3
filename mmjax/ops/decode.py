"""Attention of one new token to a cache."""

import jax
import jax.numpy as jnp
from jax import Array


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    length: Array,
    *,
    scale: float | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    alibi_slopes: Array | None = None,
    window: int | None = None,
) -> Array:
    """Attend from one query a row to the first ``length`` keys of its cache.

    q: [b, n, h]; k, v: [b, k, s, h], heads before length so that nothing is transposed for each
        token; length: int32[b].
    k_scale, v_scale: float32[b, k, s], where k and v are int8 steps of so much: those of a key
        multiply its scores and those of a value its weights, not the h numbers of each.
    alibi_slopes: float32[n]; adds slope times (j - the last key).
    window: the last so many of them alone, None for all.
    Returns [b, n, h]. Scores are float32 [b, n, s].
    """
    b, n, h = q.shape
    kv, s = k.shape[1:3]
    scale = h**-0.5 if scale is None else scale
    # Scaled in float32: bfloat16 would round the factor itself, for all scores alike.
    grouped = (q.astype(jnp.float32) * scale).astype(q.dtype).reshape(b, kv, n // kv, h)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    scores = jnp.einsum("bkgh,bksh->bkgs", grouped, k, preferred_element_type=jnp.float32)
    if k_scale is not None:
        scores *= k_scale[:, :, None]
    if alibi_slopes is not None:
        past = (jnp.arange(s)[None] - (length[:, None] - 1)).astype(jnp.float32)
        scores += alibi_slopes.reshape(1, kv, n // kv, 1) * past[:, None, None]
    seen = jnp.arange(s)[None] < length[:, None]
    if window is not None:
        seen &= jnp.arange(s)[None] >= length[:, None] - window
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    if v_scale is not None:
        # As shares of the largest: a weight times a scale may be below what float16 has.
        largest = v_scale.max(-1, keepdims=True)
        weights *= (v_scale / largest)[:, :, None]
    weights = weights.astype(v.dtype)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, v, preferred_element_type=jnp.float32)
    if v_scale is not None:
        out *= largest[..., None]
    return out.reshape(b, n, h).astype(q.dtype)
