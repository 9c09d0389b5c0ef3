"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from mmjax.nn.paths import map_named
from mmjax.train import matrices
from mmjax.types import MMJaxError, nearest

DECAYED = ("*kernel", "*lora_a", "*lora_b")
"""The parameters that weight decay acts on unless a run says otherwise."""


@dataclasses.dataclass(frozen=True)
class RateSettings:
    """Some parameters have a peak learning rate of their own; the schedule keeps its shape.

    params: a glob pattern on dotted names, such as ``projector.*``. lr: their peak.
    """

    params: str
    lr: float


@dataclasses.dataclass(frozen=True)
class OptimSettings:
    """An optimizer and its schedule. What it keeps, in bytes a parameter:

    adamw: first and second moment, float32: 8, or 6 with ``mu_dtype`` bfloat16. adafactor: a
    momentum in bfloat16 and second moments of rows and columns: 2, or 0 with ``b1`` 0. lion: a
    momentum: 4, or 2 with bfloat16. muon: a momentum for the matrices of the layers, which it
    makes orthogonal, and AdamW's moments for everything else. Second moments are float32 always.

    lr: the peak, in AdamW's measure for all but lion, which takes a third to a tenth of it.
    rates: parameters with another peak than ``lr``; of several that match, the first one counts.
    As in torch's parameter groups their weight decay is times their own learning rate.
    warmup: steps of linear warm-up, or a share of all steps when below 1.
    final_lr: where the learning rate comes down to behind the last step, as a share of the peak
    (cosine and linear); the last step still has a little more, as in transformers.
    b1, b2: decays of the moments. Adafactor has a schedule of its own for the second; lion is
    usually given b2=0.99; muon's momentum is ``b1`` too. mu_dtype: of the momentum or first
    moment; auto is bfloat16 for adafactor and float32 for the others. eps: added to the root of
    the second moment by adamw, and by muon for what AdamW updates.
    weight_decay: times the learning rate, on the parameters that ``decay`` names: kernels and
    adapters alone (not biases, norms or embeddings) unless other glob patterns are given, such as
    ``("cross.*",)`` for everything in a part. clip_norm: bound on the global gradient norm; 0 does
    not clip.
    """

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    lr: float = 1e-5
    rates: tuple[RateSettings, ...] = ()
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    final_lr: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    mu_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    weight_decay: float = 0.1
    decay: tuple[str, ...] = DECAYED
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


def decays(name: str, patterns: Sequence[str] = DECAYED) -> bool:
    """Tell whether weight decay acts on the parameter of this dotted name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_decay(settings: OptimSettings, names: Sequence[str]) -> None:
    """Raise MMJaxError for a pattern of ``optim.decay`` that matches no parameter of a model."""
    for pattern in settings.decay:
        if pattern not in DECAYED and not fnmatch.filter(names, pattern):
            raise MMJaxError(
                f"optim.decay pattern {pattern!r} matches no parameter; names look like "
                f"{', '.join(list(names)[:4])}{nearest(pattern, names)}"
            )


def by_rate(settings: OptimSettings, trained: Collection[str]) -> dict[str, list[str]]:
    """Return the trained parameters that each of ``optim.rates`` is for, by its pattern.

    Raises MMJaxError for one that is left with no trained parameter, and rates that cannot work.
    """
    found: dict[str, list[str]] = {}
    for one in settings.rates:
        if not (settings.lr > 0 and math.isfinite(one.lr) and one.lr >= 0):
            raise MMJaxError(
                f"optim.rates gives {one.params!r} the rate {one.lr}, beside optim.lr "
                f"{settings.lr}; a rate is at least 0 and lr above it (to train nothing else, "
                "freeze the rest)"
            )
        matched = fnmatch.filter(sorted(trained), one.params)
        if not matched:
            raise MMJaxError(
                f"optim.rates pattern {one.params!r} matches no trained parameter; names look like "
                f"{', '.join(sorted(trained)[:4])}{nearest(one.params, trained)}"
            )
        left = [name for name in matched if _rate(settings, name) is one]
        if one.params in found or not left:
            raise MMJaxError(
                f"optim.rates pattern {one.params!r} is left with no parameter: patterns before it "
                "match them all, and the first counts; put it in front of them, or drop it"
            )
        found[one.params] = left
    return found


def shares(settings: OptimSettings) -> dict[str, float]:
    """Return the rates of ``optim.rates`` as shares of ``lr``, by their patterns."""
    return {one.params: one.lr / settings.lr for one in settings.rates}


def _rate(settings: OptimSettings, name: str) -> RateSettings | None:
    matching = (one for one in settings.rates if fnmatch.fnmatchcase(name, one.params))
    return next(matching, None)


def make_optimizer(settings: OptimSettings, steps: int) -> optax.GradientTransformation:
    """Build an optimizer: clipping, the named update, decay and the learning rate by pattern.

    adamw is Loshchilov & Hutter 2019, the same update as torch's AdamW after ``clip_grad_norm_``.
    """
    if settings.name not in CORES:
        raise MMJaxError(f"optim.name {settings.name!r} is unknown; one of {', '.join(CORES)}")
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    update = optax.chain(
        CORES[settings.name](settings),
        optax.add_decayed_weights(
            settings.weight_decay,
            lambda params: map_named(lambda name, _: decays(name, settings.decay), params),
        ),
        optax.scale_by_learning_rate(schedule(settings, steps)),
    )
    rates = [_at_their_rates(settings)] if settings.rates else []
    return _in_float32(optax.chain(clip, update, *rates))


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Show a transformation parameters and gradients in float32, whatever they are kept in.

    optax keeps second moments in the dtype of the parameters: in bfloat16 0.999 v rounds to v, and
    they would never fall.
    """

    def cast(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates, state, params=None):
        return inner.update(cast(updates), state, None if params is None else cast(params))

    return optax.GradientTransformation(lambda params: inner.init(cast(params)), update)


def _at_their_rates(settings: OptimSettings) -> optax.GradientTransformation:
    """Scale the finished updates of the parameters that have a learning rate of their own."""
    share = shares(settings)

    def scale(name: str, update):
        one = _rate(settings, name)
        return update if one is None else update * share[one.params]

    return optax.stateless(lambda updates, _: map_named(scale, updates))


def mu_dtype(settings: OptimSettings) -> str:
    """Return the dtype of the momentum or first moment."""
    if settings.mu_dtype != "auto":
        return settings.mu_dtype
    return "bfloat16" if settings.name == "adafactor" else "float32"


def _adamw(settings: OptimSettings) -> optax.GradientTransformation:
    return optax.scale_by_adam(settings.b1, settings.b2, settings.eps, mu_dtype=mu_dtype(settings))


def _lion(settings: OptimSettings) -> optax.GradientTransformation:
    return optax.scale_by_lion(settings.b1, settings.b2, mu_dtype=mu_dtype(settings))


def _adafactor(settings: OptimSettings) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018) with an absolute learning rate and decoupled decay.

    ``optax.adafactor`` would decay by ``weight_decay`` a step whatever the learning rate, and
    would not factor [l, d, n, h]: its heads are shorter than 128. Here kernels are matrices. The
    momentum is corrected for its start at zero, as AdamW's; optax's and transformers' are not,
    and take smaller first steps.
    """
    second = matrices.on_matrices(optax.chain(optax.scale_by_factored_rms(), _clip_rms(1.0)))
    if not settings.b1:
        return second
    return optax.chain(second, optax.ema(settings.b1, accumulator_dtype=mu_dtype(settings)))


def _clip_rms(bound: float) -> optax.GradientTransformation:
    """Bound the root mean square of an update, each layer's matrix by itself."""

    def clip(u):
        rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=tuple(range(max(0, u.ndim - 2), u.ndim))))
        return u / jnp.maximum(1.0, rms / bound).reshape(rms.shape + (1,) * (u.ndim - rms.ndim))

    return optax.stateless_with_tree_map(lambda u, _: clip(u))


def _muon(settings: OptimSettings) -> optax.GradientTransformation:
    """Muon (Jordan 2024) on the matrices of the layers, AdamW on everything else.

    Updates are scaled by 0.2 sqrt(max(in, out)), which gives them the size of AdamW's (Liu et al.
    2025). The matrices of all layers are made orthogonal at once, in float32: count on several
    times the largest stacked kernel.
    """
    kind = mu_dtype(settings)

    def scale(u):
        return u * (0.2 * math.sqrt(max(u.shape[-2:])))

    orthogonal = optax.contrib.scale_by_muon(
        beta=settings.b1,
        mu_dtype=kind,
        weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), tree
        ),
    )
    core = optax.partition(
        {
            "muon": optax.chain(orthogonal, optax.stateless_with_tree_map(lambda u, _: scale(u))),
            "adam": optax.scale_by_adam(settings.b1, settings.b2, settings.eps, mu_dtype=kind),
        },
        lambda params: matrices.map_layouts(_muon_or_adam, params),
    )
    return matrices.on_matrices(core)


def _muon_or_adam(name: str, layout: matrices.Layout | None) -> str:
    return "muon" if layout is not None and layout.layers and decays(name) else "adam"


CORES = {"adamw": _adamw, "adafactor": _adafactor, "lion": _lion, "muon": _muon}
