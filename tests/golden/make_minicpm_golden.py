"""Write minicpm.npz: what Bunny's own MiniCPM makes of a prompt, with random weights.

transformers has no MiniCPM. Takes the path of a checkout of github.com/BAAI-DCAI/Bunny:

    python tests/golden/make_minicpm_golden.py CHECKOUT

Made with transformers 5.23.0, torch 2.13.0. Holds config.json as text, the tensors in float16 under
their own names, prompt ids int32[t], logits float32[t, v], and the 12 greedy tokens after it.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.utils import import_utils

PACKAGE = "bunny.model.language_model.minicpm"
CONFIG = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-5, rope_scaling=None,
    bos_token_id=1, eos_token_id=2, scale_emb=12, scale_depth=1.4, dim_model_base=8,
)  # fmt: skip


def load_peer(checkout: Path) -> types.ModuleType:
    """Import the modelling file by itself, on a transformers newer than it was written for."""
    import_utils.is_torch_fx_available = lambda: False
    transformers.PretrainedConfig.use_return_dict = True
    parts = PACKAGE.split(".")
    for n in range(1, len(parts) + 1):  # the packages' own __init__ import what is not needed
        name = ".".join(parts[:n])
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(checkout.joinpath(*parts[:n]))]
    peer = importlib.import_module(f"{PACKAGE}.modeling_minicpm")
    peer.MiniCPMForCausalLM._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    return peer


def main() -> None:
    peer = load_peer(Path(sys.argv[1]))
    config = peer.MiniCPMConfig(**CONFIG, attn_implementation="eager")
    config.rope_scaling = None  # today's transformers fill it in
    model = peer.MiniCPMForCausalLM(config).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        # Small embeddings, or a tied head would repeat the last token for ever.
        std = 0.03 if "embed" in name else 0.3
        noise = std * torch.randn_like(parameter) + (parameter.ndim == 1)
        parameter.data = noise.half().float()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = np.random.default_rng(0).integers(3, CONFIG["vocab_size"], 11)
    tokens = ids.tolist()
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
        for _ in range(12):
            out = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(out.argmax()))
    kept = {k: v.numpy().astype(np.float16) for k, v in model.state_dict().items()}
    kept.pop("lm_head.weight")
    np.savez_compressed(
        Path(__file__).with_name("minicpm.npz"),
        config=json.dumps({"model_type": "minicpm", **CONFIG}),
        ids=ids.astype(np.int32),
        logits=logits.numpy(),
        greedy=np.array(tokens[len(ids) :], np.int32),
        **kept,
    )


if __name__ == "__main__":
    main()
