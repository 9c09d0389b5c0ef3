"""Fuyu: image patches projected straight into a causal decoder (Adept 2023), and OtterHD."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.models.causal import CausalModel
from mmjax.models.decoder import Decoder, DecoderConfig
from mmjax.models.language.architecture import check_rotation, rope_kind, stated_token
from mmjax.models.stated_sizes import check_sizes, head_width
from mmjax.models.undone import tell_undone
from mmjax.models.work import Work
from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.nn.mlp import check_activation
from mmjax.parallel.sharding import constrain
from mmjax.types import Batch, MMJaxError


@dataclasses.dataclass(frozen=True)
class FuyuConfig:
    """A Fuyu model; the defaults are Fuyu-8B.

    patch_size in pixels. image_mean, image_std act on grey levels divided by 255.
    """

    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    patch_size: int = 30
    num_channels: int = 3
    image_token_id: int = 71_011
    bos_token_id: int = 1
    eos_token_id: int = 71_013
    pad_token_id: int = 0
    image_mean: float = 0.5
    image_std: float = 0.5

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: rows x columns x channels."""
        return self.patch_size**2 * self.num_channels

    @property
    def vocab_size(self) -> int:
        """Token ids the model knows."""
        return self.decoder.vocab_size

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The token that ends an answer."""
        return (self.eos_token_id,)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> FuyuConfig:
        """Read any published variant of Fuyu's config.json.

        Hub files are flat, some with a stub ``text_config``; transformers 5 nests the decoder's
        sizes there. A stub makes transformers fall back to a rotary theta of 10000, which is wrong
        for every published Fuyu: here theta is 25000 unless the file states another. Saved again,
        a stub comes back filled with that 10000 and an end token of 2: theta and token ids at the
        top of the file, where they are the model's own, win over the nested ones.
        """
        if hf.get("model_type") not in (None, "fuyu"):
            raise MMJaxError(
                f"config.json says model_type {hf['model_type']!r}; a Fuyu model says 'fuyu'"
            )
        check_sizes(hf, "config.json of a Fuyu")
        nested = hf.get("text_config") or {}
        told = {key: value for key, value in nested.items() if value is not None}
        check_sizes({**hf, **told}, "config.json of a Fuyu")
        base = DecoderConfig()

        def pick(key, default):
            stated = (place.get(key) for place in (nested, hf))
            return next((value for value in stated if value is not None), default)

        new, old = (pick(key, None) or {} for key in ("rope_parameters", "rope_scaling"))
        rope = {**new, **old}
        if (kind := rope_kind(old or new)) != "default":
            raise MMJaxError(
                f"config.json of a Fuyu says rope_type {kind!r}; supported is 'default'. Give a "
                "model of the shorter context, if there is one"
            )
        part = rope.get("partial_rotary_factor")
        part = pick("partial_rotary_factor", base.rope_fraction) if part is None else part
        activation = pick("hidden_act", base.activation)
        check_activation(activation, "config.json of a Fuyu")
        heads = pick("num_attention_heads", base.num_heads)
        d_model = pick("hidden_size", base.d_model)
        if (own := pick("head_dim", d_model // heads)) != d_model // heads:
            raise MMJaxError(
                f"config.json of a Fuyu says head_dim {own}; supported is hidden_size over "
                f"num_attention_heads, {d_model // heads}"
            )
        decoder = DecoderConfig(
            vocab_size=pick("vocab_size", base.vocab_size),
            d_model=d_model,
            num_layers=pick("num_hidden_layers", base.num_layers),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_width(d_model, heads),
            d_mlp=pick("intermediate_size", base.d_mlp),
            activation=activation,
            norm_eps=pick("layer_norm_eps", base.norm_eps),
            qk_norm="head" if pick("qk_layernorm", True) else "none",
            rope_theta=float(_theta(hf, nested, rope, base.rope_theta)),
            rope_fraction=part,
            max_positions=pick("max_position_embeddings", base.max_positions),
            init_std=pick("initializer_range", base.init_std),
            tied=bool(hf.get("tie_word_embeddings")),  # transformers reads it at the top alone
            residual_dropout=float(pick("hidden_dropout", 0.0)),
            residual_dropout_on="mlp",
        )
        check_rotation(decoder, "fuyu")
        tell_undone({**hf, **nested, "model_type": "fuyu"})
        plain = ("patch_size", "num_channels", "image_token_id")
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        known = {key: hf[key] for key in plain if hf.get(key) is not None}
        first = {key: nested.get(key) if hf.get(key) is None else hf[key] for key in ids}
        own = {key: stated_token(value) for key, value in first.items()}
        known |= {key: value for key, value in own.items() if value is not None}
        return cls(decoder=decoder, **known)

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that the hub's flat readers and transformers 5 both read right."""
        c = self.decoder
        sizes = {
            "vocab_size": c.vocab_size,
            "hidden_size": c.d_model,
            "intermediate_size": c.d_mlp,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "max_position_embeddings": c.max_positions,
            "hidden_act": c.activation,
            "layer_norm_eps": c.norm_eps,
            "qk_layernorm": c.qk_norm == "head",
            "initializer_range": c.init_std,
            "rope_theta": c.rope_theta,
            "partial_rotary_factor": c.rope_fraction,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": c.rope_theta,
                "partial_rotary_factor": c.rope_fraction,
            },
            "hidden_dropout": self.decoder.residual_dropout,
            "attention_dropout": 0.0,
            "tie_word_embeddings": c.tied,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }
        return {
            "architectures": ["FuyuForCausalLM"],
            "model_type": "fuyu",
            "image_token_id": self.image_token_id,
            "patch_size": self.patch_size,
            "num_channels": self.num_channels,
            **sizes,
            "text_config": {"model_type": "persimmon", **sizes},
        }

    def work(
        self, tokens: int, *, asked: float = 1.0, visual: int = 0, width: int = 0
    ) -> tuple[Work, ...]:
        """Return the work of a row, of whose tokens some are patches."""
        patches = Work({"patch_embed.*": 2.0 * visual * width * self.decoder.d_model})
        return (patches, *self.decoder.work(tokens, asked=asked))


def _theta(hf: dict, nested: dict, rope: dict, default: float) -> float:
    for place in (hf, hf.get("rope_parameters") or {}, rope, nested):
        if place.get("rope_theta") is not None:
            return place["rope_theta"]
    return default


class Fuyu(CausalModel):
    """A patch projection and a decoder: no vision encoder, no image positions, any image size."""

    def __init__(
        self,
        config: FuyuConfig,
        *,
        rngs: nnx.Rngs,
        dtypes: DTypes = DTypes(),  # noqa: B008
        lora: LoRA | None = None,
        remat: str = "names",
        scan_unroll: int = 1,
        attention: str = "auto",
    ):
        self.config = config
        run = dict(remat=remat, scan_unroll=scan_unroll, attention=attention)
        self.decoder = Decoder(config.decoder, dtypes=dtypes, rngs=rngs, lora=lora, **run)
        self.patch_embed = Linear(
            (config.patch_dim,),
            (config.decoder.d_model,),
            ("patch", "embed"),
            name="patch_embed",
            bias=True,
            dtypes=dtypes,
            init_std=config.decoder.init_std,
            lora=lora,
            rngs=rngs,
        )

    def embed(self, batch: Batch) -> Array:
        """Return the embedded stream [b, t, d]: a patch where ``visual_index`` points at one.

        tokens, visual_index: int32[b, t]; patches: [b, p, pixels], uint8 grey levels or floats
        that are already normalised. Without ``patches`` the stream is text.
        """
        x = self.decoder.embed(batch["tokens"])
        patches = batch.get("patches")
        if patches is None or patches.shape[1] == 0:
            return x
        visual = constrain(self.patch_embed(self.normalize(patches)), "batch", None, "embed")
        index = batch["visual_index"][..., None]
        # A gather, so that padding is simply never pointed at.
        picked = jnp.take_along_axis(visual, jnp.maximum(index, 0), axis=1)
        return jnp.where(index >= 0, picked, x)

    def normalize(self, patches: Array) -> Array:
        """Turn uint8 grey levels into (x / 255 - mean) / std; leave floats as they are."""
        if patches.dtype != jnp.uint8:
            return patches
        mean, std = self.config.image_mean * 255.0, self.config.image_std * 255.0
        return (patches.astype(jnp.float32) - mean) / std
