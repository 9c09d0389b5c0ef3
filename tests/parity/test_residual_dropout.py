"""Where transformers drops in training, there our masks act: its own models, given our masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as T

import mmjax
from mmjax.nn.dropout import drop, dropout_key, of_layer
from mmjax.parallel.mesh import use

SIZES = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=96)
MLP = dict(intermediate_size=64)
PEERS = {  # sizes; what its config.json says of dropout; of residual branches, of the embedding
    "Phi": (MLP, dict(resid_pdrop=0.25, embd_pdrop=0.5), (0.25, 0.5)),
    "Phi3": (MLP | dict(pad_token_id=0), dict(resid_pdrop=0.25), (0.25, 0.0)),
    "GPTNeoX": (MLP, dict(hidden_dropout=0.25), (0.25, 0.25)),
    "StableLm": (
        MLP | dict(num_key_value_heads=4),
        dict(hidden_dropout=0.25),
        (0.25, 0.0),
    ),  # of the MLP alone
    "OPT": (dict(ffn_dim=64, word_embed_proj_dim=32), dict(dropout=0.25), (0.25, 0.0)),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", PEERS)
def test_masks_act_where_the_peer_drops(name, tmp_path, monkeypatch):
    sizes, said, (residual, embedding) = PEERS[name]
    torch.manual_seed(0)
    config = getattr(T, f"{name}Config")(**SIZES, **sizes, **said)
    peer = getattr(T, f"{name}ForCausalLM")(config).train()
    for parameter in peer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path)
    ours = mmjax.load(tmp_path)
    decoder = ours.config.decoder
    assert (decoder.residual_dropout, decoder.embedding_dropout) == (residual, embedding)
    written = ours.config.to_hf()
    assert {key: written[key] for key in said} == said

    ids, key = np.random.default_rng(0).integers(2, 96, (2, 11)), jax.random.key(3)
    ones, masks = jnp.ones((2, 11, 32)), []
    branches = ("mlp.out",) if name == "StableLm" else ("attn.out", "mlp.out")
    with dropout_key(key):
        masks += [drop(ones, embedding, "embed")] if embedding else []
        for layer in range(2):
            with of_layer(layer):
                masks += [drop(ones, residual, branch) for branch in branches]
    masks = [torch.from_numpy(np.array(mask)) for mask in masks]

    def given(x, p=0.5, training=True, inplace=False):
        return x * masks.pop(0).reshape(x.shape) if p and training else x

    monkeypatch.setattr(torch.nn.functional, "dropout", given)
    with torch.no_grad():
        want = peer(torch.from_numpy(ids)).logits.numpy()
    assert not masks

    @jax.jit
    def run(key):
        with dropout_key(key):
            row = jnp.arange(11, dtype=jnp.int32)[None].repeat(2, 0)
            batch = dict(tokens=jnp.asarray(ids), positions=row, segment_ids=jnp.ones_like(row))
            return ours.model.logits(ours.model(batch))

    with use(ours.mesh):
        np.testing.assert_allclose(run(key), want, atol=1e-4)
        assert np.abs(run(jax.random.key(4)) - want).max() > 0.1
