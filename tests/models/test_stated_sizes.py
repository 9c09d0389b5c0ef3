"""Sizes that no model has, in a config.json or ``model.config``, are named as they are read."""

import dataclasses

import pytest

from mmjax.models.bunny.config import BunnyConfig
from mmjax.models.flamingo.config import FlamingoConfig
from mmjax.models.fuyu.model import FuyuConfig
from mmjax.models.language.model import LanguageConfig
from mmjax.models.stated_sizes import with_values
from mmjax.models.towers import tower_in
from mmjax.models.vision_config import EVA02, read_vision_config
from mmjax.recipes import BUNNY_TOY, FLAMINGO_TOY
from mmjax.types import MMJaxError
from tests.parity import vision_peer

FUYU = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(model_type="llama", vocab_size=64, **FUYU)


@pytest.mark.parametrize(
    "key, value",
    [("num_attention_heads", 0), ("hidden_size", -1), ("num_hidden_layers", 0),
     ("patch_size", "30"), ("intermediate_size", 64.0), ("max_position_embeddings", True)],
)  # fmt: skip
def test_a_size_is_a_whole_number(key, value):
    """They ended in a ZeroDivisionError or within JAX, or made a model without layers."""
    told = f"config.json of a Fuyu says {key} {value!r}; give a whole number from 1 up"
    with pytest.raises(MMJaxError, match=told):
        FuyuConfig.from_hf(FUYU | {key: value})
    if key in FUYU:
        with pytest.raises(MMJaxError, match=told):
            FuyuConfig.from_hf({"text_config": FUYU | {key: value}})
        with pytest.raises(MMJaxError, match=f"llama model says {key} {value!r}"):
            LanguageConfig.from_hf(LLAMA | {key: value})


def test_a_stub_beside_the_sizes_says_nothing():
    assert FuyuConfig.from_hf(FUYU | {"text_config": {"hidden_size": None}}).decoder.d_model == 32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.02, "0.02"])
def test_a_spread_of_weights_is_a_number(value):
    with pytest.raises(MMJaxError, match=f"says initializer_range {value!r}; give a number from 0"):
        FuyuConfig.from_hf(FUYU | {"initializer_range": value})


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "12"])
def test_what_multiplies_or_turns_is_above_nothing(value):
    """Such a model answered with numbers that are none, or with those of another."""
    for key in ("rope_theta", "scale_emb", "scale_depth", "dim_model_base"):
        with pytest.raises(MMJaxError, match=f"says {key} {value!r}; give a number above 0"):
            LanguageConfig.from_hf(LLAMA | {"model_type": "minicpm", key: value})
    if value != "12":
        with pytest.raises(MMJaxError, match="llama model says rope_theta .*; give a number above"):
            LanguageConfig.from_hf(LLAMA | {"rope_parameters": {"rope_theta": value}})


def test_a_size_that_is_null_is_not_stated():
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        with pytest.raises(MMJaxError, match=f"a llama model does not say {key}; give the one"):
            LanguageConfig.from_hf(LLAMA | {key: None})
    nulls = dict.fromkeys(("max_position_embeddings", "rms_norm_eps", "initializer_range"))
    assert LanguageConfig.from_hf(LLAMA | nulls) == LanguageConfig.from_hf(LLAMA)


@pytest.mark.parametrize("value", [0, -1, {}])
def test_a_window_is_a_number_of_tokens(value):
    with pytest.raises(MMJaxError, match="says sliding_window .*; give a whole number from 1 up"):
        LanguageConfig.from_hf(LLAMA | {"model_type": "phi3", "sliding_window": value})
    # Others have none, whatever their file says beside.
    plain, said = LLAMA | {"model_type": "qwen2"}, {"sliding_window": value}
    free = LanguageConfig.from_hf(plain | said | {"use_sliding_window": False})
    assert free == LanguageConfig.from_hf(plain)


def test_an_empty_list_of_end_tokens_states_none():
    assert LanguageConfig.from_hf(LLAMA | {"eos_token_id": []}).end_token_ids == ()


def test_sizes_that_a_towers_json_states_are_checked_beside_its_tensors():
    file = vision_peer.published(EVA02, "eva")
    for key, value in (("image_size", "336"), ("num_hidden_layers", "24")):
        told = f"the vision tower's config .its config.json. says {key} '{value}'; give a whole"
        with pytest.raises(MMJaxError, match=told):
            tower_in(file, "it", stated={key: value})


def test_heads_divide_the_width_unless_theirs_is_stated():
    """Rounded down, a head would be narrower than the one that the peers' files have."""
    seven = {"num_attention_heads": 7, "num_key_value_heads": 7}
    with pytest.raises(MMJaxError, match="a width of 32 and 7 attention heads"):
        FuyuConfig.from_hf(FUYU | seven)
    with pytest.raises(MMJaxError, match="a width of 32 and 7 attention heads"):
        LanguageConfig.from_hf(LLAMA | seven)
    assert LanguageConfig.from_hf(LLAMA | seven | {"head_dim": 8}).decoder.head_dim == 8
    with pytest.raises(MMJaxError, match="num_key_value_heads 3 beside num_attention_heads 4"):
        LanguageConfig.from_hf(LLAMA | {"num_key_value_heads": 3})


def test_parts_of_a_flamingo_are_named():
    for part, key in (("perceiver_config", "num_latents"), ("cross_config", "num_heads")):
        with pytest.raises(MMJaxError, match=f"{part} says {key} 0; give a whole number"):
            FlamingoConfig.from_hf(FLAMINGO_TOY | {part: FLAMINGO_TOY[part] | {key: 0}})
    with pytest.raises(MMJaxError, match="a Flamingo says cross_attn_every_n_layers '2'"):
        FlamingoConfig.from_hf(FLAMINGO_TOY | {"cross_attn_every_n_layers": "2"})
    with pytest.raises(MMJaxError, match="vision_config says num_hidden_layers 0"):
        read_vision_config({"num_hidden_layers": 0})


WRONG = ([1], {"a": 1}, "12", float("nan"), -1.5, 10**400)


@pytest.mark.parametrize("value", WRONG, ids=["list", "object", "text", "nan", "below", "huge"])
def test_a_number_of_another_kind_is_told_wherever_it_stands(value):
    """They ended in a traceback, or a model was made with them that answers nonsense."""
    vision, gated = FLAMINGO_TOY["vision_config"], FLAMINGO_TOY["cross_config"]
    text, mpt = {"model_type": "llama"}, {"model_type": "mpt"}
    scaled = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
    stated = scaled | dict(factor=8.0, original_max_position_embeddings=32)
    for key in stated.keys() - {"rope_type"}:
        with pytest.raises(MMJaxError, match=f"a llama model says {key} .*; give a "):
            LanguageConfig.from_hf(LLAMA | text | {"rope_scaling": stated | {key: value}})
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if value != [1]:
            with pytest.raises(MMJaxError, match=f"says {key} .*; give a token's number"):
                LanguageConfig.from_hf(LLAMA | {key: value})
    for key in ("rope_theta", "partial_rotary_factor"):
        with pytest.raises(MMJaxError, match=f"says {key} .*; give a number"):
            FuyuConfig.from_hf({"text_config": FUYU | {"rope_parameters": {key: value}}})
    for key in ("expansion_ratio", "resid_pdrop", "emb_pdrop"):
        with pytest.raises(MMJaxError, match=f"a mpt model says {key} .*; give a "):
            LanguageConfig.from_hf(FLAMINGO_TOY["text_config"] | mpt | {key: value})
    for key in ("alibi_bias_max", "clip_qkv"):
        with pytest.raises(MMJaxError, match=f"a mpt model says {key} .*; give a number"):
            LanguageConfig.from_hf(FLAMINGO_TOY["text_config"] | {"attn_config": {key: value}})
    with pytest.raises(MMJaxError, match="feature_layer is .*; set it to -1 for the last"):
        read_vision_config(vision | {"feature_layer": value})
    for key in ("image_mean", "image_std"):
        if value != -1.5:
            for read, toy in ((FlamingoConfig, FLAMINGO_TOY), (BunnyConfig, BUNNY_TOY)):
                with pytest.raises(MMJaxError, match=f"{key} is .*; give a number, or 3: one a"):
                    read.from_hf(toy | {key: value})
    with pytest.raises(MMJaxError, match="cross_config says ff_mult .*; give a whole number"):
        FlamingoConfig.from_hf(FLAMINGO_TOY | {"cross_config": gated | {"ff_mult": value}})
    if value != -1.5:
        with pytest.raises(MMJaxError, match="cross_config says gate_init .*; give a number"):
            FlamingoConfig.from_hf(FLAMINGO_TOY | {"cross_config": gated | {"gate_init": value}})
    with pytest.raises(MMJaxError, match="says media_token_id .*; give a token's number"):
        FlamingoConfig.from_hf(FLAMINGO_TOY | {"media_token_id": value})


@pytest.mark.parametrize("value", ["false", [], 0.5, 2])
def test_a_flag_is_true_or_false(value):
    """A text of "false" tied the head to the table."""
    with pytest.raises(MMJaxError, match="says tie_word_embeddings .*; give true or false"):
        LanguageConfig.from_hf(LLAMA | {"tie_word_embeddings": value})
    assert LanguageConfig.from_hf(LLAMA | {"tie_word_embeddings": None}).decoder.tied is False


def test_colours_of_a_config_may_be_one_number_for_all_channels():
    bunny = BunnyConfig.from_hf(BUNNY_TOY | {"image_mean": 0, "image_std": 0.5})
    assert (bunny.image_mean, bunny.image_std) == ((0, 0, 0), (0.5, 0.5, 0.5))


def test_no_more_than_a_whole_head_is_rotated():
    with pytest.raises(MMJaxError, match="partial_rotary_factor 1.5; it is a share of a head"):
        FuyuConfig.from_hf(FUYU | {"partial_rotary_factor": 1.5})


def test_a_bound_of_nothing_bounds_nothing():
    """As ``if self.clip_qkv`` in the peers; all queries, keys and values became 0."""
    text = FLAMINGO_TOY["text_config"] | {"attn_config": {"clip_qkv": 0}}
    assert LanguageConfig.from_hf(text).decoder.clip_qkv is None


def test_what_is_null_in_the_parts_of_a_flamingo_is_not_stated():
    nulls = {"cross_attn_every_n_layers": None, "only_attend_immediate_media": None}
    parts = {
        key: FLAMINGO_TOY[key] | {"ff_mult": None} for key in ("perceiver_config", "cross_config")
    }
    got = FlamingoConfig.from_hf(FLAMINGO_TOY | nulls | parts)
    assert (got.cross_every, got.cross.only_immediate) == (4, True)
    assert (got.perceiver.ff_mult, got.cross.ff_mult) == (4, 4)


def test_a_model_type_of_another_kind_is_told():
    with pytest.raises(MMJaxError, match=r"model_type \['llama'\], which is no language model"):
        LanguageConfig.from_hf(LLAMA | {"model_type": ["llama"]})
    with pytest.raises(MMJaxError, match=r"model_type \['mpt'\] .*, no language model"):
        text = FLAMINGO_TOY["text_config"] | {"model_type": ["mpt"]}
        FlamingoConfig.from_hf(FLAMINGO_TOY | {"text_config": text})


def test_of_an_object_the_values_that_are_given_count():
    hf = FlamingoConfig.from_hf(FLAMINGO_TOY | {"vocab_size": 32_100}).to_hf()
    hf["vision_config"]["hidden_act"] = "gelu"
    found = FlamingoConfig.from_hf(with_values(hf, {"vision_config": {"feature_layer": -2}}))
    was = FlamingoConfig.from_hf(hf)
    assert found.vision == dataclasses.replace(was.vision, feature_layer=-2)
    assert with_values(hf, {"vision_config": {}})["vision_config"] == {}
    assert with_values(hf, {"model_type": "otter"})["text_config"] == hf["text_config"]
    llama = LanguageConfig.from_hf(LLAMA).to_hf()
    longer = LanguageConfig.from_hf(with_values(llama, {"rope_theta": 5e5}))
    assert longer.decoder.rope_theta == 5e5
    both = {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 2e5}}
    assert with_values(llama, both)["rope_parameters"]["rope_theta"] == 2e5
