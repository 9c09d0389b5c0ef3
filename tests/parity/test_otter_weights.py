"""Otter's folders beside its own: what save_pretrained writes is read, and written back alike."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import mmjax
from convert_weights import to_hf, to_jax
from mmjax.types import MMJaxError
from tests.parity import otter_golden

# What the peer's configuration reads of MPT and MosaicGPT, and has no usable default for.
READ = {
    "mpt": ("architectures", "model_type", "hidden_size", "d_model", "n_heads", "n_layers",
            "expansion_ratio", "max_seq_len", "vocab_size", "no_bias", "norm_type", "logit_scale"),
    "mosaic1b": ("architectures", "model_type", "hidden_size", "d_model", "n_heads", "n_layers",
                 "mlp_ratio", "max_seq_len", "vocab_size", "no_bias", "alibi", "attn_qk_ln",
                 "attn_impl", "logit_scale"),
    "llama": ("architectures", "model_type", "hidden_size", "intermediate_size", "vocab_size",
              "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "rms_norm_eps",
              "rope_theta", "hidden_act", "max_position_embeddings"),
}  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("lm", READ)
def test_a_folder_comes_back_as_the_peer_wrote_it(tmp_path, lm):
    golden = otter_golden.load(lm)
    folder = otter_golden.write_folder(golden, tmp_path / "peer")
    to_jax.main([str(folder), str(tmp_path / "jax")])
    to_hf.main([str(tmp_path / "jax"), str(tmp_path / "out")])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == golden.weights.keys()
    for key, value in golden.weights.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    theirs = golden.config["config"]
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("model_type", "architectures", "cross_attn_every_n_layers", "max_num_frames"):
        assert ours[key] == theirs[key], key
    for key in READ[lm]:
        assert ours["text_config"][key] == theirs["text_config"][key], key
    if lm == "mpt":
        said = ours["text_config"]["attn_config"]
        assert said == {key: theirs["text_config"]["attn_config"][key] for key in said}
        assert said["attn_impl"] == "torch"
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.heavy
def test_the_language_models_own_tokenizer_gets_the_peers_tokens(tmp_path):
    """Otter's class adds them as it loads: <answer> is the third, and <PAD> comes behind it."""
    golden = otter_golden.load("mpt")
    ids, folder = golden.config["ids"], otter_golden.write_folder(golden, tmp_path / "peer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    otter_golden.byte_tokenizer(with_pad=False).save_pretrained(folder)
    to_jax.main([str(folder), str(tmp_path / "jax")])
    for one in map(mmjax.load, (folder, tmp_path / "jax")):
        assert one.config.answer_token_id == one.processor.config.answer_token_id == ids["answer"]
        assert one.config.media_token_id == ids["image"]
        assert one.encode("GPT:<answer>")["tokens"][-1] == ids["answer"]


def test_a_video_model_takes_as_many_frames_as_it_is_told(tmp_path):
    golden = otter_golden.load("llama")
    width = golden.weights["perceiver.latents"].shape[1]
    golden.weights["perceiver.media_time_embs"] = np.ones((3, 1, width), np.float32)
    folder = otter_golden.write_folder(golden, tmp_path / "peer")
    most, frame = golden.config["config"]["max_num_frames"], np.zeros((9, 9, 3), np.uint8)
    one, two = mmjax.load(folder), mmjax.load(folder, processor={"frames": 2})
    with pytest.raises(MMJaxError, match="holds 2 frames and the model takes 1"):
        one.encode("<image>what?", [[frame, frame]])
    encoded = two.encode("<image>what?", [[frame, frame]])
    assert encoded["patches"].shape == (1, 2 * two.config.patch_dim)
    assert one.processor.config.max_media == 3
    with pytest.raises(MMJaxError, match="4 media and the model has embeddings of 3"):
        one.encode("<image>" * 4, [frame] * 4)
    with pytest.raises(MMJaxError, match=f"{most + 1} frames and .* embeddings of {most}"):
        mmjax.load(folder, processor={"frames": most + 1})
