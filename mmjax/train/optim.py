"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import dataclasses
from typing import Literal

import optax

from mmjax.nn.paths import map_named
from mmjax.types import MMJaxError


@dataclasses.dataclass(frozen=True)
class OptimSettings:
    """AdamW and its schedule.

    lr: the peak. warmup: steps of linear warm-up, or a share of all steps when below 1.
    final_lr: the last learning rate as a share of the peak (cosine and linear).
    weight_decay: acts on kernels alone: not on biases, norms or embeddings.
    clip_norm: bound on the global gradient norm; 0 does not clip.
    """

    lr: float = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    final_lr: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


def schedule(settings: OptimSettings, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step."""
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * steps
    warmup = round(warmup)
    if warmup > steps:
        raise MMJaxError(
            f"optim.warmup is {warmup} steps and the run has {steps}; lower it, or give a share "
            "of the run below 1"
        )
    rest, peak = max(steps - warmup, 1), settings.lr
    if settings.schedule == "constant":
        body = optax.constant_schedule(peak)
    elif settings.schedule == "linear":
        body = optax.linear_schedule(peak, peak * settings.final_lr, rest)
    else:
        body = optax.cosine_decay_schedule(peak, rest, alpha=settings.final_lr)
    if not warmup:
        return body
    # The first update already moves: step i of the warm-up uses (i + 1) / warmup of the peak.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, body], [warmup])


def decays(name: str) -> bool:
    """Tell whether weight decay acts on the parameter of this dotted name."""
    return name.rsplit(".", 1)[-1] in ("kernel", "lora_a", "lora_b")


def make_optimizer(settings: OptimSettings, steps: int) -> optax.GradientTransformation:
    """Build AdamW (Loshchilov & Hutter 2019) with clipping and decay on kernels only.

    The same update as torch's AdamW after ``clip_grad_norm_``.
    """
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    adam = optax.adamw(
        schedule(settings, steps),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=lambda params: map_named(lambda name, _: decays(name), params),
    )
    return optax.chain(clip, adam)
