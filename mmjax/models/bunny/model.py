"""Bunny: a vision tower, a projector, and a small language model (He et al. 2024)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from mmjax.models.bunny.config import BunnyConfig
from mmjax.models.bunny.projector import Projector
from mmjax.models.bunny.s2 import s2_features
from mmjax.models.causal import CausalModel
from mmjax.models.decoder import Decoder
from mmjax.models.vit import ViT, normalized
from mmjax.nn.linear import DTypes, LoRA
from mmjax.parallel.sharding import constrain
from mmjax.types import Batch, MMJaxError

__all__ = ["Bunny", "BunnyConfig"]


class Bunny(CausalModel):
    """A decoder whose stream holds projected features where images stand."""

    def __init__(
        self,
        config: BunnyConfig,
        *,
        rngs: nnx.Rngs,
        dtypes: DTypes = DTypes(),  # noqa: B008
        lora: LoRA | None = None,
        remat: str = "names",
        scan_unroll: int = 1,
        attention: str = "auto",
    ):
        self.config = config
        shared = dict(dtypes=dtypes, lora=lora, rngs=rngs)
        run = dict(remat=remat, scan_unroll=scan_unroll, attention=attention)
        self.vision = ViT(config.vision, **shared, **run)
        self.projector = Projector(config.projector, **shared)
        self.decoder = Decoder(config.decoder, **shared, **run)

    def features(self, images: Array) -> Array:
        """Map images [m, H, W, 3] to the tokens [m, n, d] that stand for them.

        images: uint8 grey levels, or floats that are already normalised.
        """
        c = self.config
        images = normalized(images, c.image_mean, c.image_std)
        if c.s2_scales is None:
            features = self.vision(images)
        else:
            features = s2_features(self.vision, images, c.s2_scales, c.vision.image_size)
        return self.projector(features)

    def embed(self, batch: Batch) -> Array:
        """Return the embedded stream [b, t, d]: image tokens where ``visual_index`` names one.

        tokens, visual_index: int32[b, t], the row of ``patches`` that a token is a part of, -1 for
        text; patches: [b, m, H * W * 3], a row for each image. The tokens of an image stand one
        behind the other from its first on; where a row was cut, the last of them are gone.
        Without ``patches`` the stream is text.
        """
        x = self.decoder.embed(batch["tokens"])
        rows = batch.get("patches")
        if rows is None or rows.shape[1] == 0:
            return x
        c, (b, m, width) = self.config, rows.shape
        if width != c.patch_dim:
            raise MMJaxError(
                f"an image of {width} numbers is not one of {c.image_size} x {c.image_size} x "
                f"{c.vision.num_channels}; the processor's image_size is not the model's"
            )
        images = rows.reshape(b * m, c.image_size, c.image_size, c.vision.num_channels)
        features = self.features(constrain(images, "batch", None, None, None))
        n = features.shape[1]
        features = constrain(features.reshape(b, m * n, -1), "batch", None, "embed")
        visual = batch["visual_index"]
        shown = visual >= 0
        index = jnp.where(shown, visual * n + place_in_run(visual), 0)
        # A gather, so that padding is simply never pointed at.
        picked = jnp.take_along_axis(features, index[..., None], axis=1)
        return jnp.where(shown[..., None], picked, x)


def place_in_run(values: Array) -> Array:
    """Count from 0 within each run of equal neighbours: int32[b, t] of int32[b, t]."""
    at = jnp.arange(values.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate(
        [jnp.ones_like(values[:, :1], bool), values[:, 1:] != values[:, :-1]], axis=1
    )
    return at - lax.cummax(jnp.where(starts, at, 0), axis=1)
