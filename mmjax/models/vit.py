"""The one vision transformer of mmjax. A Config tells which tower it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.models.work import Work
from mmjax.nn import rope
from mmjax.nn.attention import Context
from mmjax.nn.layer import Layer, LayerConfig
from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.nn.norm import make_norm
from mmjax.nn.stack import scan, stack
from mmjax.parallel.sharding import constrain
from mmjax.types import MMJaxError

_ROPE_THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class ViTConfig(LayerConfig):
    """Sizes and switches of a vision tower; the defaults are OpenAI's CLIP ViT-L/14.

    image_size, patch_size in pixels; what a last whole patch leaves over at the right and bottom is
    not seen. class_token: a learned token before the patches, which ``tokens`` alone returns.
    position: a learned table, or none. rope_grid: patches turn by rows and columns as well, counted
    as on a grid of so many a side (EVA-02); None: they do not. pre_norm: a norm before the first
    layer. patch_bias: of the patch map. feature_layer: the layer whose output is returned, counted
    from the end as -1. final_norm: ``applied`` to that output; or ``kept``: files carry it,
    features are taken before it; or ``none``.
    """

    d_model: int = 1024
    num_heads: int = 16
    num_kv_heads: int = 16
    d_mlp: int = 4096
    activation: str = "quick_gelu"
    qk_norm: Literal["none", "head", "model"] = "none"
    num_layers: int = 24
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    class_token: bool = True
    position: Literal["learned", "none"] = "learned"
    rope_grid: int | None = None
    pre_norm: bool = True
    patch_bias: bool = False
    feature_layer: int = -1
    final_norm: Literal["none", "kept", "applied"] = "kept"

    def __post_init__(self) -> None:
        """Raise MMJaxError for sizes that no tower has."""
        layer = self.feature_layer
        if not isinstance(layer, int) or not -self.num_layers <= layer <= -1:
            raise MMJaxError(
                f"feature_layer is {layer!r}, and the tower has {self.num_layers} "
                f"layers; set it to -1 for the last, down to {-self.num_layers} for the first"
            )
        if self.patch_size > self.image_size:
            raise MMJaxError(
                f"patch_size {self.patch_size} is above image_size {self.image_size}; lower it"
            )
        if self.rope_grid is not None and self.head_dim % 4:
            raise MMJaxError(
                f"num_attention_heads {self.num_heads} of a tower {self.d_model} wide makes heads "
                f"of {self.head_dim}, and one that turns them by rows and columns (EVA-02) has "
                "heads of a multiple of 4; state the heads that it was trained with"
            )

    @property
    def num_patches(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def layers_run(self) -> int:
        """How many layers the features pass."""
        return self.num_layers + 1 + self.feature_layer

    def angles(self) -> tuple[Array, Array]:
        """Return cos and sin, float32[1, p, h / 2], by which the patches of an image turn."""
        side = self.image_size // self.patch_size
        return rope.grid_angles(side, self.rope_grid, self.head_dim, _ROPE_THETA)

    def work(self, images: int = 1) -> Work:
        """Return the work of a forward pass of so many images."""
        tokens = images * (self.num_patches + self.class_token)
        weights = self.layers_run * (self.key_side_weights + self.query_side_weights)
        patch = self.patch_size**2 * self.num_channels * self.d_model
        seen = self.layers_run * tokens * (self.num_patches + self.class_token)
        return Work(
            {"vision.*": 2.0 * (tokens * weights + images * self.num_patches * patch)},
            4.0 * self.num_heads * self.head_dim * seen,
        )


class ViT(nnx.Module):
    """A patch projection, learned positions and pre-norm layers (Dosovitskiy et al. 2021).

    Its linear maps are ``vision.embed``, ``vision.attn.q`` and so on in ``LoRA.targets``.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        rngs: nnx.Rngs,
        dtypes: DTypes = DTypes(),  # noqa: B008
        lora: LoRA | None = None,
        remat: str = "names",
        scan_unroll: int = 1,
        attention: str = "auto",
    ):
        c = self.config = config
        self.remat, self.scan_unroll, self.attention = remat, scan_unroll, attention
        shared = dict(dtypes=dtypes, lora=lora, rngs=rngs)
        # Not flat: a convolution's kernel lies channels first, and is read through a view.
        pixels = (c.patch_size, c.patch_size, c.num_channels)
        axes = ("patch", "patch", "patch", "embed")
        self.embed = Linear(
            pixels, (c.d_model,), axes, name="vision.embed", bias=c.patch_bias,
            init_std=c.init_std, **shared,
        )  # fmt: skip

        def table(*shape: int, axes: tuple[str | None, ...]) -> nnx.Param:
            normal = jax.nn.initializers.normal(c.init_std)
            value = normal(rngs.params(), (*shape, c.d_model), jnp.dtype(dtypes.param))
            return nnx.Param(value, out_sharding=axes)

        rows = c.num_patches + c.class_token
        self.class_token = table(axes=("norm",)) if c.class_token else None
        self.positions = table(rows, axes=(None, "embed")) if c.position == "learned" else None
        self.pre_norm = make_norm(c, dtypes=dtypes) if c.pre_norm else None
        make = partial(_make_layer, c, dtypes, lora)
        self.layers = stack(make, c.num_layers, rngs)
        self.final_norm = None if c.final_norm == "none" else make_norm(c, dtypes=dtypes)

    def __call__(self, images: Array) -> Array:
        """Map normalised images [b, H, W, c] to the tokens of their patches, [b, p, d].

        Raises ValueError for an image of another size than the config's.
        """
        c = self.config
        x = self.tokens(images)
        if c.class_token:
            x = x[:, 1:]
        return self.final_norm(x) if c.final_norm == "applied" else x

    def tokens(self, images: Array) -> Array:
        """Map normalised images [b, H, W, c] to all tokens, [b, 1 + p, d], the class token first.

        Without a class token [b, p, d]. They are those of the layer asked for, before the final
        norm. Raises ValueError as a call does.
        """
        c = self.config
        x = self.embed(patches_of(images, c))
        if self.class_token is not None:
            first = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (len(x), 1, c.d_model))
            x = jnp.concatenate([first, x], axis=1)
        if self.positions is not None:
            x = x + self.positions[...].astype(x.dtype)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        cos, sin = self._angles()
        context = Context(cos=cos, sin=sin, causal=False, implementation=self.attention)
        return scan(
            self.layers,
            c.layers_run,
            lambda layer, x, i: layer(x, context, i),
            constrain(x, "batch", "length", "embed"),
            remat=self.remat,
            unroll=self.scan_unroll,
        )

    def _angles(self) -> tuple[Array | None, Array | None]:
        """Return cos and sin, float32[1, t, h / 2], of all tokens; a class token stays."""
        c = self.config
        if c.rope_grid is None:
            return None, None
        cos, sin = c.angles()
        stays = ((0, 0), (int(c.class_token), 0), (0, 0))
        return jnp.pad(cos, stays, constant_values=1.0), jnp.pad(sin, stays)


def normalized(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Turn uint8 RGB [..., 3] into float32 (x / 255 - mean) / std; leave floats as they are."""
    if images.dtype != jnp.uint8:
        return images
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def patches_of(images: Array, c: ViTConfig) -> Array:
    """Cut images [b, H, W, c] into patches [b, p, row, column, c], row by row."""
    b, size, ps = images.shape[0], c.image_size, c.patch_size
    if images.shape[1:] != (size, size, c.num_channels):
        raise ValueError(
            f"the vision tower was given images of shape {images.shape}; resize them to "
            f"[b, {size}, {size}, {c.num_channels}]"
        )
    side = size // ps
    grid = images[:, : side * ps, : side * ps].reshape(b, side, ps, side, ps, c.num_channels)
    return grid.swapaxes(2, 3).reshape(b, c.num_patches, ps, ps, c.num_channels)


def _make_layer(c: ViTConfig, dtypes: DTypes, lora: LoRA | None, rngs: nnx.Rngs) -> Layer:
    return Layer(c, dtypes=dtypes, lora=lora, rngs=rngs, prefix="vision.")
