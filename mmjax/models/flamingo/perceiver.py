"""The Perceiver resampler: any number of visual tokens to a fixed number (Alayrac et al. 2022)."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mmjax.models.work import Work
from mmjax.nn.cross_attention import CrossAttention
from mmjax.nn.linear import DTypes, LoRA
from mmjax.nn.mlp import MLP
from mmjax.nn.norm import LayerNorm
from mmjax.nn.stack import scan, stack
from mmjax.parallel.sharding import constrain
from mmjax.types import MMJaxError


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of a resampler; the defaults are OpenFlamingo's.

    d_model: width of the visual tokens and of the latents. ff_mult: width of the MLP over d_model.
    max_media, max_frames: how many media of a sample, or frames of a medium, have an embedding of
    their own; None for no such embedding, as in every published OpenFlamingo.
    """

    d_model: int = 1024
    num_layers: int = 6
    num_heads: int = 8
    head_dim: int = 64
    num_latents: int = 64
    ff_mult: int = 4
    max_media: int | None = None
    max_frames: int | None = None
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def work(self, media: int, tokens: int) -> Work:
        """Return the work for so many media, of so many visual tokens each in all its frames."""
        n, keys, inner = self.num_latents, tokens + self.num_latents, self.num_heads * self.head_dim
        maps = 2 * self.d_model * (inner * (n + keys) + self.ff_mult * self.d_model * n)
        runs = 2.0 * media * self.num_layers
        return Work({"perceiver.*": runs * maps}, runs * 2 * inner * keys * n)


class PerceiverLayer(nnx.Module):
    """Latents attend to the media and to themselves, then an MLP; both pre-norm and residual."""

    def __init__(
        self, c: PerceiverConfig, *, dtypes: DTypes, lora: LoRA | None, attention: str,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        shared = dict(dtypes=dtypes, init_std=c.init_std, lora=lora, rngs=rngs, prefix="perceiver.")
        norm = partial(LayerNorm, c.d_model, eps=c.norm_eps, dtypes=dtypes)
        self.media_norm, self.latent_norm, self.mlp_norm = norm(), norm(), norm()
        self.attn = CrossAttention(
            c.d_model, c.d_model, c.num_heads, c.head_dim, implementation=attention, **shared
        )
        self.mlp = MLP(c.d_model, c.ff_mult * c.d_model, activation="gelu", bias=False, **shared)

    def __call__(self, latents: Array, media: Array) -> Array:
        """Map latents [b, n, d], which see media [b, s, d], to [b, n, d]."""
        normed = self.latent_norm(latents)
        keys = jnp.concatenate([self.media_norm(media), normed], axis=1)
        out = self.attn(normed, *self.attn.keys_values(keys))
        latents = checkpoint_name(constrain(latents + out, "batch", None, "embed"), "attn_sum")
        return constrain(latents + self.mlp(self.mlp_norm(latents)), "batch", None, "embed")


class Perceiver(nnx.Module):
    """Learned latents that read the tokens of one medium at a time."""

    def __init__(
        self,
        config: PerceiverConfig,
        *,
        rngs: nnx.Rngs,
        dtypes: DTypes = DTypes(),  # noqa: B008
        lora: LoRA | None = None,
        remat: str = "names",
        scan_unroll: int = 1,
        attention: str = "auto",
    ):
        c = self.config = config
        self.remat, self.scan_unroll, self.dtype = remat, scan_unroll, dtypes.compute

        def table(*shape: int) -> nnx.Param:
            value = jax.random.normal(rngs.params(), (*shape, c.d_model), jnp.dtype(dtypes.param))
            return nnx.Param(value, out_sharding=(*(None,) * len(shape), "embed"))

        self.latents = table(c.num_latents)
        self.frame_embed = None if c.max_frames is None else table(c.max_frames)
        self.media_embed = None if c.max_media is None else table(c.max_media, 1)
        make = partial(_make_layer, c, dtypes, lora, attention)
        self.layers = stack(make, c.num_layers, rngs)
        self.final_norm = LayerNorm(c.d_model, eps=c.norm_eps, dtypes=dtypes)

    def __call__(self, media: Array, places: Array | None = None) -> Array:
        """Map the tokens of all media, [b, m, f, v, d], to [b, m, n, d].

        f: frames of a medium; v: tokens of a frame; n: latents. places: int32[b, m], each medium's
        number within its sample, which chooses its embedding; None where a row is one sample. A
        row may hold more media than have embeddings, a sample not: its processor refuses it. Raises
        MMJaxError for more frames than have embeddings.
        """
        c, (b, m, f, v, d) = self.config, media.shape
        if c.max_frames is not None and f > c.max_frames:
            raise MMJaxError(
                f"the perceiver has embeddings of {c.max_frames} frames and was given {f}; give "
                f"at most {c.max_frames}, or set max_frames to None"
            )
        media = media.astype(self.dtype)
        if self.frame_embed is not None:
            media += self.frame_embed[:f][:, None].astype(self.dtype)
        media = media.reshape(b, m, f * v, d)
        if self.media_embed is not None:
            places = jnp.arange(m)[None] if places is None else places
            # Padding has places behind the last embedding, and no token sees it.
            own = jnp.take(self.media_embed[...], places, axis=0, mode="clip")
            media += own.astype(self.dtype)
        media = constrain(media.reshape(b * m, f * v, d), "batch", None, "embed")
        latents = jnp.broadcast_to(self.latents[...].astype(self.dtype), (b * m, c.num_latents, d))
        latents = scan(
            self.layers,
            c.num_layers,
            lambda layer, x, _: layer(x, media),
            constrain(latents, "batch", None, "embed"),
            remat=self.remat,
            unroll=self.scan_unroll,
        )
        return self.final_norm(latents).reshape(b, m, c.num_latents, d)


def _make_layer(
    c: PerceiverConfig, dtypes: DTypes, lora: LoRA | None, attention: str, rngs: nnx.Rngs
) -> PerceiverLayer:
    return PerceiverLayer(c, dtypes=dtypes, lora=lora, attention=attention, rngs=rngs)
