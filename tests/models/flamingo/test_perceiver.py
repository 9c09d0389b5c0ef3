"""The Perceiver resampler: what sees what, the embeddings no published model has, its cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models.flamingo.model import Flamingo, FlamingoConfig
from mmjax.models.flamingo.perceiver import Perceiver, PerceiverConfig
from mmjax.nn import paths
from mmjax.nn.linear import LoRA
from mmjax.types import MMJaxError
from tests import small_flamingo

SMALL = PerceiverConfig(
    d_model=8, num_layers=2, num_heads=2, head_dim=4, num_latents=3, init_std=0.5
)


def small(config=SMALL, **kwargs):
    return nnx.split(Perceiver(config, rngs=nnx.Rngs(0), **kwargs))


def media(frames=2):
    return np.random.default_rng(0).normal(size=(2, 3, frames, 5, 8)).astype(np.float32)


@jax.jit
def forward(parts, media, places=None):
    return nnx.merge(*parts)(media, places)


def test_media_do_not_see_each_other_and_frames_of_one_do():
    parts, x = small(), media()
    before = np.asarray(forward(parts, x))
    x[:, 1, 1] *= -1.0  # a shift would be lost in the norm
    after = np.asarray(forward(parts, x))
    np.testing.assert_array_equal(after[:, [0, 2]], before[:, [0, 2]])
    assert (np.abs(after[:, 1] - before[:, 1]).max(-1) > 1e-3).all()


def test_embeddings_of_frames_and_media_are_added_to_their_tokens():
    config = dataclasses.replace(SMALL, max_frames=4, max_media=5)
    (graphdef, params), x = small(config), media()
    names = paths.flatten(params)
    frame, of_medium = (np.asarray(names[f"{name}_embed"]) for name in ("frame", "media"))
    assert frame.shape == (4, 8) and of_medium.shape == (5, 1, 8)
    plain, plain_params = small()
    same = paths.replace(plain_params, {n: names[n] for n in paths.flatten(plain_params)})
    places = np.int32([[0, 1, 0], [0, 1, 2]])  # two samples, the first of two media; one sample
    moved = x + frame[:2][None, None, :, None] + of_medium[places][:, :, None]
    want = forward((plain, same), moved)
    np.testing.assert_allclose(forward((graphdef, params), x, places), want, atol=1e-5)
    assert np.abs(want - forward((plain, same), x)).max() > 0.1


def test_media_of_a_packed_row_are_those_of_its_samples_alone():
    hf = small_flamingo.hf_config() | dict(media_token_id=1)
    hf["perceiver_config"] = hf["perceiver_config"] | dict(max_media=2)
    config, rng = FlamingoConfig.from_hf(hf), np.random.default_rng(0)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Flamingo(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), shapes)
    run = jax.jit(lambda batch: nnx.merge(graphdef, params).media(batch))
    x = rng.integers(0, 256, (3, 8 * 8 * 3), np.uint8)

    def media_of(index, segment_ids, patches):
        index, ids = np.int32(index), np.int32(segment_ids)
        batch = dict(tokens=index, visual_index=index, segment_ids=ids, patches=patches)
        return run(batch).reshape(-1, 4, 16)

    none = np.zeros_like(x[0])
    alone = [media_of([[0, 0, -1]], [[1, 1, 0]], np.stack([[x[0], none, none, none]]))[:1]]
    alone += [media_of([[-1, 0, 1]], [[1, 1, 1]], np.stack([[x[1], x[2], none, none]]))[:2]]
    # Four places in a row, and embeddings of the two media that a sample may have.
    packed = media_of([[0, 1, 2]], [[1, 2, 2]], np.stack([[*x, none]]))[:3]
    np.testing.assert_allclose(packed, np.concatenate(alone), atol=1e-5)


def test_more_frames_than_embeddings_are_refused():
    config = dataclasses.replace(SMALL, max_frames=1)
    with pytest.raises(MMJaxError, match="of 1 frames and was given 2"):
        Perceiver(config, rngs=nnx.Rngs(0))(jnp.asarray(media()))


@pytest.mark.heavy
def test_remat_changes_no_gradient_and_names_run_no_matmul_twice():
    x = media()

    def loss(parts):
        return lambda params: jnp.sum(jnp.sin(nnx.merge(parts[0], params)(x)))

    found, matmuls = {}, {}
    for remat in ("off", "names", "full"):
        parts = small(remat=remat)
        grad = jax.grad(loss(parts))
        found[remat] = paths.flatten(jax.jit(grad)(parts[1]))
        matmuls[remat] = str(jax.make_jaxpr(grad)(parts[1])).count("dot_general")
    assert matmuls["names"] == matmuls["off"] < matmuls["full"]
    for name, want in found["off"].items():
        assert np.abs(want).max() > 0, name
        for remat in ("names", "full"):
            np.testing.assert_allclose(found[remat][name], want, atol=1e-5, err_msg=name)


def test_adapters_go_by_names_of_the_perceiver():
    _, params = small(lora=LoRA(2, 4.0, ("perceiver.attn.v", "mlp.up")))
    assert [n for n in paths.flatten(params) if "lora_a" in n] == ["layers.attn.v.lora_a"]


def test_an_openflamingo_resampler_has_63_million_weights():
    shapes = jax.eval_shape(lambda: nnx.split(Perceiver(PerceiverConfig(), rngs=nnx.Rngs(0)))[1])
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 63_019_008


def test_flops_are_two_a_weight_and_key():
    c = PerceiverConfig(num_layers=1)
    kv, rest = 2 * 1024 * 512, 2 * 1024 * 512 + 2 * 1024 * 4096
    one, two = c.work(1, 256), c.work(1, 257)
    assert one.maps == {"perceiver.*": 2 * (320 * kv + 64 * rest)}
    assert one.scores == 4 * 64 * 320 * 512
    assert two.flops - one.flops == 2 * kv + 4 * 64 * 512
    assert c.work(3, 256).flops == 3 * one.flops
