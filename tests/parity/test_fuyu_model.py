"""Fuyu against transformers' own, rung by rung: from one layer to ten steps of training."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mmjax.loading
from mmjax.generate.loop import Generator
from mmjax.models.fuyu.model import FuyuConfig
from mmjax.nn import paths, rope
from mmjax.nn.attention import Context
from mmjax.parallel.mesh import use
from mmjax.train import optim, state, step
from mmjax.train.loss import loss_sum
from tests.parity import peer

SAMPLES = {
    "image and text": [peer.sample(1, [(2, 3), 9])],
    "ragged": [peer.sample(2, [(3, 2), 12]), peer.sample(3, [(1, 4), 5])],
    "text alone": [peer.sample(4, [14])],
    "several images": [peer.sample(5, [2, (2, 2), 4, (1, 3), 6, (1, 1), 3])],
    "with and without": [peer.sample(6, [11]), peer.sample(7, [3, (2, 3), 4, (1, 1), 2])],
}


def heavy(*names):
    return [pytest.param(name, marks=pytest.mark.heavy) for name in names]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(torch model, ours), ours read from the files the other wrote."""
    folder = tmp_path_factory.mktemp("fuyu")
    theirs = peer.tiny_fuyu()
    theirs.save_pretrained(folder)
    with use():
        return theirs, mmjax.loading.load(folder, dtype="float32")


@jax.jit
def hidden_and_logits(model_state, batch):
    model = nnx.merge(*model_state)
    hidden = model(batch)
    return hidden, model.logits(hidden)


def ours_of(loaded, samples):
    """Return our hidden states and logits, cut to the samples' lengths."""
    out = hidden_and_logits(nnx.split(loaded.model), peer.right_padded(samples))
    return [[np.asarray(x[i, : len(s[0])]) for i, s in enumerate(samples)] for x in out]


def unpadded(tensor, samples):
    return [row[-len(ids) :].numpy() for row, (ids, _) in zip(tensor, samples, strict=True)]


@jax.jit
def embed(model_state, batch):
    return nnx.merge(*model_state).embed(batch)


def test_the_embedded_stream_is_equal(both):
    theirs, loaded = both
    for name in ("ragged", "several images"):
        samples = SAMPLES[name]
        inputs = peer.left_padded(samples)
        with torch.no_grad():
            out = theirs(**inputs, output_hidden_states=True)
        ours = embed(nnx.split(loaded.model), peer.right_padded(samples))
        for i, want in enumerate(unpadded(out.hidden_states[0], samples)):
            np.testing.assert_allclose(ours[i, : len(want)], want, atol=1e-5)


@partial(jax.jit, static_argnums=(2, 3))
def one_layer(parts, x, dims, theta):
    context = Context(*rope.angles(jnp.arange(x.shape[1])[None], dims, theta))
    return nnx.merge(*parts)(x, context, jnp.int32(0))


@pytest.mark.parametrize("index", range(peer.LAYERS))
def test_one_layer_is_equal_within_1e_5(both, index):
    theirs, loaded = both
    seen = {}
    layer = theirs.model.language_model.layers[index]

    def keep(module, args, kwargs, out):
        seen["in"] = (args[0] if args else kwargs["hidden_states"]).numpy()
        seen["out"] = (out[0] if isinstance(out, tuple) else out).numpy()

    hook = layer.register_forward_hook(keep, with_kwargs=True)
    samples = SAMPLES["image and text"]
    with torch.no_grad():
        theirs(**peer.left_padded(samples))
    hook.remove()
    config = loaded.config.decoder
    graphdef, layers = nnx.split(loaded.model.decoder.layers)
    parts = graphdef, jax.tree.map(lambda x: x[index], layers)
    dims = int(config.head_dim * config.rope_fraction)
    got = one_layer(parts, seen["in"], dims, config.rope_theta)
    np.testing.assert_allclose(got, seen["out"], atol=1e-5)
    assert np.abs(seen["out"] - seen["in"]).mean() > 0.1  # the layer does something


@pytest.mark.parametrize("name", SAMPLES)
def test_hidden_states_and_logits_are_equal_within_1e_4(both, name):
    theirs, loaded = both
    samples = SAMPLES[name]
    with torch.no_grad():
        out = theirs(**peer.left_padded(samples), output_hidden_states=True)
    hidden, logits = ours_of(loaded, samples)
    for got, want in zip(hidden, unpadded(out.hidden_states[-1], samples), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
    for got, want in zip(logits, unpadded(out.logits, samples), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)
        assert np.ptp(want) > 1


def test_the_logits_of_the_loaded_model_take_the_peers_own_inputs(both):
    theirs, loaded = both
    for name in ("image and text", "several images", "text alone"):
        ids, patches = SAMPLES[name][0]
        images = [patches[None]] if len(patches) else None  # [1, p, pixels], as the peer's
        tokens, logits = loaded.logits(ids.tolist(), images)
        with torch.no_grad():
            want = theirs(**peer.left_padded(SAMPLES[name])).logits[0].numpy()
        assert tokens.tolist() == ids.tolist()
        np.testing.assert_allclose(logits, want, atol=1e-4)


def test_a_wrong_theta_would_be_seen(both):
    """The sizes here are large enough that the peer's fallback of 10000 gives other logits."""
    theirs, _ = both
    wrong = peer.tiny_fuyu(theta=10_000.0)
    inputs = peer.left_padded(SAMPLES["image and text"])
    with torch.no_grad():
        difference = (wrong(**inputs).logits - theirs(**inputs).logits).abs().max()
    assert difference > 0.01


@jax.jit
def loss_and_gradients(model_state, batch):
    graphdef, params = model_state

    def mean(params):
        total, count = loss_sum(nnx.merge(graphdef, params), batch, chunk=4)
        return total / count

    return jax.value_and_grad(mean)(params)


ANSWERS = {  # spans of answers in each sample's own positions
    "image and text": [[(11, 14), (15, 17)]],
    "ragged": [[(12, 21)], [(6, 8), (9, 10)]],
    "text alone": [[(5, 9)]],
    "several images": [[(9, 12), (24, 26)]],
}


@pytest.mark.parametrize(
    "name", [*heavy("text alone", "several images"), "image and text", "ragged"]
)
def test_loss_and_every_gradient_are_equal_within_1e_4(both, name):
    theirs, loaded = both
    samples = SAMPLES[name]
    inputs, batch = peer.supervise(
        peer.left_padded(samples), peer.right_padded(samples), samples, ANSWERS[name]
    )
    theirs.zero_grad()
    want = theirs(**inputs).loss
    want.backward()
    gradients = peer.hub_names(
        {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    )
    loss, ours = loss_and_gradients(nnx.split(loaded.model), batch)
    np.testing.assert_allclose(loss, want.item(), rtol=1e-4)
    ours = peer.to_hub(paths.flatten(ours))
    for key in ours.keys() - gradients.keys():  # torch leaves out what took no part
        assert not np.any(ours.pop(key)) and key.startswith("vision_embed_tokens")
    peer.assert_each_close(ours, gradients, 1e-4)


def their_tokens(theirs, samples, eos):
    """Return what the peer generates greedily with its cache, each row cut at the end token."""
    inputs = peer.left_padded(samples)
    del inputs["position_ids"]
    out = theirs.generate(
        **inputs, max_new_tokens=16, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


@pytest.mark.parametrize("name", [*heavy("image and text", "ragged"), "with and without"])
def test_greedy_tokens_are_identical_in_a_batch_and_alone(both, name):
    theirs, loaded = both
    samples = SAMPLES[name]
    want = their_tokens(theirs, samples, None)
    graphdef, params = nnx.split(loaded.model)
    generate = Generator(graphdef, ())
    assert [row.tolist() for row in generate(params, peer.examples(samples), 16)] == want
    alone = [generate(params, [e], 16)[0] for e in peer.examples(samples)]
    assert [row.tolist() for row in alone] == want


def test_greedy_tokens_are_identical_where_a_row_ends_early(both):
    theirs, loaded = both
    samples = SAMPLES["ragged"]
    eos = their_tokens(theirs, samples, None)[0][3]
    want = their_tokens(theirs, samples, eos)
    assert len(want[0]) <= 3
    graphdef, params = nnx.split(loaded.model)
    ours = Generator(graphdef, (eos,))(params, peer.examples(samples), 16)
    assert [row.tolist() for row in ours] == want


# eps above the default: softmax does not see a shift of every key along dimensions that are not
# rotated, so half of k_layernorm.bias has gradients of pure rounding, which 1e-8 would amplify.
SETTINGS = optim.OptimSettings(
    lr=5e-3, schedule="linear", warmup=3, final_lr=0.1, weight_decay=0.1, clip_norm=1.0, eps=1e-6
)
STEPS = 10


def their_training(model, batches):
    """Train as a PyTorch user would: two groups, clipping, a LambdaLR; return the losses."""
    decayed, rest = [], []
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 and "embed_tokens" not in name.replace("vision_embed_tokens", "")
        (decayed if matrix else rest).append(p)
    groups = [
        {"params": decayed, "weight_decay": SETTINGS.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS.lr, betas=(0.9, 0.999), eps=SETTINGS.eps)

    def share(i):
        done = (i - SETTINGS.warmup) / (STEPS - SETTINGS.warmup)
        return (i + 1) / SETTINGS.warmup if i < SETTINGS.warmup else 1 - 0.9 * done

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses, norms = [], []
    for inputs in batches:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, norms


def our_training(loaded, batches):
    graphdef, params = nnx.split(loaded.model)
    params = jax.tree.map(jnp.array, params)  # the step donates them
    tx, rate = optim.make_optimizer(SETTINGS, STEPS), optim.schedule(SETTINGS, STEPS)
    train = state.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    frozen = nnx.State({})
    advance = jax.jit(step.make_train_step(graphdef, tx, rate), donate_argnums=0)
    losses, norms = [], []
    for batch in batches:
        train, metrics = advance(train, frozen, batch)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return losses, norms, paths.flatten(train.params)


def test_ten_steps_of_adamw_are_equal_within_1e_3(both):
    _, loaded = both
    theirs = peer.tiny_fuyu()
    before = {k: v.copy() for k, v in peer.hub_names(dict(theirs.named_parameters())).items()}
    torch_batches, batches = [], []
    for i in range(STEPS):
        samples = [peer.sample(20 + i, [(3, 2), 12]), peer.sample(50 + i, [(1, 4), 9])]
        spans = [[(12, 20)], [(7, 9), (10, 13)]]
        pair = peer.left_padded(samples), peer.right_padded(samples)
        inputs, batch = peer.supervise(*pair, samples, spans)
        torch_batches.append(inputs)
        batches.append(batch)
    want_losses, want_norms = their_training(theirs, torch_batches)
    losses, norms, params = our_training(loaded, batches)
    np.testing.assert_allclose(losses, want_losses, atol=1e-3)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-3)
    assert min(want_norms) > SETTINGS.clip_norm  # clipping took part
    after = peer.hub_names(dict(theirs.named_parameters()))
    ours = peer.to_hub(params)
    assert ours.keys() == after.keys()
    for key, want in after.items():
        np.testing.assert_allclose(ours[key], want, atol=1e-3, err_msg=key)
        assert np.abs(want - before[key]).max() > 0.01, key


FLAT = {
    "architectures": ["FuyuForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 71013,
    "hidden_act": "relu2",
    "hidden_size": 64,
    "image_size": 300,
    "intermediate_size": 80,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 512,
    "model_type": "fuyu",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "partial_rotary_factor": 0.5,
    "patch_size": 4,
    "qk_layernorm": True,
    "rope_scaling": None,
    "rope_theta": 25000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 96,
}
STUB = {**FLAT, "text_config": {"model_type": "persimmon"}}


def resaved(config, tmp_path):
    """Return what transformers 5 makes of a config.json when it loads and saves it."""
    from transformers import FuyuConfig as Peer

    (tmp_path / "config.json").write_text(json.dumps(config))
    Peer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    return json.loads((tmp_path / "again" / "config.json").read_text())


def test_theta_is_25000_in_every_variant_of_the_hubs_config(tmp_path):
    flat = FuyuConfig.from_hf(FLAT)
    assert (flat.decoder.rope_theta, flat.eos_token_id) == (25_000.0, 71013)
    assert (flat.decoder.rope_fraction, flat.decoder.head_dim) == (0.5, 16)
    without = {k: v for k, v in STUB.items() if k != "rope_theta"}
    assert FuyuConfig.from_hf(STUB) == FuyuConfig.from_hf(without) == flat
    nested = resaved(FLAT, tmp_path)
    assert nested["text_config"]["rope_parameters"]["rope_theta"] == 25_000.0
    assert FuyuConfig.from_hf(nested) == flat


def test_a_stub_that_transformers_5_saved_again_keeps_theta_and_the_end_token(tmp_path):
    """transformers 5 fills the stub with 10000 and end token 2 beside the file's own values."""
    config = resaved({**STUB, "hidden_size": 4096, "num_attention_heads": 64}, tmp_path)
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["text_config"]["eos_token_id"] == 2
    assert config["rope_theta"] == 25_000.0
    ours = FuyuConfig.from_hf(config)
    assert (ours.decoder.rope_theta, ours.eos_token_id) == (25_000.0, 71013)


def test_a_theta_that_only_the_nested_config_states_is_obeyed():
    config = peer.tiny_fuyu(theta=10_000.0).config.to_dict()
    assert FuyuConfig.from_hf(config).decoder.rope_theta == 10_000.0


def test_our_config_file_reads_the_same_here_and_there(tmp_path):
    from transformers import FuyuConfig as Peer

    ours = FuyuConfig.from_hf(FLAT)
    assert FuyuConfig.from_hf(ours.to_hf()) == ours
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
    theirs = Peer.from_pretrained(tmp_path)
    assert theirs.text_config.rope_parameters["rope_theta"] == 25_000.0
    assert theirs.text_config.rope_parameters["partial_rotary_factor"] == 0.5
    assert theirs.text_config.eos_token_id == 71013
    assert (theirs.text_config.hidden_size, theirs.patch_size) == (64, 4)
