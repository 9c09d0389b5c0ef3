"""One tiny Fuyu and its batches, shared by the suite so that programs compile once."""

import jax
import numpy as np
from flax import nnx

from mmjax.models.decoder import DecoderConfig
from mmjax.models.fuyu.model import Fuyu, FuyuConfig

CONFIG = FuyuConfig(
    decoder=DecoderConfig(
        vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, d_mlp=64
    ),
    patch_size=4,
    image_token_id=5,
    eos_token_id=7,
)


def model(config=CONFIG, seed=0, noise=0.2, **kwargs) -> Fuyu:
    """A Fuyu whose every parameter is random, biases and norms too."""
    module = Fuyu(config, rngs=nnx.Rngs(seed), **kwargs)
    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [
        x + noise * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def example(rng, t, patches=0, vocab=64, patch_dim=48):
    """A prompt of t tokens whose tokens 1..patches are image patches."""
    tokens = rng.integers(8, vocab, t).astype(np.int32)
    visual = np.full(t, -1, np.int32)
    visual[1 : 1 + patches] = np.arange(patches)
    tokens[1 : 1 + patches] = CONFIG.image_token_id
    return {
        "tokens": tokens,
        "positions": np.arange(t, dtype=np.int32),
        "visual_index": visual,
        "patches": rng.integers(0, 256, (patches, patch_dim)).astype(np.uint8),
    }


def batch(seed=0, b=8, t=16, p=3, targets=4):
    """A batch of b rows of t tokens, each with p patches and a few targets."""
    rng = np.random.default_rng(seed)
    rows = [example(rng, t, p) for _ in range(b)]
    out = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    out["segment_ids"] = np.ones((b, t), np.int32)
    index = np.stack([rng.choice(np.arange(p + 1, t), targets, replace=False) for _ in range(b)])
    out["target_index"] = np.sort(index, axis=1).astype(np.int32)
    out["target_index"][::2, -1] = -1  # uneven numbers of targets a row
    return out
