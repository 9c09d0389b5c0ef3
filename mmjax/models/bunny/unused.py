"""Tensors that Bunny's loader asks for and its model never looks at.

The loader takes a tower out of a checkpoint where ``unfreeze_vision_tower`` is set, else the one
that config.json names, trained or not; and takes it only whole (bunny/model/builder.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmjax.models.bunny.assemble import FEATURE_LAYER, tower_layout, tower_root
from mmjax.models.vit import ViTConfig
from mmjax.weights.operations import Shape
from mmjax.weights.rules import Tensor

EVA_OUT = 768  # of EVA02_CLIP_L's projection


def completed(config: Any, dtype: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Return what makes the tower of an export whole for the peer, and what config.json then says.

    The pooling head of SigLIP and the projection of EVA are zeros, EVA's angles as they are. A
    tower without its last layer, as in the first release, cannot be made whole: nothing, then.
    """
    vision, layout = config.vision, tower_layout(config.vision)
    if vision.feature_layer != FEATURE_LAYER:
        return [], {}
    shapes: dict[str, Shape] = {}
    if layout == "hf_siglip":
        shapes = _pooling_head(vision.d_model, vision.d_mlp)
    elif layout == "eva":
        shapes = {"head.weight": (EVA_OUT, vision.d_model), "head.bias": (EVA_OUT,)}
    dtype = np.dtype(dtype)
    tensors = {key: np.zeros(shape, dtype) for key, shape in shapes.items()}
    tensors |= _angles(vision, dtype) if layout == "eva" else {}
    root = tower_root(layout)
    made = [Tensor(root + k, x.shape, x.dtype, lambda x=x: x) for k, x in tensors.items()]
    return made, {"unfreeze_vision_tower": True}


def _pooling_head(d: int, f: int) -> dict[str, Shape]:
    """Return the shapes of a SigLIP's attention pooling, by key."""
    return {
        "head.probe": (1, 1, d),
        "head.attention.in_proj_weight": (3 * d, d),
        "head.attention.in_proj_bias": (3 * d,),
        "head.attention.out_proj.weight": (d, d),
        "head.attention.out_proj.bias": (d,),
        "head.layernorm.weight": (d,),
        "head.layernorm.bias": (d,),
        "head.mlp.fc1.weight": (f, d),
        "head.mlp.fc1.bias": (f,),
        "head.mlp.fc2.weight": (d, f),
        "head.mlp.fc2.bias": (d,),
    }


def _angles(vision: ViTConfig, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Return EVA's cosines and sines [p, h] of the patches, of the tower and of each layer."""
    pair = (np.repeat(np.asarray(x)[0], 2, axis=-1).astype(dtype) for x in vision.angles())
    tables = dict(zip(("rope.freqs_cos", "rope.freqs_sin"), pair, strict=True))
    places = ("", *(f"blocks.{i}.attn." for i in range(vision.num_layers)))
    return {place + name: table for place in places for name, table in tables.items()}
