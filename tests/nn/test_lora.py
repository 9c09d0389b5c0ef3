"""Adapters: gradients to every target, merging, dropout that is a function of the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models import converted, opening, pretrained, registry
from mmjax.models.views import Merged
from mmjax.nn import paths, stack
from mmjax.nn.dropout import dropout_key
from mmjax.nn.linear import DTypes, Linear, LoRA
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import batch_sharding
from mmjax.train.loss import loss_sum
from mmjax.weights.writer import Arrays
from tests import tiny

TARGETS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down", "head", "patch_embed")
ALL = LoRA(3, 6.0, TARGETS)
BATCH = tiny.batch(b=2)


@pytest.fixture(scope="module")
def adapted():
    """Every map adapted, every parameter random: graph and state."""
    with use():
        return nnx.split(tiny.model(lora=ALL))


@jax.jit
def run(parts, batch):
    model = nnx.merge(*parts)
    return model.logits(model(batch))


@pytest.fixture(scope="module")
def gradients(adapted):
    graphdef, state = adapted
    with use():
        grads = jax.jit(jax.grad(lambda p: loss_sum(nnx.merge(graphdef, p), BATCH)[0]))(state)
    return {name: np.asarray(leaf) for name, leaf in paths.flatten(grads).items()}


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_reach(target, gradients):
    stem = target if target == "patch_embed" else f"decoder.{target}"
    stem = stem if target in ("head", "patch_embed") else f"decoder.layers.{target}"
    for side in ("lora_a", "lora_b"):
        grad = gradients[f"{stem}.{side}"]
        layers = grad if stem.startswith("decoder.layers") else grad[None]
        for i, one in enumerate(layers):  # in every layer
            assert np.abs(one).max() > 1e-6, f"{stem}.{side}, layer {i}"


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_unmerged(adapted, rslora):
    """Adapters of a size that training reaches: float32 sums in another order stay within 1e-5."""
    lora = LoRA(3, 6.0, TARGETS, rslora=rslora)
    graphdef, _ = nnx.split(tiny.model(lora=lora))
    flat = {k: v * (0.2 if ".lora_" in k else 0.5) for k, v in paths.flatten(adapted[1]).items()}
    unmerged = run((graphdef, paths.replace(adapted[1], flat)), BATCH)
    merged = Merged(Arrays(flat), lora)
    plain_graph, plain = nnx.split(tiny.model())
    values = {name: jnp.asarray(merged.read(name)) for name in merged.keys()}  # noqa: SIM118
    got = run((plain_graph, paths.replace(plain, values)), BATCH)
    without = run((plain_graph, paths.replace(plain, {n: flat[n] for n in values})), BATCH)
    assert np.abs(np.asarray(got) - np.asarray(without)).max() > 0.01
    np.testing.assert_allclose(got, unmerged, atol=1e-5, rtol=1e-5)


def test_the_scale_of_rslora_falls_with_the_root_of_the_rank():
    assert LoRA(16, 8.0, ()).scale == 0.5
    assert LoRA(16, 8.0, (), rslora=True).scale == 2.0


def test_bfloat16_rounds_the_update_and_not_its_scale():
    """9 / sqrt(3) in bfloat16 is 0.1 % too large; the update of merged adapters is not."""
    lora = LoRA(3, 9.0, ("x",), rslora=True)
    layer = Linear(
        (2,), (1,), ("embed", "mlp"), name="x", bias=False, dtypes=DTypes(compute="bfloat16"),
        init_std=0.0, lora=lora, rngs=nnx.Rngs(0),
    )  # fmt: skip
    layer.lora_a[...], layer.lora_b[...] = jnp.ones((2, 3)), jnp.ones((3, 1))
    x = jnp.arange(1, 33, dtype=jnp.bfloat16)[:, None] * jnp.ones((1, 2), jnp.bfloat16)
    want = jnp.asarray(6.0 * np.arange(1, 33) * lora.scale, jnp.bfloat16)
    np.testing.assert_array_equal(layer(x)[:, 0], want)


def linear(dropout, name="x"):
    layer = Linear(
        (256,), (8,), ("embed", "mlp"), name=name, bias=False, dtypes=DTypes(), init_std=0.0,
        lora=LoRA(256, 256.0, (name,), dropout=dropout), rngs=nnx.Rngs(0),
    )  # fmt: skip
    layer.lora_a[...] = jnp.eye(256)
    layer.lora_b[...] = jnp.zeros((256, 8)).at[:8].set(jnp.eye(8))
    return layer


def test_dropout_drops_its_share_and_scales_the_rest():
    layer, x = linear(0.25), jnp.ones((512, 256))
    with dropout_key(jax.random.key(0)):
        got = np.asarray(layer(x))  # the first eight inputs, as they came through
    np.testing.assert_allclose(np.unique(got), [0, 4 / 3], rtol=1e-6)
    assert abs((got == 0).mean() - 0.25) < 0.03  # 4096 draws: a standard deviation of 0.007
    np.testing.assert_array_equal(layer(x), np.ones((512, 8)))  # outside training: nothing
    with dropout_key(jax.random.key(0)):
        np.testing.assert_array_equal(linear(0.0)(x), np.ones((512, 8)))


def test_q_k_and_v_share_a_mask_and_others_do_not():
    x = jnp.ones((4, 256))
    with dropout_key(jax.random.key(0)):
        q, v, up = (linear(0.5, name)(x) for name in ("attn.q", "attn.v", "mlp.up"))
    np.testing.assert_array_equal(q, v)
    assert np.any(np.asarray(q) != np.asarray(up))


def test_masks_do_not_depend_on_the_mesh():
    layer = linear(0.5)

    def run(x):
        with dropout_key(jax.random.key(5)):
            return layer(x)

    want = jax.jit(run)(jnp.ones((8, 256)))
    with use(make_mesh({"fsdp": 4, "tensor": 2})) as mesh:
        x = jax.device_put(jnp.ones((8, 256)), batch_sharding(mesh))
        np.testing.assert_array_equal(jax.jit(run)(x), want)


@pytest.fixture(scope="module")
def dropped():
    """Gradients of a tiny Fuyu with all kinds of dropout, by remat policy, of a key."""

    def build(remat):
        lora = LoRA(3, 6.0, ("attn.q", "mlp.up"), dropout=0.5)
        decoder = dict(residual_dropout=0.2, embedding_dropout=0.1)
        decoder = dataclasses.replace(tiny.CONFIG.decoder, **decoder)
        config = dataclasses.replace(tiny.CONFIG, decoder=decoder)
        graphdef, state = nnx.split(tiny.model(config, lora=lora, remat=remat))

        @jax.jit
        def fn(key, state=state):
            def loss(state):
                with dropout_key(key):
                    return loss_sum(nnx.merge(graphdef, state), BATCH)[0]

            value, grads = jax.value_and_grad(loss)(state)
            return value, paths.flatten(grads)["decoder.layers.attn.q.lora_a"]

        return fn

    with use():
        return {remat: build(remat) for remat in ("off", "names")}


@pytest.mark.heavy
def test_masks_are_a_function_of_the_key_in_forward_and_backward_pass(dropped):
    keys = [jax.random.fold_in(jax.random.key(7), step) for step in (0, 1)]
    first, again, other = (dropped["names"](k) for k in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert first[0] != other[0]
    assert dropped["names"]._cache_size() == 1  # a new step is no new program
    # Without rematerialisation the masks are kept; with it they are drawn again: the same.
    saved = dropped["off"](keys[0])
    np.testing.assert_allclose(saved[0], first[0], rtol=1e-6)
    np.testing.assert_allclose(saved[1], first[1], rtol=1e-4, atol=1e-6)


@pytest.mark.heavy
def test_each_layer_of_a_scan_draws_its_own_mask():
    def make(rngs):
        return Linear(
            (64,), (64,), ("embed", "mlp"), name="x", bias=False, dtypes=DTypes(), init_std=0.0,
            lora=LoRA(1, 1.0, ("x",), dropout=0.5), rngs=rngs,
        )  # fmt: skip

    layers = stack.stack(make, 3, nnx.Rngs(0))
    layers.lora_a[...] = jnp.ones((3, 64, 1))
    layers.lora_b[...] = jnp.ones((3, 1, 64))

    def step(layer, carry, index):  # the number of inputs that came through, each twice its size
        return carry.at[index].set(layer(jnp.ones((1, 64)))[0, 0] / 2)

    with dropout_key(jax.random.key(3)):
        counts = np.asarray(stack.scan(layers, 3, step, jnp.zeros(3)))
    assert len(set(counts.tolist())) > 1 and np.all((counts > 16) & (counts < 48))
    np.testing.assert_array_equal(stack.scan(layers, 3, step, jnp.zeros(3)), [32, 32, 32])


def test_a_folder_remembers_what_its_adapters_mean(tmp_path, adapted):
    lora = LoRA(3, 6.0, TARGETS, rslora=True, dropout=0.1)
    family = registry.family("fuyu")
    converted.save_model(
        tmp_path / "x", paths.flatten(adapted[1]), family=family, config=tiny.CONFIG, lora=lora
    )
    opened = opening.open_pretrained(tmp_path / "x")
    assert opened.lora == lora
    alone = opening.open_adapters(tmp_path / "x", family, tiny.CONFIG)
    assert alone.lora == lora and all(".lora_" in rule.ours for rule in alone.rules)
    whole = pretrained.merged(opened)
    assert whole.lora is None and not any(".lora_" in rule.ours for rule in whole.rules)
    update = np.einsum(
        "dr,rv->dv",
        *(np.asarray(paths.flatten(adapted[1])[f"decoder.head.lora_{s}"]) for s in "ab"),
    ) * (6 / 3**0.5)
    kernel = np.asarray(paths.flatten(adapted[1])["decoder.head.kernel"])
    np.testing.assert_allclose(
        whole.reader.read("decoder.head.kernel"), kernel + update, rtol=1e-5, atol=1e-6
    )
