"""What the kernels for GPUs share: how they are called, and their rule of differentiation."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def bounds_of(q, k, ranges, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Return each query's range of keys, int32[b, t] start and end, with causality in its end."""
    b, t = q.shape[:2]
    if ranges is None:
        ranges = jnp.zeros((b, t), jnp.int32), jnp.full((b, t), k.shape[1], jnp.int32)
    start, end = ranges
    if causal:  # two comparisons per score instead of three
        end = jnp.minimum(end, jnp.arange(1, t + 1, dtype=jnp.int32))
    return start, end


def interpreted(asked: bool | None) -> bool:
    """Tell whether kernels run interpreted: as asked, or off a GPU."""
    return jax.default_backend() != "gpu" if asked is None else asked


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """Return flash(q, k, v, start, end, slopes, scale, interpret) -> out of two passes of kernels.

    forward: of the same arguments, returns (out, lse), the log-sum-exp as float32[b, n, t].
    backward: (q, k, v, start, end, slopes, out, lse, grad, scale, interpret) -> (dq, dk, dv).
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
    def flash(q, k, v, start, end, slopes, scale, interpret):
        return rule_forward(q, k, v, start, end, slopes, scale, interpret)[0]

    def rule_forward(q, k, v, start, end, slopes, scale, interpret):
        out, lse = forward(q, k, v, start, end, slopes, scale, interpret)
        # Named inside the rule, as in flash_xla: rematerialisation then never runs it again.
        out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
        return out, (q, k, v, start, end, slopes, out, lse)

    def rule_backward(scale, interpret, residuals, grad):
        slopes = residuals[5]
        dq, dk, dv = backward(*residuals, grad, scale, interpret)
        return dq, dk, dv, None, None, jax.tree.map(jnp.zeros_like, slopes)

    flash.defvjp(rule_forward, rule_backward)
    return flash
