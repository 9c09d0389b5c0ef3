"""Which config.json is which language model, and which are refused."""

import dataclasses
import json
import types

import pytest
import torch
import transformers as T
from flax import nnx

from mmjax.loaded import LoadedModel
from mmjax.models import exports, opening, pretrained, registry
from mmjax.models.flamingo.config import FlamingoConfig
from mmjax.models.language.architectures import ARCHITECTURES, architecture
from mmjax.models.language.processor import LanguageProcessor
from mmjax.models.vision_config import read_vision_config
from mmjax.parallel.mesh import use
from mmjax.types import MMJaxError

BASE = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
)


MPT = dict(model_type="mpt", vocab_size=64, d_model=32, n_heads=4, n_layers=2)


def test_the_registry_names_every_architecture():
    aliases = {alias for one in ARCHITECTURES.values() for alias in one.aliases}
    assert set(registry.LANGUAGES) == set(ARCHITECTURES) | aliases


def test_stablelm_epoch_says_the_same_in_other_words():
    new = dict(model_type="stablelm", layer_norm_eps=1e-6, partial_rotary_factor=0.5)
    old = dict(model_type="stablelm_epoch", norm_eps=1e-6, rope_pct=0.5)
    new, old = (dict(**BASE, **more, use_qkv_bias=True) for more in (new, old))
    config = registry.family("language").Config.from_hf(old)
    assert config == registry.family("language").Config.from_hf(new)
    assert config.to_hf()["model_type"] == "stablelm"


def test_gpt_neox_is_rotated_as_its_own_words_say():
    """transformers reads no others at the top of its config.json."""
    said = dict(BASE, model_type="gpt_neox", rotary_pct=0.5, rotary_emb_base=500)
    decoder = architecture(said).decoder(said | dict(partial_rotary_factor=1.0, rope_theta=10_000))
    assert (decoder.rope_fraction, decoder.rope_theta) == (0.5, 500.0)
    alone = dict(BASE, model_type="gpt_neox", partial_rotary_factor=1.0, rope_theta=500)
    assert rotation_of(alone) == peers_rotation(alone) == (0.25, 10_000.0)


@pytest.mark.parametrize("top", [{}, {"rope_theta": 700.0, "partial_rotary_factor": 1.0}])
def test_nothing_of_rope_parameters_counts_beside_a_rope_scaling(top):
    """As transformers reads both: what the second leaves out is that of the top, or the default."""
    new = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}
    said = dict(BASE, **top, model_type="phi", rope_parameters=new)
    assert rotation_of(said) == peers_rotation(said) == (0.25, 500.0)
    said["rope_scaling"] = {"type": "default"}
    want = (1.0, 700.0) if top else (0.5, 10_000.0)
    assert rotation_of(said) == peers_rotation(said) == want
    said["rope_scaling"] = {}  # states nothing
    assert rotation_of(said) == peers_rotation(said) == (0.25, 500.0)


def rotation_of(said):
    """Our part of a head that is rotated, and the base."""
    decoder = architecture(said).decoder(said)
    return decoder.rope_fraction, decoder.rope_theta


def peers_rotation(said):
    said = json.loads(json.dumps(said))  # it writes into what it is given
    read = T.AutoConfig.for_model(said.pop("model_type"), **said).rope_parameters
    return read["partial_rotary_factor"], read["rope_theta"]


@pytest.mark.parametrize(
    "said, names",
    [
        (dict(model_type="phi", qk_layernorm=True), "qk_layernorm True"),
        (dict(model_type="phi", tie_word_embeddings=True), "tie_word_embeddings True"),
        (dict(model_type="llama", partial_rotary_factor=0.5), "llama .* partial_rotary_factor 0.5"),
        (dict(model_type="gpt_neox", rotary_pct=0.375), "rotate 3 of a head's 8 dimensions"),
        (dict(model_type="gpt_neox", head_dim=4), "head_dim 4; supported is None or 8"),
        (dict(model_type="phi", head_dim=4), "head_dim 4"),
        (dict(model_type="stablelm", head_dim=4), "head_dim 4"),
        (dict(model_type="phi3", num_key_value_heads=2), "num_key_value_heads 2"),
        (dict(model_type="phi3", rope_scaling={"type": "su"}), "phi3 model says rope_type 'su'"),
        (dict(model_type="qwen2", use_sliding_window=True), "use_sliding_window True"),
        (dict(model_type="llama", rope_scaling={"rope_type": "yarn"}), "rope_type 'yarn'"),
        (dict(model_type="llama", rope_scaling="linear"), "rope_scaling 'linear'; give an object"),
        (dict(model_type="llama", rope_parameters={"rope_theta": "1e4"}), "rope_theta '1e4'; give"),
        (dict(model_type="phi", partial_rotary_factor="half"), "partial_rotary_factor 'half'; giv"),
        (dict(model_type="llama", rope_scaling={"rope_type": "llama3"}), "without factor, low_f"),
        (
            dict(
                model_type="llama",
                rope_parameters={"rope_type": "default"},
                rope_scaling={"type": "linear", "factor": 2.0},
            ),
            "rope_type 'linear'",
        ),
        (dict(model_type="gemma", hidden_activation="gelu"), "hidden_activation 'gelu'"),
        (dict(model_type="stablelm", rotary_scaling_factor=2.0), "rotary_scaling_factor 2.0"),
        (dict(**MPT, tie_word_embeddings=False), "tie_word_embeddings False"),
        (dict(**MPT, norm_type="rmsnorm"), "norm_type 'rmsnorm'"),
        (dict(**MPT, attn_config={"rope": True, "model_type": ""}), "a mpt model says rope True"),
        (dict(**MPT, attn_config={"sliding_window_size": 4}), "sliding_window_size 4"),
        (dict(**MPT, ffn_config={"ffn_type": "mptglu"}), "ffn_type 'mptglu'"),
        (dict(MPT, model_type="mosaic_gpt", alibi=False), "alibi False"),
        (dict(model_type="llama", hidden_size=None), "llama model does not say hidden_size"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(said, names):
    with pytest.raises(MMJaxError, match=names):
        architecture(said).decoder(stated({**BASE, **said}))


def stated(hf):
    """A config.json without the keys that stand for None here."""
    return {key: value for key, value in hf.items() if value is not None}


def test_dropout_that_is_not_done_is_said_once(caplog):
    said = dict(BASE, model_type="llama", attention_dropout=0.125)
    for _ in range(2):
        registry.family("language").Config.from_hf(said)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "config.json of a llama model says attention_dropout 0.125: training here drops nothing of "
        "attention's weights"
    )
    caplog.clear()
    architecture(MPT).decoder({**MPT, "attn_config": {"attn_pdrop": 0.375}})
    read_vision_config({"attention_dropout": 0.0625})
    registry.family("fuyu").Config.from_hf({"text_config": {"attention_dropout": 0.0625}})
    says = [record.getMessage().split(":")[0] for record in caplog.records]
    assert says == [
        "config.json of a mpt model says attn_pdrop 0.375",
        "vision_config of a clip_vision_model says attention_dropout 0.0625",
        "config.json of a fuyu model says attention_dropout 0.0625",
    ]
    caplog.clear()
    registry.family("language").Config.from_hf(said | dict(attention_dropout=0.0))
    assert not caplog.records


def test_dropout_of_mpt_and_fuyu_comes_back_from_their_files():
    mpt = dict(**MPT, resid_pdrop=0.25, emb_pdrop=0.5, expansion_ratio=1.5)
    config = registry.family("language").Config.from_hf(mpt)
    assert (config.decoder.residual_dropout, config.decoder.embedding_dropout) == (0.25, 0.5)
    assert {key: config.to_hf()[key] for key in mpt} == mpt
    fuyu = registry.family("fuyu").Config.from_hf({"hidden_dropout": 0.25})
    decoder = fuyu.decoder
    assert (decoder.residual_dropout, decoder.residual_dropout_on) == (0.25, "mlp")
    assert fuyu.to_hf()["text_config"]["hidden_dropout"] == 0.25


def test_what_other_parts_say_and_is_unknown_is_refused():
    with pytest.raises(MMJaxError, match="vision_config says activation 'mish'.*one of relu2"):
        read_vision_config({"hidden_act": "mish"})
    assert read_vision_config({"hidden_act": "gelu_fast"}).activation == "gelu_tanh"
    with pytest.raises(MMJaxError, match="hidden_size 768 and no num_attention_heads"):
        read_vision_config({"hidden_size": 768})  # of CLIP-B 12, not the 16 of CLIP-L
    for odd in (["gelu"], {"name": "gelu"}, 1):
        with pytest.raises(MMJaxError, match="vision_config says activation .*one of relu2"):
            read_vision_config({"hidden_act": odd})
        with pytest.raises(MMJaxError, match="vision_config says model_type .*one of clip_"):
            read_vision_config({"model_type": odd})
        with pytest.raises(MMJaxError, match="config.json of a Fuyu says activation .*one of"):
            registry.family("fuyu").Config.from_hf({"hidden_act": odd})
    for key in ("text_config", "rope_parameters", "rope_scaling"):
        with pytest.raises(MMJaxError, match=f"a Fuyu says {key} 'x'; give an object"):
            registry.family("fuyu").Config.from_hf({key: "x"})
    for key in ("text_config", "vision_config", "perceiver_config", "cross_config"):
        with pytest.raises(MMJaxError, match=f"a Flamingo says {key} .1.; give an object"):
            FlamingoConfig.from_hf({"text_config": dict(BASE, model_type="llama"), key: [1]})
    with pytest.raises(MMJaxError, match="a Fuyu says partial_rotary_factor .0.5.; give a number"):
        registry.family("fuyu").Config.from_hf({"text_config": {"partial_rotary_factor": [0.5]}})
    with pytest.raises(MMJaxError, match="config.json of a Fuyu says activation 'mish'"):
        registry.family("fuyu").Config.from_hf({"hidden_act": "mish"})
    with pytest.raises(MMJaxError, match="a Fuyu says head_dim 32; supported is .*, 64"):
        registry.family("fuyu").Config.from_hf({"head_dim": 32})


def test_where_no_end_is_stated_the_tokenizers_ends_an_answer(tmp_path):
    """Phi-1.5 states null; token 0 is an exclamation mark there, and ends nothing."""
    config = registry.family("language").Config.from_hf(
        dict(BASE, model_type="phi", eos_token_id=None)
    )
    assert config.end_token_ids == () and config.to_hf()["eos_token_id"] is None
    tokenizer = types.SimpleNamespace(eos_token_id=7)
    beyond = types.SimpleNamespace(eos_token_id=config.vocab_size)
    for own, want in ((tokenizer, (7,)), (beyond, ()), (None, ())):
        asked = LoadedModel("language", config, None, LanguageProcessor(own), None)
        assert asked.end_tokens() == want
    listed = dataclasses.replace(asked, ends=(5,), processor=LanguageProcessor(tokenizer))
    assert listed.end_tokens() == (5,)
    model = registry.family("language").Model
    with use() as mesh:
        model = model(config, rngs=nnx.Rngs(0))
        asked = dataclasses.replace(asked, model=model, mesh=mesh)
    assert len(asked.generate([3, 4], max_new_tokens=5)[0].split()) == 5


def test_a_flamingo_on_a_language_model_that_none_was_built_on_is_refused():
    text = dict(**BASE, model_type="phi")
    with pytest.raises(MMJaxError, match="'phi'.*no language model of a Flamingo; one of llama"):
        FlamingoConfig.from_hf({"text_config": text})


def test_bunny_drops_the_bias_of_phis_head_and_transformers_takes_zeros(tmp_path):
    """The file of a Phi without one is complete, and its export is what transformers computes."""
    config = registry.family("language").Config.from_hf(
        dict(**BASE, model_type="phi", lm_head_bias=False)
    )
    assert not config.decoder.head_bias
    torch.manual_seed(0)
    peer = T.PhiForCausalLM(T.PhiConfig(**BASE, pad_token_id=0)).eval()
    state = peer.state_dict()
    assert not state.pop("lm_head.bias").any()
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    torch.save(state, tmp_path / "pytorch_model.bin")
    again = T.PhiForCausalLM.from_pretrained(tmp_path).eval()
    opened = opening.open_pretrained(tmp_path)
    tensors, _ = exports.plan_export(
        opened, pretrained.abstract_params(opened.family, opened.config)
    )
    assert {t.key for t in tensors} == set(state)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, peer(ids).logits)
