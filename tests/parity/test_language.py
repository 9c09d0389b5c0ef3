"""Language models against transformers' own, saved in its own format and read by our tables."""

import numpy as np
import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers.models.persimmon.modeling_persimmon import PersimmonAttention

import mmjax
from mmjax.models import exports, opening, pretrained
from mmjax.parallel.mesh import use
from mmjax.types import MMJaxError
from tests.parity.parameters import read_all

VOCAB, WIDTH, LAYERS, HEADS = 96, 32, 3, 4
EOS = 1


def hf(name, **more):
    """A model of transformers whose config has the usual words."""
    sizes = dict(hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=LAYERS)
    sizes |= dict(intermediate_size=80, vocab_size=VOCAB, eos_token_id=EOS, pad_token_id=0)
    config = getattr(T, f"{name}Config")(**sizes | more)
    return getattr(T, f"{name}ForCausalLM")(config)


def fused_phi():
    """Phi as Hugging Face had it first, with Persimmon's attention, of which that was a copy."""
    peer = hf("Phi")
    for i, layer in enumerate(peer.model.layers):
        layer.self_attn = PersimmonAttention(peer.config, i)
    return peer


def mpt(**more):
    sizes = dict(d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS, max_seq_len=64) | more
    return T.MptForCausalLM(T.MptConfig(**sizes, vocab_size=VOCAB, eos_token_id=EOS))


def opt():
    sizes = dict(hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=LAYERS)
    return T.OPTForCausalLM(
        T.OPTConfig(
            **sizes, ffn_dim=80, vocab_size=VOCAB, word_embed_proj_dim=WIDTH, eos_token_id=EOS,
            max_position_embeddings=64, dropout=0.0,
        )
    )  # fmt: skip


PEERS = {
    "llama": lambda: hf("Llama"),
    # SmolLM2's switches: grouped queries, tied head, a stated theta; and Llama 3.1's frequencies:
    # of four, one stays, one blends, two are divided.
    "llama_tied_gqa": lambda: hf(
        "Llama", num_key_value_heads=2, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 60,
        },
    ),
    "llama_bias": lambda: hf("Llama", attention_bias=True, mlp_bias=True),
    "mpt": mpt,
    "mpt_six_heads_clipped": lambda: mpt(
        d_model=48, n_heads=6, attn_config=dict(clip_qkv=0.5)
    ),
    "neox_parallel": lambda: hf("GPTNeoX"),
    "neox_sequential": lambda: hf(
        "GPTNeoX", use_parallel_residual=False,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0
        },
    ),
    "opt": opt,
    "phi": lambda: hf("Phi"),
    "phi_fused": fused_phi,
    "stablelm_gqa": lambda: hf("StableLm", num_key_value_heads=2, use_qkv_bias=True),
    "qwen2": lambda: hf("Qwen2", num_key_value_heads=HEADS),
    "phi3_window": lambda: hf("Phi3", sliding_window=6),
    "gemma_wide_heads": lambda: hf("Gemma", head_dim=16, num_key_value_heads=1),
}  # fmt: skip


IN_SHORT = {"llama_tied_gqa", "mpt"}  # rotary positions, ALiBi
ANSWERING = [
    pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.heavy) for name in PEERS
]


@pytest.fixture(scope="module", params=PEERS)
def pair(request, tmp_path_factory):
    """The peer, and ours of its saved folder; every tensor of it random, biases and norms too."""
    torch.manual_seed(1)
    peer = PEERS[request.param]().eval()
    for parameter in peer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("lm") / request.param
    peer.save_pretrained(folder)
    return peer, mmjax.load(folder), folder


RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(2, VOCAB, n) for n in (19, 7)]


def test_logits_equal(pair):
    peer, ours, _ = pair
    for prompt in PROMPTS:
        with torch.no_grad():
            want = peer(torch.from_numpy(prompt)[None]).logits[0].numpy()
        tokens, got = ours.logits(prompt.tolist())
        np.testing.assert_array_equal(tokens, prompt)
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("pair", ANSWERING, indirect=True)
def test_greedy_tokens_are_the_same_alone_and_in_a_batch(pair):
    peer, ours, _ = pair
    got = ours.generate([p.tolist() for p in PROMPTS], max_new_tokens=12)
    for prompt, text in zip(PROMPTS, got, strict=True):
        with torch.no_grad():
            out = peer.generate(
                torch.from_numpy(prompt)[None], max_new_tokens=12, do_sample=False,
                pad_token_id=0, use_cache=True,
            )[0, len(prompt) :].tolist()  # fmt: skip
        want = out[: out.index(EOS)] if EOS in out else out
        assert text.split() == [str(t) for t in want]
        assert ours.generate(prompt.tolist(), max_new_tokens=12) == [text]


def test_an_export_is_read_by_transformers(pair, tmp_path):
    peer, _, folder = pair
    opened = opening.open_pretrained(folder)
    with use():
        abstract = pretrained.abstract_params(opened.family, opened.config)
    tensors, files = exports.plan_export(opened, abstract)
    exports.write_export(tmp_path / "out", tensors, files)
    again = type(peer).from_pretrained(tmp_path / "out").eval()
    ids = torch.from_numpy(PROMPTS[0])[None]
    with torch.no_grad():
        np.testing.assert_allclose(again(ids).logits, peer(ids).logits, atol=1e-5)


@pytest.mark.heavy
def test_learned_positions_reach_as_far_as_their_table_and_no_further(tmp_path):
    """The peer fails there, too; a lookup here would take the last row again and again."""
    torch.manual_seed(3)
    peer = opt().eval()
    peer.save_pretrained(tmp_path)
    ours, prompt = mmjax.load(tmp_path), RNG.integers(2, VOCAB, 62)
    with torch.no_grad():
        want = peer.generate(
            torch.from_numpy(prompt)[None], max_new_tokens=3, do_sample=False, eos_token_id=None
        )[0, 62:]
    assert ours.generate(prompt, max_new_tokens=3) == [" ".join(map(str, want.tolist()))]
    with pytest.raises(
        MMJaxError, match="62 tokens and 4 new ones need 65 positions.*table has 64"
    ):
        ours.generate(prompt, max_new_tokens=4)
    with pytest.raises(MMJaxError, match="need 65 positions"):
        ours.logits([2] * 65)
    with pytest.raises(MMJaxError, match="integer token ids, not float64"):
        ours.logits([2.5, 3.0])


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], []])
def test_an_adapter_with_a_table_of_its_own_needs_an_untied_head(tmp_path, saved):
    """PEFT's copies are tied to nothing, and here one table serves as both."""
    peer = PEERS["llama_tied_gqa"]()
    peer.save_pretrained(tmp_path / "base")
    tying = not saved  # the copies are then one
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=saved or ["embed_tokens"],
        ensure_weight_tying=tying, task_type="CAUSAL_LM",
    )  # fmt: skip
    peer = get_peft_model(peer, config).eval()
    for name, parameter in peer.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path / "adapter")
    if not tying:
        with pytest.raises(MMJaxError, match=f"{saved[-1]}.weight.* of its own.*tie_word_embedd"):
            mmjax.load(tmp_path / "adapter", base=tmp_path / "base")
        return
    with torch.no_grad():
        want = peer(torch.from_numpy(PROMPTS[0])[None]).logits[0].numpy()
    _, got = mmjax.load(tmp_path / "adapter", base=tmp_path / "base").logits(PROMPTS[0].tolist())
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_tied_model_with_another_head_in_its_files_is_refused(tmp_path):
    """The peer keeps both then; a copy of the embedding is what older saves hold."""
    peer = PEERS["llama_tied_gqa"]().eval()
    state = {key: value.clone() for key, value in peer.state_dict().items()}
    peer.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    with torch.no_grad():
        want = peer(torch.from_numpy(PROMPTS[0])[None]).logits[0].numpy()
    got = mmjax.load(tmp_path).logits(PROMPTS[0].tolist())[1]
    np.testing.assert_allclose(got, want, atol=1e-4)
    state["lm_head.weight"][-1, 0] += 1
    save_file(state, tmp_path / "model.safetensors")
    theirs = type(peer).from_pretrained(tmp_path)
    assert theirs.lm_head.weight is not theirs.model.embed_tokens.weight
    with pytest.raises(MMJaxError, match="lm_head.weight is another table than model.embed_tokens"):
        mmjax.load(tmp_path)


@pytest.mark.parametrize("adapted", [True, False])
def test_a_head_that_has_another_name_in_files_is_adapted_or_trained_whole(
    tmp_path, adapted, caplog
):
    """PEFT says lm_head of GPT-NeoX's, which files call embed_out; so does our own export."""
    peer = PEERS["neox_parallel"]()
    peer.save_pretrained(tmp_path / "base")
    more = dict(target_modules=["lm_head"] if adapted else ["dense"])
    more |= {} if adapted else dict(modules_to_save=["lm_head"], bias="lora_only")
    peer = get_peft_model(peer, LoraConfig(r=2, **more))
    for parameter in peer.parameters():
        parameter.data.add_(torch.randn_like(parameter) if parameter.requires_grad else 0.0)
    peer.save_pretrained(tmp_path / "adapter")
    opened, ours = read_all(tmp_path / "adapter", base=tmp_path / "base")
    head = peer.base_model.model.lm_head
    with use():
        abstract = pretrained.abstract_params(opened.family, opened.config, lora=opened.lora)
    _, files = exports.plan_export(opened, abstract, adapter=True)
    if adapted:
        for name, pair in (("lora_a", head.lora_A), ("lora_b", head.lora_B)):
            want = pair["default"].weight.detach().numpy().T
            np.testing.assert_array_equal(ours[f"decoder.head.{name}"], want)
        assert opened.trained == () and files["adapter_config.json"]["target_modules"] == [
            "lm_head"
        ]
        return
    want = head.modules_to_save["default"].weight.detach().numpy().T
    np.testing.assert_array_equal(ours["decoder.head.kernel"], want)
    assert set(opened.trained) == {"decoder.head.kernel", "decoder.layers.attn.o.bias"}
    assert "leaves out decoder.head.kernel, decoder.layers.attn.o.bias" in caplog.text


def test_an_adapter_of_a_table_of_tokens_is_refused(tmp_path):
    peer = PEERS["llama"]()
    peer.save_pretrained(tmp_path / "base")
    get_peft_model(peer, LoraConfig(target_modules=["embed_tokens"])).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(MMJaxError, match="adapts a table of tokens .model.embed_tokens.lora_emb"):
        mmjax.load(tmp_path / "adapter", base=tmp_path / "base")


def check_adapted(peer, targets, folder):
    """Adapt a peer with random pairs, save it in base and adapter: the answers are PEFT's."""
    torch.manual_seed(2)
    peer.save_pretrained(folder / "base")
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    peer = get_peft_model(peer, config).eval()
    for name, parameter in peer.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    peer.save_pretrained(folder / "adapter")
    with torch.no_grad():
        want = peer(torch.from_numpy(PROMPTS[0])[None]).logits[0].numpy()
    _, got = mmjax.load(folder / "adapter", base=folder / "base").logits(PROMPTS[0].tolist())
    np.testing.assert_allclose(got, want, atol=1e-4)
    _, bare = mmjax.load(folder / "base").logits(PROMPTS[0].tolist())
    assert np.abs(got - bare).max() > 0.05


def test_an_adapter_of_the_head_counts_and_needs_an_untied_one(tmp_path):
    check_adapted(PEERS["llama"](), ["lm_head"], tmp_path)
    PEERS["llama_tied_gqa"]().save_pretrained(tmp_path / "tied")
    with pytest.raises(MMJaxError, match="1 are none of this model's, first lm_head"):
        mmjax.load(tmp_path / "adapter", base=tmp_path / "tied")


@pytest.mark.heavy
def test_an_adapter_of_peft_on_fused_maps_answers_as_it_does_there(tmp_path):
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    check_adapted(PEERS["phi3_window"](), targets, tmp_path)
