"""``mmjax.load``: a model folder in any layout, ready to answer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.loaded import LoadedModel
from mmjax.models import opening, pretrained, registry
from mmjax.models.api import Processor
from mmjax.models.companions import stated_ends, stated_generation
from mmjax.models.processor import follow
from mmjax.nn import paths, quantized
from mmjax.nn.linear import DTypes
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import MESH_AXES, check_divides, parameter_shardings
from mmjax.types import MMJaxError
from mmjax.weights.load import Reading

_WHOLE = ("vision.", "projector.")  # what a model sees with is small, and stays unrounded


def load(
    path: str | os.PathLike,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | Mapping[str, int] | None = None,
    *,
    base: str | os.PathLike | None = None,
    weights: str | None = None,
    processor: Mapping[str, Any] | None = None,
    progress: bool = False,
    **parts: str | os.PathLike | None,
) -> LoadedModel:
    """Load a converted folder or a PyTorch checkpoint, ready to answer.

    path: a folder of ``convert_weights.to_jax`` or ``train.py``, a model folder or file in
        any layout the family publishes, or a PEFT adapter; or several files ``a.pt,b.pt`` of one
        model, loaded in order.
    dtype: of weights and computation; default bfloat16 on accelerators, float32 on CPUs, where
        bfloat16 is many times slower.
    mesh: the devices to spread the weights over, default one: how many each axis has, as a recipe's
        ``mesh`` says, such as ``{"fsdp": -1}`` for all; or a mesh of ``parallel.mesh.make_mesh``.
    base: the model folder of an adapter, when its config names none that is there.
    weights: "int8" keeps the kernels of linear maps as int8 with a scale per output channel: half
        of bfloat16's memory, and what decoding reads, for a small loss of precision. "nf4": in 4.5
        bits a weight, see ``mmjax.nn.nf4``; the loss is larger, and decoding no faster. A vision
        tower and a projector stay in ``dtype``, as Bunny's 4-bit training leaves them.
    processor: settings that replace those of the folder, as ``model.processor`` of a run does, such
        as ``{"frames": 16}`` for a video model.
    progress: show on stderr how far the weights are read, those of 256 MiB and more.
    parts: ``lm=``, ``vision=`` and so on, where a file of the trained parts leaves out the
        others; see ``mmjax.models.parts.Parts``.
    Raises MMJaxError for a folder that is missing, half-written, damaged or of no known family, and
    for a mesh that does not divide the model.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    _check_dtype(dtype)
    if weights is not None and weights not in quantized.KINDS:
        known = " or ".join(f'"{kind}"' for kind in quantized.KINDS)
        raise MMJaxError(f"weights is {weights!r}; give {known}, or None to keep them in {dtype}")
    mesh = _mesh(mesh)
    opened = opening.open_pretrained(path, base=base, **parts)
    pretrained.require_trained(opened)
    family = opened.family
    own = first_processor(family, opened).with_options(**(processor or {}))
    config = follow(opened.config, own, processor or {})
    own.check(config)
    with use(mesh):
        dtypes = DTypes(dtype, dtype, kernel=weights, whole=_WHOLE)

        def make() -> nnx.Module:
            return family.Model(config, rngs=nnx.Rngs(0), dtypes=dtypes, lora=opened.lora)

        graphdef, abstract = nnx.split(nnx.eval_shape(make))
        shardings = paths.flatten(parameter_shardings(abstract, mesh))
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            for name, leaf in paths.flatten(abstract).items()
        }
        check_divides(wanted)
        each = None
        if weights is not None:
            wanted, each = quantized.while_loading(abstract, wanted, dtype)
        with _showing(progress) as reading:
            values = pretrained.read_params(opened, wanted, progress=reading, each=each)
        model = nnx.merge(graphdef, paths.replace(abstract, values))
    ends = stated_ends(opened.folders, config.vocab_size)
    noted = dict(generation=stated_generation(opened.folders), template=opened.template)
    return LoadedModel(family.name, config, model, own, mesh, ends, **noted)


def _mesh(given: jax.sharding.Mesh | Mapping[str, int] | None) -> jax.sharding.Mesh:
    """Return the mesh that was given, or made of what was."""
    if given is None:
        return make_mesh({}, jax.local_devices()[:1])
    if isinstance(given, Mapping):
        return make_mesh(given)
    if getattr(given, "axis_names", None) != MESH_AXES:
        raise MMJaxError(
            f"mesh is {given!r}; give the devices of each axis, such as {{'fsdp': -1}}, or a mesh "
            "of mmjax.parallel.mesh.make_mesh"
        )
    return given


def _showing(progress: bool) -> contextlib.AbstractContextManager[Reading | None]:
    if not progress:
        return contextlib.nullcontext()
    from mmjax.monitor.transfer import reading_bar  # not on a bare machine

    return reading_bar("reading the weights", shown=jax.process_index() == 0)


def _check_dtype(dtype: str) -> None:
    try:
        floats = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floats = False
    if not floats:
        raise MMJaxError(f'dtype is {dtype!r}; give "float32", "bfloat16" or "float16"')


def first_processor(family: registry.Family, opened: pretrained.Pretrained) -> Processor:
    """Read a model's processor from the nearest of its folders that has tokenizer files.

    An adapter's folder may hold none: then the base model's serve. Without any, the base's
    config.json still tells the patch size and the ids.
    """
    for folder in opened.folders:
        processor = family.Processor.from_pretrained(folder, **opened.options)
        if processor.tokenizer is not None:
            break
    return processor
