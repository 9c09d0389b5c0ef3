"""The one transformer block of mmjax, for language models and vision towers alike."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from mmjax.nn.attention import Context, SelfAttention
from mmjax.nn.dropout import drop
from mmjax.nn.linear import DTypes, LoRA
from mmjax.nn.mlp import MLP
from mmjax.nn.norm import make_norm
from mmjax.parallel.context import take_on_length
from mmjax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Sizes and switches of a pre-norm block; the defaults are Persimmon-8B's.

    activation: a name in ``mmjax.nn.mlp.ACTIVATIONS``. gated: the MLP is down(act(gate) * up).
    norm: LayerNorm or RMSNorm; norm_bias: whether a LayerNorm has a bias, its query and key norms
    too; norm_plus_one: an RMSNorm multiplies by 1 + scale (Gemma). qk_norm: LayerNorm of queries
    and keys over the dimensions of a ``head`` (Persimmon), or over all heads' together, the
    ``model`` width (MPT-1B), or none. clip_qkv: bound on queries, keys and values (MPT), before any
    norm. residual: ``sequential`` is x + attn(norm(x)), then x + mlp(norm(x)); ``parallel`` is
    x + attn(attn_norm(x)) + mlp(mlp_norm(x)) (GPT-NeoX), and ``shared`` that with one norm for both
    (GPT-J, Phi). residual_scale: multiplies what attention and MLP add to x (MiniCPM).
    residual_dropout: the share of it that is dropped in training (Phi-2), of what the MLP adds
    alone where residual_dropout_on says so (StableLM, Persimmon). qkv_bias, out_bias,
    mlp_bias: of the maps; k_bias: whether that of keys has one too (EVA-02's has none).
    sub_norm: a norm more, before the output map of attention and before the last of the MLP
    (Magneto, Wang et al. 2022). rope_interleaved: rotary positions turn neighbours; see
    ``mmjax.nn.rope``.
    """

    d_model: int = 4096
    num_heads: int = 64
    num_kv_heads: int = 64
    head_dim: int = 64
    d_mlp: int = 16_384
    activation: str = "relu2"
    gated: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_bias: bool = True
    norm_plus_one: bool = False
    norm_eps: float = 1e-5
    qk_norm: Literal["none", "head", "model"] = "head"
    clip_qkv: float | None = None
    residual: Literal["sequential", "parallel", "shared"] = "sequential"
    residual_scale: float = 1.0
    # How a model is trained on, not what it computes: two that differ in it can be averaged.
    residual_dropout: float = dataclasses.field(default=0.0, compare=False)
    residual_dropout_on: Literal["both", "mlp"] = dataclasses.field(default="both", compare=False)
    qkv_bias: bool = True
    k_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    sub_norm: bool = False
    rope_interleaved: bool = False
    init_std: float = 0.02

    @property
    def key_side_weights(self) -> int:
        """Weights of the maps that make keys and values."""
        return 2 * self.d_model * self.head_dim * self.num_kv_heads

    @property
    def query_side_weights(self) -> int:
        """Weights of the maps of queries, of the output and of the MLP."""
        mlp = (3 if self.gated else 2) * self.d_model * self.d_mlp
        return 2 * self.d_model * self.head_dim * self.num_heads + mlp


class Layer(nnx.Module):
    """One pre-norm block of self-attention and MLP.

    prefix: stands before the names of its maps, ``attn.q`` and so on, in ``LoRA.targets``.
    """

    def __init__(
        self,
        c: LayerConfig,
        *,
        dtypes: DTypes,
        lora: LoRA | None,
        rngs: nnx.Rngs,
        prefix: str = "",
    ):
        self.residual, self.residual_scale = c.residual, c.residual_scale
        self.dropout, self.prefix = c.residual_dropout, prefix
        self.attn_dropout = c.residual_dropout if c.residual_dropout_on == "both" else 0.0
        shared = dict(dtypes=dtypes, lora=lora, rngs=rngs, prefix=prefix)
        self.attn_norm = make_norm(c, dtypes=dtypes)
        self.attn = SelfAttention(c, **shared)
        self.mlp_norm = None if c.residual == "shared" else make_norm(c, dtypes=dtypes)
        self.mlp = MLP(
            c.d_model, c.d_mlp, activation=c.activation, gated=c.gated, bias=c.mlp_bias,
            sub_norm=make_norm(c, dtypes=dtypes, width=c.d_mlp) if c.sub_norm else None,
            init_std=c.init_std, **shared,
        )  # fmt: skip

    def __call__(
        self, x: Array, context: Context, layer: Array, cached=None, at: Array | None = None
    ):
        """Map [b, t, d] to [b, t, d]; with ``cached`` also returns its updated buffers.

        at: int32[b, m], the positions whose outputs [b, m, d] are wanted; None for all.
        """
        t, normed = x.shape[1], self.attn_norm(x)
        out = self.attn(normed, context, layer, cached, at)
        if cached is not None:
            out, cached = out

        def branch(out: Array, rate: float, name: str) -> Array:
            return drop(out, rate, f"{self.prefix}{name}.out", at=at, length=t)

        out = branch(out, self.attn_dropout, "attn")
        if at is not None:
            x, normed = take_on_length(x, at), take_on_length(normed, at)
        if self.residual == "sequential":
            x = checkpoint_name(self._add(x, out), "attn_sum")
            out = branch(self.mlp(self.mlp_norm(x)), self.dropout, "mlp")
        else:
            normed = normed if self.mlp_norm is None else self.mlp_norm(x)
            out = out + branch(self.mlp(normed), self.dropout, "mlp")
        x = self._add(x, out)
        return x if cached is None else (x, cached)

    def _add(self, x: Array, out: Array) -> Array:
        if self.residual_scale != 1.0:  # in float32: bfloat16 would round the factor itself
            out = (out.astype(jnp.float32) * self.residual_scale).astype(out.dtype)
        return constrain(x + out, "batch", "length", "embed")
