"""What a CLIP sees in a picture, as one direction: pictures that are alike point the same way."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mmjax.models import vit_tables
from mmjax.models.json_files import read_json
from mmjax.models.square_images import SquareImages, read_image_file
from mmjax.models.towers import open_tower, read_vision_config
from mmjax.models.vit import ViT, ViTConfig, normalized
from mmjax.nn import paths
from mmjax.nn.linear import DTypes, Linear
from mmjax.parallel.mesh import make_mesh, use
from mmjax.types import MMJaxError
from mmjax.weights.load import load_params
from mmjax.weights.operations import transpose
from mmjax.weights.reader import Overlay, Reader, Renamed, open_reader
from mmjax.weights.rules import Rule

_PROJECTION = "projection.kernel"
_PROJECTIONS = re.compile(r"(^|(^|\.)visual\.)proj$|(^|\.)visual_projection\.weight$")


class Directions(nnx.Module):
    """The visual half of a CLIP (Radford et al. 2021): its class token, normed and projected."""

    def __init__(self, config: ViTConfig, width: int, *, rngs: nnx.Rngs):
        dtypes = DTypes()
        self.vision = ViT(config, rngs=rngs, dtypes=dtypes)
        self.projection = Linear(
            (config.d_model,), (width,), ("embed", "norm"), name="projection", bias=False,
            dtypes=dtypes, init_std=config.init_std, rngs=rngs,
        )  # fmt: skip

    def __call__(self, images: Array) -> Array:
        """Map normalised images [b, H, W, c] to float32[b, e], each of length 1."""
        x = self.projection(self.vision.final_norm(self.vision.tokens(images)[:, 0]))
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """The visual half of a CLIP with its weights, float32 on one device of this process.

    images: how a picture is brought to the tower's square. fingerprint: equal for equal weights
    and settings.
    """

    images: SquareImages
    parts: tuple[nnx.GraphDef, nnx.State]
    mesh: jax.sharding.Mesh
    fingerprint: str

    def __call__(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Map pictures of ``images.pixels``, [H, W, 3] each, to float32[b, e], of length 1."""
        levels = np.stack(self.images.alike(pixels))
        graphdef, params = self.parts
        mean, std = self.images.image_mean, self.images.image_std
        with use(self.mesh):
            return np.asarray(_directions(graphdef, mean, std, params, levels))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _directions(
    graphdef: nnx.GraphDef, mean: tuple, std: tuple, params: nnx.State, levels: Array
) -> Array:
    return nnx.merge(graphdef, params)(normalized(levels, mean, std))


@dataclasses.dataclass(frozen=True)
class Clip:
    """The visual half of a CLIP in its files; its numbers are on disk."""

    reader: Reader
    rules: tuple[Rule, ...]
    config: ViTConfig
    width: int
    images: SquareImages

    def load(self) -> ImageEncoder:
        """Read the weights. Raises MMJaxError unless the files hold all of them."""
        mesh = make_mesh({}, jax.local_devices()[:1])
        with use(mesh):
            made = nnx.eval_shape(lambda: Directions(self.config, self.width, rngs=nnx.Rngs(0)))
            graphdef, abstract = nnx.split(made)
            params = load_params(self.reader, self.rules, paths.flatten(abstract))
        facts = repr((self.config, self.images)).encode()
        kernel = np.asarray(params[_PROJECTION]).tobytes()
        fingerprint = hashlib.sha256(facts + kernel).hexdigest()
        return ImageEncoder(
            self.images, (graphdef, paths.replace(abstract, params)), mesh, fingerprint
        )


def open_clip(path: str | os.PathLike, *, asked: str | None = None) -> Clip:
    """Open a CLIP in any of the files and folders of ``towers.open_tower``; reads no weights.

    asked: a published name or a JSON file, for what no tensor tells. Raises MMJaxError for another
    tower than CLIP's, and where the files lack its projection.
    """
    tower = open_tower(path, asked=asked)
    if tower.layout not in ("hf_clip", "open_clip"):
        raise MMJaxError(
            f"{path}: holds a {tower.config['model_type']}; pictures are compared by a CLIP, such "
            "as OpenAI's ViT-L-14"
        )
    config = read_vision_config(tower.config)
    reader, rule, width = _projection(path)
    rules = (*vit_tables.table(tower.layout, ""), rule)
    images = _images(path, config.image_size)
    return Clip(Overlay(tower.reader, reader), rules, config, width, images)


def _projection(path: str | os.PathLike) -> tuple[Reader, Rule, int]:
    """Find the map into the space shared with texts; its reader, its rule, that space's width."""
    whole = open_reader(Path(path))
    for key in whole.keys():  # noqa: SIM118
        shape = whole.shape(key)
        if len(shape) != 2 or not _PROJECTIONS.search(key):
            continue
        reader = Renamed(whole, lambda other, key=key: key if other == key else None)
        if key.endswith(".weight"):  # of transformers, [e, d]
            return reader, Rule(_PROJECTION, key, transpose), shape[0]
        return reader, Rule(_PROJECTION, key), shape[1]
    raise MMJaxError(
        f"{path}: lacks visual.proj, as open_clip names it, or visual_projection.weight, as "
        "transformers does: it holds a tower alone, and pictures are compared in the space of a "
        "whole CLIP; give one"
    )


def _images(path: str | os.PathLike, image_size: int) -> SquareImages:
    """Return how pictures become a CLIP's squares: as its folder says, else as OpenAI's does."""
    if not Path(path).is_dir():
        return SquareImages(image_size)
    said = read_image_file(path)
    if said is not None:
        images = SquareImages.from_hf(said)
        if images.image_size != image_size:
            raise MMJaxError(
                f"{path}: preprocessor_config.json makes pictures of {images.image_size} pixels "
                f"and the tower takes {image_size}; correct crop_size there"
            )
        return images
    said = (read_json(Path(path), "open_clip_config.json") or {}).get("preprocess_cfg") or {}
    return SquareImages(image_size, **_open_clip_settings(said))


def _open_clip_settings(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an open_clip ``preprocess_cfg``."""
    how = said.get("interpolation", "bicubic"), said.get("resize_mode", "shortest")
    if how != ("bicubic", "shortest"):
        raise MMJaxError(
            f"open_clip_config.json has interpolation {how[0]!r} and resize_mode {how[1]!r}; only "
            "'bicubic' and 'shortest' are supported"
        )
    named = {"image_mean": "mean", "image_std": "std"}
    return {ours: tuple(said[theirs]) for ours, theirs in named.items() if said.get(theirs)}
