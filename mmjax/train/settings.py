"""Everything a run can be told: the frozen form of a recipe."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from mmjax.checkpoint import CheckpointSettings
from mmjax.data.grouping import check_group
from mmjax.data.mixture import check_one_given
from mmjax.data.multiturn import Multiturn
from mmjax.data.skips import check_share
from mmjax.nn.cache import DTYPES
from mmjax.train.optim import OptimSettings
from mmjax.train.rows import RowSettings
from mmjax.train.step import BadStepSettings
from mmjax.types import MMJaxError


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which model, and where its weights come from.

    family: a name in ``mmjax.models.registry``. init: a model folder in any layout that
    ``mmjax.load`` reads. parts: what ``init`` leaves out, ``{"lm": DIR, "vision": FILE_OR_DIR}``;
    see ``mmjax.models.parts.Parts``. With parts and no ``init``, what stands between them starts
    from random weights; with neither, everything does. fresh: glob patterns of parameters that
    start so though ``init`` or a part has them, such as ``("projector.*",)`` for another projector.
    config: values that replace those of the family's config.json (of an object in it, such as
    ``vision_config``, those that are named), or make one where there is none.
    plan_config: such values to plan with (``--plan``) while ``init`` or a part is not there; a run
    never looks at them. words: texts whose words make a small tokenizer, for random starts.
    param_dtype: of trained parameters, but adapters are float32 whatever it says; frozen_dtype: of
    the others, with int8 or nf4 their kernels in 8 or 4.5 bits a weight (see ``mmjax.nn.int8`` and
    ``nf4``) and all else in bfloat16.
    quantize: glob patterns of the parameters whose frozen kernels int8 and nf4 are for, such as
    ``("decoder.*",)``; the others are in bfloat16. dtype: of the computation; neither of the two
    that train may be float16, for no loss is scaled.
    processor: settings that replace those of the folder, such as ``max_height``.
    remat: a policy of ``mmjax.nn.stack``: off, names, dots or full. scan_unroll: layers that one
    iteration of the scan over them does; XLA may then overlap the end of one with the start of the
    next, and compiles as many times longer; of all layers no loop is left, and XLA may keep what
    ``remat`` would compute again. attention: which implementation runs, a name in
    ``mmjax.ops.attention.IMPLEMENTATIONS``: auto, or one for all calls (``cudnn`` cannot do a
    decoder's in training, ``mosaic`` is for Hopper GPUs and jax 0.11 or newer).
    residual_dropout, embedding_dropout: shares of what attention and MLP add to the stream, and of
    the embedded stream, that the decoder drops in training; None for what config.json says. Of
    StableLM and Fuyu the first is of the MLP alone, as in their own code.
    """

    family: str = "fuyu"
    init: str | None = None
    parts: dict[str, str] = dataclasses.field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    plan_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    words: tuple[str, ...] = ()
    processor: dict[str, Any] = dataclasses.field(default_factory=dict)
    param_dtype: str = "float32"
    frozen_dtype: str = "bfloat16"
    quantize: tuple[str, ...] = ("*",)
    dtype: str = "bfloat16"
    remat: str = "names"
    scan_unroll: int = 1
    attention: str = "auto"
    residual_dropout: float | None = None
    embedding_dropout: float | None = None


@dataclasses.dataclass(frozen=True)
class LoRASettings:
    """Low-rank adapters instead of full training when ``rank`` is above 0.

    alpha: the update is scaled by alpha / rank, with ``rslora`` by alpha / sqrt(rank). dropout: on
    the adapters' inputs, in training alone. targets: glob patterns on the names of linear maps:
    attn.q, attn.k, attn.v, attn.o, mlp.up, mlp.down, head, patch_embed; ``*`` is all of them.
    A part that is no decoder stands in front: ``cross.attn.q``, ``perceiver.mlp.up``,
    ``vision.attn.*``; ``attn.*`` means the decoder's alone.
    init: adapters to go on from: a PEFT folder, a model folder with adapters, or a workdir. Where
    more was trained with them, ``model.init`` takes both from the earlier run's ``model/``.
    tuning_config: a peer's JSON file that says all this, and ``train``, in the peer's names; see
    ``mmjax.train.tuning``.
    """

    rank: int = 0
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attn.*", "mlp.*")
    init: str | None = None
    tuning_config: str | None = None


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What is trained on, and the static shape it is packed into.

    sources: name -> {kind, arguments}; see ``mmjax.data.catalog``. weights: name -> share of the
    draws, ``sqrt`` of the sizes, or ``size`` (the default). counts: name -> draws of it in an
    epoch, -1 for its size, instead of weights. No record of a source is drawn twice before each
    was drawn once. seq_len, max_patches, max_targets: what one row holds.
    batch_size: rows of a step over all devices. resolutions: longest sides in pixels, one drawn
    for each sample, as a set or a range ``{"min": 224, "max": 1024, "multiple": 32}``; None keeps
    every image. template: a name in ``mmjax.data.templates.TEMPLATES``, or one for each source by
    its name. legacy_otter: OtterHD's squashed pictures, labels and stripped symbols, to compare
    with its numbers.
    augment: changes to the pictures, names in ``mmjax.data.augment.AUGMENTS`` in their order, or
    such a list for some sources by name. multiturn: records that follow a record as further turns,
    ``{"turns": 32, "max_images": 16, "max_tokens": 2048}``; see ``mmjax.data.multiturn``.
    max_images: of a record only its first ones are kept. too_long: a sample above ``seq_len`` is
    skipped, or cut on the right as long as a target is left.
    group: with ``pack=False``, ``modality`` makes batches of samples with images or of text alone,
    of similar lengths; see ``mmjax.data.grouping``. lengths: tokens below ``seq_len`` that a
    batch's rows may be cut to when its samples are shorter, each a program of its own.
    workers: processes that read and pack, of each stream.
    streams: packers that share out records and rows; 0 for one a process. Runs with the same
    number see the same rows in every step, however many processes they are.
    max_bad_share: the run fails when more of its samples than this cannot be used.
    loss_weights: source -> w: the loss of a step is then sum w * mean, each mean over the targets
    of its own source, however many there are; without, one mean over all targets.
    """

    sources: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    weights: dict[str, float] | Literal["size", "sqrt"] | None = None
    counts: dict[str, int] | None = None
    template: str | dict[str, str] = "fuyu_chat"
    seq_len: int = 2048
    max_patches: int = 2048
    max_targets: int = 256
    batch_size: int = 8
    resolutions: tuple[int | None, ...] | dict[str, int] | None = None
    legacy_otter: bool = False
    augment: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    multiturn: Multiturn | None = None
    max_images: int | None = None
    too_long: Literal["skip", "truncate"] = "skip"
    pack: bool = True
    group: Literal["modality"] | None = None
    lengths: tuple[int, ...] = ()
    workers: int = 0
    streams: int = 0
    max_bad_share: float = 0.05
    loss_weights: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """What is evaluated, every so many steps on a sample and at the end on everything.

    tasks: see ``mmjax.evals.tasks.Task``; benchmarks go by their names, see docs/evaluation.md.
    every: steps between evaluations, 0 for none while training. limit: records of a task while
    training. template: how tasks are asked, a name in ``mmjax.data.templates.TEMPLATES``; None asks
    as ``data.template`` trains, ``otter_prompt`` for ``otter_chat``. batch_size: prompts at a time.
    num_beams, length_penalty: of a beam search; 1 beam is none. cache_dtype: of keys and values
    while answering, None for that of the computation. final: ask everything when training ends.
    """

    tasks: tuple[dict[str, Any], ...] = ()
    every: int = 0
    limit: int = 256
    template: str | None = None
    batch_size: int = 64
    num_beams: int = 1
    length_penalty: float = 1.0
    cache_dtype: Literal[DTYPES] | None = None
    final: bool = True


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """What a run tells of itself, and where.

    every: steps between log lines. tensorboard: write event files beside metrics.jsonl. wandb: a
    project of Weights & Biases that gets the same, None for none. pictures: steps between pictures
    of a batch as the model sees it, the first at the start, 0 for none. samples: steps between
    samples that are printed and written to ``samples.jsonl``, TensorBoard and W&B: the prompt, its
    targets, and what the model finds likeliest in their places; 0 for none. profile: (start, stop),
    the steps between which a trace is written to the workdir's ``profile/``.
    """

    every: int = 20
    tensorboard: bool = True
    wandb: str | None = None
    pictures: int = 1000
    samples: int = 0
    profile: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """A whole run.

    steps: optimizer steps. accumulate: microbatches of one step. loss_chunk: targets of a device
    whose logits exist at a time, None for 1,024 or what 64 MiB hold (``ops.xent.chunk_rows``).
    train: glob patterns of the parameters that are trained, ``("perceiver.*", "cross.*")``,
    everything else is frozen; beside adapters, those that are trained whole. Without any,
    everything, or the adapters alone. freeze: patterns of parameters that are not trained after
    all. train_rows: tables of the vocabulary of which some rows alone are trained, beside what
    ``train`` names. mesh: devices per axis, one of them -1 for the rest.
    """

    name: str = "run"
    seed: int = 0
    steps: int = 1000
    accumulate: int = 1
    loss_chunk: int | None = None
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    train_rows: tuple[RowSettings, ...] = ()
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"fsdp": -1})
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    lora: LoRASettings = dataclasses.field(default_factory=LoRASettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    optim: OptimSettings = dataclasses.field(default_factory=OptimSettings)
    eval: EvalSettings = dataclasses.field(default_factory=EvalSettings)
    checkpoint: CheckpointSettings = dataclasses.field(default_factory=CheckpointSettings)
    log: LogSettings = dataclasses.field(default_factory=LogSettings)
    bad_steps: BadStepSettings = dataclasses.field(default_factory=BadStepSettings)


_MAY_BE_INFINITE = ("optim.clip_norm", "bad_steps.max_loss")


def check_numbers(settings: RunSettings) -> None:
    """Raise MMJaxError for what cannot work, whatever model and data: before anything is built."""
    data, optim, asked = settings.data, settings.optim, settings.eval
    check_one_given(data.weights, data.counts)
    check_group(data.group, data.pack, data.multiturn)
    check_share(data.max_bad_share)
    least: dict[float, dict[str, float]] = {
        1: {
            "steps": settings.steps, "accumulate": settings.accumulate,
            "data.batch_size": data.batch_size,
            "data.seq_len": data.seq_len, "data.max_targets": data.max_targets,
            "log.every": settings.log.every, "checkpoint.every": settings.checkpoint.every,
            "checkpoint.keep": settings.checkpoint.keep, "eval.limit": asked.limit,
            "eval.batch_size": asked.batch_size,
        },
        0: {
            "seed": settings.seed, "data.max_patches": data.max_patches,
            "data.workers": data.workers, "data.streams": data.streams, "eval.every": asked.every,
            "log.pictures": settings.log.pictures, "log.samples": settings.log.samples,
            "bad_steps.limit": settings.bad_steps.limit,
            "bad_steps.max_loss": settings.bad_steps.max_loss, "optim.lr": optim.lr,
            "optim.warmup": optim.warmup, "optim.final_lr": optim.final_lr,
            "optim.b1": optim.b1, "optim.b2": optim.b2, "optim.eps": optim.eps,
            "optim.weight_decay": optim.weight_decay, "optim.clip_norm": optim.clip_norm,
        },
    }  # fmt: skip
    if settings.loss_chunk is not None:
        least[1]["loss_chunk"] = settings.loss_chunk
    for bound, values in least.items():
        for name, value in values.items():
            if not value >= bound:  # which nan is not
                raise MMJaxError(f"config.{name} is {value}; it must be at least {bound}")
    for name, value in least[0].items():
        if value == math.inf and name not in _MAY_BE_INFINITE:
            raise MMJaxError(f"config.{name} is {value}; give a finite number")
    for name, value, limit in (("seed", settings.seed, 63), ("steps", settings.steps, 31)):
        if value >= 2**limit:
            raise MMJaxError(f"config.{name} is {value}; it must be below 2**{limit}")
    if (window := settings.log.profile) is not None and window[0] >= settings.steps:
        raise MMJaxError(
            f"config.log.profile is {window} and config.steps {settings.steps}: steps count from "
            "0, and no step of this run would be traced; lower its start"
        )
    for name in ("b1", "b2"):
        if (value := getattr(optim, name)) >= 1:
            raise MMJaxError(
                f"config.optim.{name} is {value}; it is the share of a moment that stays in each "
                "step, and must be below 1"
            )
    for name in ("dtype", "param_dtype"):
        if getattr(settings.model, name) == "float16":
            raise MMJaxError(
                f"config.model.{name} is 'float16', which holds nothing below 6e-8: most gradients "
                "would become 0, and no loss is scaled here; set it to 'bfloat16', or 'float32' "
                "(answers can be computed in float16)"
            )
