"""FLOPs of a step by what is trained: by hand, and beside what the compiler counts."""

import fnmatch
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models import registry
from mmjax.models.work import Work
from mmjax.nn import paths
from mmjax.nn.linear import LoRA
from mmjax.train import state
from mmjax.train.flops import step_flops, train_flops
from mmjax.train.loss import loss_sum
from mmjax.train.settings import DataSettings, LoRASettings, RunSettings
from tests import small_flamingo, tiny

TOWER = dict(model_type="clip_vision_model", feature_layer=-2, hidden_size=4, num_hidden_layers=3,
             num_attention_heads=2, intermediate_size=8, image_size=4, patch_size=2)  # fmt: skip
BUNNY = dict(
    model_type="bunny-llama", hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, vocab_size=32, mm_projector_type="mlp2x_gelu",
    vision_config=TOWER,
)  # fmt: skip
LARGER = BUNNY | dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=512,
    vision_config=TOWER | dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=3,
                               intermediate_size=768, image_size=8, patch_size=1),
)  # fmt: skip


def model(family, hf, lora=None, remat="off"):
    """A family, its config, and its parameters in the abstract."""
    family = registry.family(family)
    config = family.Config.from_hf(hf)
    made = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), lora=lora, remat=remat))
    return config, made, paths.flatten(nnx.state(made))


def sizes_of(names):
    return {name: math.prod(x.shape) for name, x in names.items()}


def chosen(names, **settings):
    lora = LoRASettings(rank=settings.pop("rank", 0))
    return state.chosen_by(RunSettings(lora=lora, **settings), list(names))


# A row of ten tokens and one image. The tower runs two of its layers on 4 patches and a class.
VISION = 2 * (5 * 2 * (4 * 4 * 4 + 2 * 4 * 8) + 4 * 2 * 2 * 3 * 4) + 2 * (4 * 4 * 5 * 5)
PROJECTOR = 2 * 4 * (4 * 8 + 8 * 8)
LAYERS = 2 * 10 * 2 * (4 * 8 * 8 + 3 * 8 * 16)
SCORES = 2 * 4 * 8 * 55
HEAD = 2 * 10 * 8 * 32


@pytest.mark.parametrize(
    "trained, want",
    [
        (dict(), 3 * (VISION + PROJECTOR + LAYERS + SCORES + HEAD)),
        # Gradients reach the projector through all of the language model, and end there.
        (dict(train=("projector.*",)), VISION + 3 * (PROJECTOR + SCORES) + 2 * (LAYERS + HEAD)),
        (dict(train=("projector.*", "decoder.*")),
         VISION + 3 * (PROJECTOR + LAYERS + SCORES + HEAD)),
        (dict(rank=2, train=("projector.*",)),
         VISION + 3 * (PROJECTOR + SCORES) + 2 * (LAYERS + HEAD)),
        (dict(rank=2), VISION + PROJECTOR + 3 * SCORES + 2 * (LAYERS + HEAD)),
        (dict(train=("decoder.head.*",)), VISION + PROJECTOR + LAYERS + SCORES + 3 * HEAD),
        (dict(train=("vision.*",)), 3 * (VISION + SCORES) + 2 * (PROJECTOR + LAYERS + HEAD)),
    ],
    ids=["all", "stage 1", "stage 2", "stage 2 with adapters", "adapters", "head", "tower"],
)  # fmt: skip
def test_of_a_bunny(trained, want):
    lora = LoRA(2, 4.0, ("attn.q", "mlp.up")) if "rank" in trained else None
    config, _, names = model("bunny", BUNNY, lora)
    way = config.work(10, visual=1, width=config.patch_dim)
    assert train_flops(way, sizes_of(names), chosen(names, **trained)) == want


def test_of_a_flamingo_that_trains_resampler_and_gated_blocks():
    """Three media of two frames before ten tokens: the tower goes forward alone."""
    config, _, names = model("flamingo", small_flamingo.hf_config())
    data = DataSettings(max_targets=10, batch_size=4)
    trained = chosen(names, train=("perceiver.*", "cross.*"))
    flops = step_flops(config, data, sizes_of(names), trained)
    tower = 2 * (6 * 5 * 2 * (4 * 16 * 16 + 2 * 16 * 32) + 6 * 4 * 16 * 3 * 16)
    tower += 2 * 4 * 16 * 6 * 5 * 5
    resampler = 2 * 3 * (2 * 16 * (16 * (4 + 12) + 4 * 16 * 4) + 2 * 16 * 12 * 4)
    keys = 2 * 3 * 2 * 4 * 2 * 16 * 16
    gated = 2 * 10 * (2 * 2 * 16 * (16 + 4 * 16) + 2 * 2 * 16 * 4)
    layers, scores = 2 * 10 * 2 * (4 * 16 * 16 + 2 * 16 * 64), 2 * 4 * 16 * 55
    head = 2 * 10 * 16 * 320
    want = tower + 3 * (resampler + keys + gated + scores) + 2 * (layers + head)
    batch = {"tokens": np.zeros((4, 10)), "patches": np.zeros((4, 3, 2 * config.patch_dim))}
    assert flops(batch) == 4 * want
    # No picture in the row: the language model alone, and nobody looks at anything.
    text = step_flops(config, data, sizes_of(names), chosen(names))
    blind = gated - 2 * 10 * 2 * 2 * 16 * 4
    batch["patches"] = batch["patches"][:, :0]
    assert text(batch) == 4 * 3 * (blind + layers + scores + head)


def test_a_part_that_is_trained_by_half():
    way = (Work({"a.*": 10.0}, 5.0), Work({"b.*": 100.0, "a.x": 8.0}))
    sizes = {"a.x": 3, "a.y": 1, "a.y.lora_a": 7, "b.z": 2}
    assert train_flops(way, sizes, {"a.x"}) == (15 + 7.5 + 20) + (108 + 8 + 108)
    assert train_flops(way, sizes, {"a.y.lora_a"}) == (15 + 20) + (108 + 108)
    assert train_flops(way, sizes, {"b.z"}) == 15 + (108 + 100 + 108)


@pytest.mark.parametrize(
    "family, hf",
    [
        ("bunny", BUNNY),
        ("flamingo", small_flamingo.hf_config()),
        ("flamingo", small_flamingo.hf_config("llama") | {"max_num_frames": 2}),
        ("fuyu", tiny.CONFIG.to_hf()),
        ("language", dict(model_type="opt", hidden_size=8, num_hidden_layers=1, vocab_size=8,
                          num_attention_heads=2, ffn_dim=8, max_position_embeddings=8)),
    ],
    ids=["bunny", "flamingo", "frames", "fuyu", "learned positions"],
)  # fmt: skip
def test_every_parameter_is_on_the_way(family, hf):
    config, _, names = model(family, hf)
    patterns = [p for work in config.work(4, visual=1, width=1) for p in work.maps]
    assert [n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in patterns)] == []


@pytest.mark.parametrize(
    "train", [("*",), ("projector.*",), ("decoder.*",)], ids=["all", "stage 1", "decoder"]
)
def test_it_is_near_to_what_the_compiler_counts(train, monkeypatch):
    """One layer of each: the compiler counts the body of a scan once."""
    monkeypatch.setattr("mmjax.models.decoder.TRIM_LIMIT", 0)
    monkeypatch.setattr("mmjax.ops.flash_xla.CPU_BLOCK_BYTES", 2**30)  # no loop over rows either
    config, made, names = model("bunny", LARGER)
    trained, t = chosen(names, train=train), 64
    graphdef, params, frozen = state.split(made, trained)
    ints = dict.fromkeys(("tokens", "positions", "visual_index", "segment_ids"), t)
    ints["target_index"] = t
    batch = {k: jax.ShapeDtypeStruct((1, n), jnp.int32) for k, n in ints.items()}
    batch["patches"] = jax.ShapeDtypeStruct((1, 1, config.patch_dim), jnp.uint8)

    def loss(params, frozen, batch):
        return loss_sum(nnx.merge(graphdef, params, frozen), batch)[0]

    cost = jax.jit(jax.grad(loss)).lower(params, frozen, batch).compile().cost_analysis()
    way = config.work(t, visual=1, width=config.patch_dim)
    np.testing.assert_allclose(train_flops(way, sizes_of(names), trained), cost["flops"], rtol=0.05)
