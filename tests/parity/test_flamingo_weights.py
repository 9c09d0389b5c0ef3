"""Flamingo's published files both ways, from the weights and outputs of OpenFlamingo's own runs."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import mmjax
from convert_weights import inspect, merge, to_hf, to_jax
from mmjax.generate.loop import pad_batch
from mmjax.models import opening
from mmjax.types import MMJaxError
from tests.parity import flamingo_golden, flamingo_parts, flamingo_peer, forward
from tests.parity.parameters import assert_same, options, read_all

FOLDER = flamingo_golden.COMMITTED
EMBED = "decoder.embed.embedding"


@pytest.fixture(scope="module")
def mpt(tmp_path_factory):
    """A golden, the folder of its files, and the keywords that name the parts."""
    return write("mpt", tmp_path_factory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write("llama", tmp_path_factory)


def write(lm, tmp_path_factory):
    golden = flamingo_golden.load(FOLDER / f"flamingo_{lm}.npz")
    folder = tmp_path_factory.mktemp(lm)
    return golden, folder, flamingo_parts.write_parts(golden, folder)


def logits(golden, ours):
    batch, lengths = pad_batch(flamingo_peer.examples(golden))
    out = forward.logits(ours, batch)
    return [row[:n] for row, n in zip(out, lengths, strict=True)]


def assert_logits(ours, theirs, vocabulary=None, atol=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a[:, :vocabulary], b[-len(a) :, :vocabulary], atol=atol)


@pytest.fixture(scope="module")
def whole(mpt):
    """The parameters that the parts of the MPT golden make."""
    return read_all(mpt[1] / "checkpoint.pt", **mpt[2])


def test_parts_answer_as_the_peer_does(mpt, tmp_path):
    golden, folder, parts = mpt
    file = str(folder / "checkpoint.pt")
    ours = logits(golden, mmjax.load(file, **parts))
    assert_logits(ours, golden.logits)
    # The converted folder needs no part any more, and answers alike.
    to_jax.main([file, str(tmp_path / "jax"), *options(parts)])
    again = mmjax.load(tmp_path / "jax")
    assert again.config.media_token_id == golden.config["ids"]["image"]
    assert_logits(logits(golden, again), ours, atol=1e-5)
    with pytest.raises(MMJaxError, match="leave --lm away"):
        mmjax.load(tmp_path / "jax", lm=parts["lm"])


@pytest.mark.heavy
def test_version_1_answers_as_the_peer_does_but_for_tokens_that_its_files_lack(
    llama, tmp_path, caplog
):
    """Both names of the gated blocks, tables of angles, no head: 3 rows of it are zeros here."""
    golden, _, parts = llama
    state = flamingo_parts.trained_state(golden)
    alias = r"^lang_encoder\.model\.layers\.(\d+)\.gated_cross_attn_layer\."
    second = r"lang_encoder.gated_cross_attn_layers.\1."
    state |= {re.sub(alias, second, key): value for key, value in state.items()}
    state["lang_encoder.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    torch.save(flamingo_parts.tensors(state), tmp_path / "v1.pt")
    write_ids(golden, tmp_path)
    ours = logits(golden, mmjax.load(tmp_path / "v1.pt", **parts))
    new = golden.config["ids"]["endofchunk"]
    assert_logits(ours, golden.logits, vocabulary=new)
    assert not ours[0][:, new:].any()
    told = [r.message for r in caplog.records if "zeros for 3 tokens" in r.message]
    assert len(told) == 1 and "lm_head.weight: 258 rows" in told[0]


def write_ids(golden, folder):
    ids = golden.config["ids"]
    config = {"media_token_id": ids["image"], "eoc_token_id": ids["endofchunk"]}
    (folder / "config.json").write_text(json.dumps(config))


def gated_by_alias(state):
    pattern = r"^lang_encoder\.transformer\.blocks\.(\d+)\.gated_cross_attn_layer\."
    return {re.sub(pattern, r"lang_encoder.gated_cross_attn_layers.\1.", k): v
            for k, v in state.items()}  # fmt: skip


def in_training(state):
    """As a distributed run saves it, its optimizer beside."""
    momentum = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5)}}}
    return {
        "epoch": 3,
        "model_state_dict": {f"module.{k}": v for k, v in state.items()},
        "optimizer_state_dict": momentum | {"param_groups": [{"lr": 1e-4, "params": [0]}]},
        "lr_scheduler_state_dict": {"last_epoch": 7, "_step_count": 8},
    }


@pytest.mark.parametrize(
    "form", [gated_by_alias, in_training], ids=["one alias of the gated blocks", "training"]
)
def test_every_form_of_a_checkpoint_holds_the_same(mpt, whole, tmp_path, form):
    golden, _, parts = mpt
    state = flamingo_parts.tensors(flamingo_parts.trained_state(golden))
    torch.save(form(state), tmp_path / "a.pt")
    write_ids(golden, tmp_path)
    assert_same(read_all(tmp_path / "a.pt", **parts)[1], whole[1])


@pytest.mark.parametrize("lm", ["mosaic1b", "neox", "opt"])
def test_parts_of_every_language_model_are_the_peers_whole_state(lm, tmp_path):
    golden = flamingo_golden.load(FOLDER / f"flamingo_{lm}.npz")
    whole = read_all(flamingo_peer.write_folder(golden, tmp_path / "whole"))
    (tmp_path / "parts").mkdir()
    parts = flamingo_parts.write_parts(golden, tmp_path / "parts")
    got = read_all(tmp_path / "parts" / "checkpoint.pt", **parts)
    assert_same(got[1], whole[1])
    assert (got[0].config.cross_every, got[0].config.vocab_size) == (golden.every, 261)


def test_wrappers_names_are_taken_off(mpt, whole, tmp_path):
    state = flamingo_parts.trained_state(mpt[0])
    wrapped = {
        k.replace("perceiver.", "perceiver._fsdp_wrapped_module.").replace(
            "layer.attn.", "layer._checkpoint_wrapped_module.attn."
        ): v
        for k, v in state.items()
    }
    torch.save(flamingo_parts.tensors(wrapped), tmp_path / "a.pt")
    write_ids(mpt[0], tmp_path)
    assert_same(read_all(tmp_path / "a.pt", **mpt[2])[1], whole[1])


def test_the_last_file_of_a_chain_counts(mpt, whole, tmp_path):
    golden, folder, parts = mpt
    later = {k: v + 1 for k, v in golden.weights.items() if k.startswith("perceiver.")}
    torch.save(flamingo_parts.tensors(later), tmp_path / "b.pt")
    got = read_all(f"{folder / 'checkpoint.pt'},{tmp_path / 'b.pt'}", **parts)[1]
    want = {k: v + 1 if k.startswith("perceiver.") else v for k, v in whole[1].items()}
    assert_same(got, want)
    for chain in ("", ",", f"{folder / 'checkpoint.pt'},"):
        with pytest.raises(MMJaxError, match=r"an empty place.*a\.pt,b\.pt"):
            opening.open_pretrained(chain, **parts)


def test_clip_comes_in_any_of_its_files(mpt, whole, tmp_path):
    golden, folder, parts = mpt
    hf = flamingo_parts.write_hf_clip(golden, tmp_path / "clip")
    alone = {k.removeprefix("vision_encoder."): v for k, v in golden.weights.items()
             if k.startswith("vision_encoder.")}  # fmt: skip
    torch.save(flamingo_parts.tensors(alone), tmp_path / "visual.pt")
    file = folder / "checkpoint.pt"
    assert_same(read_all(file, lm=parts["lm"], vision=hf)[1], whole[1])
    assert_same(read_all(file, **{**parts, "vision": tmp_path / "visual.pt"})[1], whole[1])
    assert_same(read_all(file, **{**parts, "vision_config": hf})[1], whole[1])


def test_a_table_that_only_the_language_model_has_is_cut_to_the_tokenizer(mpt, tmp_path):
    golden, _, parts = mpt
    state = flamingo_parts.trained_state(golden)
    state.pop("lang_encoder.transformer.wte.weight")
    torch.save(flamingo_parts.tensors(state), tmp_path / "frozen.pt")
    lm = tmp_path / "lm"
    shutil.copytree(parts["lm"], lm)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {
            "type": "WordLevel",
            "unk_token": "w0",
            "vocab": {f"w{i}": i for i in range(258)},
        },
    }
    (lm / "tokenizer.json").write_text(json.dumps(tokenizer))
    (lm / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w1", "unk_token": "w0"}))
    opened, values = read_all(tmp_path / "frozen.pt", **{**parts, "lm": lm})
    c = opened.config
    assert (c.vocab_size, c.eoc_token_id, c.media_token_id, c.pad_token_id) == (261, 258, 259, 260)
    assert (c.eos_token_id, values[EMBED].shape) == (1, (261, 32))
    assert (values[EMBED] == 7.0).all()  # the hub's rows, none of them lost or new
    # Without a tokenizer the ids are those of a published MPT, which this one is not.
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "frozen.pt", tmp_path / "bare")
    with pytest.raises(MMJaxError, match="media_token_id 50278, outside its 272 rows"):
        read_all(tmp_path / "bare" / "frozen.pt", **parts)


@pytest.mark.parametrize("lm", ["mpt", "llama"])
def test_otters_folder_holds_the_same(request, tmp_path, lm):
    """Names of Otter's files, in shards of .bin, and back: the keys and numbers are theirs."""
    golden = request.getfixturevalue(lm)[0]
    clip = flamingo_parts.write_hf_clip(golden, tmp_path / "clip")
    state = {f"vision_encoder.{k}": v for k, v in load_file(clip / "model.safetensors").items()
             if k.startswith("vision_model.")}  # fmt: skip
    renames = (
        (r"^(perceiver\.layers\.\d)\.0\.", r"\1."),
        (r"^(perceiver\.layers\.\d)\.1\.(\d)", r"\1.feed_forward.\2"),
        (r"\.gated_cross_attn_layer\.ff\.", ".gated_cross_attn_layer.feed_forward."),
    )
    for key, value in golden.weights.items():
        if not key.startswith("vision_encoder.") and (lm == "llama" or "lm_head" not in key):
            for pattern, new in renames:
                key = re.sub(pattern, new, key)
            state[key] = value
    frames = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
    if lm == "mpt":
        state["perceiver.frame_embs"] = frames  # a video model's
    otter = tmp_path / "otter"
    otter.mkdir()
    names = sorted(state)
    for i, some in enumerate((names[::2], names[1::2]), 1):
        torch.save(
            flamingo_parts.tensors({k: state[k] for k in some}),
            otter / f"pytorch_model-0000{i}-of-00002.bin",
        )
    config = {**flamingo_peer.config_json(golden), "model_type": "otter"}
    config["text_config"] = {**config["text_config"], "vocab_size": 258}  # stale there
    (otter / "config.json").write_text(json.dumps(config))
    opened, got = read_all(otter)
    assert (opened.config.vocab_size, opened.config.answer_token_id) == (261, 260)
    want = read_all(flamingo_peer.write_folder(golden, tmp_path / "peer"))[1]
    if lm == "mpt":
        assert opened.config.perceiver.max_frames == 8
        want["perceiver.frame_embed"] = frames
    assert_same(got, want)
    later = {k: v + 1 for k, v in state.items() if k.startswith("perceiver.layers.")}
    torch.save(flamingo_parts.tensors(later), tmp_path / "final_weights.pt")
    chained = read_all(f"{otter},{tmp_path / 'final_weights.pt'}")[1]
    assert_same(chained, {k: v + k.startswith("perceiver.layers.") for k, v in want.items()})
    to_hf.main([str(otter), str(tmp_path / "out")])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(written, state)
    assert read_all(tmp_path / "out")[0].config == opened.config


def test_what_is_exported_for_openflamingo_is_what_it_saves(mpt, llama, tmp_path, whole):
    for golden, folder, parts in (mpt, llama):
        out = tmp_path / golden.lm
        to_hf.main([str(folder / "checkpoint.pt"), str(out), "--layout", "openflamingo",
                    *options(parts)])  # fmt: skip
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        got = {k: v.numpy() for k, v in state.items()}
        head = got.pop("lang_encoder.lm_head.weight", None)
        assert_same(got, flamingo_parts.trained_state(golden))
        assert (head is None) == (golden.lm == "mpt")  # LLaMA's own head is written, too
        assert head is None or not head[258:].any()
    # Read again: with the language model and CLIP the same model, alone an error that names them.
    again = read_all(tmp_path / "mpt", **mpt[2])
    assert_same(again[1], whole[1])
    assert again[0].config == whole[0].config
    with pytest.raises(MMJaxError, match="--lm DIR.*--vision FILE_OR_DIR"):
        opening.open_pretrained(tmp_path / "mpt")
    to_hf.main([str(mpt[1] / "checkpoint.pt"), str(tmp_path / "all"), *options(mpt[2]),
                "--layout", "openflamingo", "--whole"])  # fmt: skip
    assert_same(read_all(tmp_path / "all")[1], whole[1])


def test_a_language_model_that_no_flamingo_has_is_named_with_its_folder(mpt, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "phi"}')
    says = f"--lm {tmp_path}: config.json says model_type 'phi', no language .*those are llama, mpt"
    with pytest.raises(MMJaxError, match=says):
        opening.open_pretrained(mpt[1] / "checkpoint.pt", **{**mpt[2], "lm": tmp_path})


def test_a_layout_that_a_family_lacks_is_refused(mpt, tmp_path):
    argv = [str(mpt[1] / "checkpoint.pt"), str(tmp_path / "x"), *options(mpt[2])]
    with pytest.raises(MMJaxError, match="a flamingo model is written as otter or openflamingo"):
        to_hf.main([*argv, "--layout", "hub"])


@pytest.fixture(scope="module")
def instruct(mpt, tmp_path_factory):
    """The chain of a LoRA checkpoint that PEFT made, its settings, and what PEFT answers."""
    folder = tmp_path_factory.mktemp("instruct")
    with np.load(FOLDER / "flamingo_instruct.npz") as file:
        arrays = {k: file[k] for k in file.files}
    state = {k.removeprefix("w8/"): v.astype(np.float32) * flamingo_golden.W8_STEP
             for k, v in arrays.items() if k.startswith("w8/")}  # fmt: skip
    torch.save({"epoch": 0, "model_state_dict": flamingo_parts.tensors(state)}, folder / "b.pt")
    (folder / "tuning.json").write_text(arrays["tuning"].item())
    parts = {**mpt[2], "tuning_config": folder / "tuning.json"}
    return f"{mpt[1] / 'checkpoint.pt'},{folder / 'b.pt'}", parts, arrays["logits"], state


def test_lora_answers_as_peft_does_merged_or_not(mpt, instruct, tmp_path):
    chain, parts, want, _ = instruct
    ours = mmjax.load(chain, **parts)
    lora = opening.open_pretrained(chain, **parts).lora
    assert (lora.rank, lora.alpha, lora.scale) == (4, 2, 0.5)
    decoder = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"}
    assert set(lora.targets) == decoder | {f"cross.{name}" for name in decoder}
    apart = logits(mpt[0], ours)
    assert_logits(apart, want)
    merge.main([chain, str(tmp_path / "merged"), *options(parts)])
    assert_logits(logits(mpt[0], mmjax.load(tmp_path / "merged")), apart, atol=2e-5)


def test_lora_is_exported_merged_with_every_kernel_it_reaches(mpt, instruct, tmp_path, whole):
    """The file loads over a model that never heard of adapters: W + scale * B A in torch."""
    chain, parts, _, state = instruct
    to_hf.main([chain, str(tmp_path / "x"), *options(parts), "--layout", "openflamingo"])
    written = torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)
    plain = {k: v for k, v in mpt[0].weights.items()}
    want = flamingo_parts.trained_state(mpt[0])
    for key, a in state.items():
        name = key.removeprefix("module.").replace(
            "lang_encoder.base_model.model.", "lang_encoder."
        )
        if ".lora_A." in key:
            b, kernel = (
                state[key.replace("lora_A", "lora_B")],
                name.split(".lora_A.")[0] + ".weight",
            )
            want[kernel] = plain[kernel] + np.float32(0.5) * (b @ a)
        elif ".lora_B." not in key:
            want[name] = a
    assert written.keys() == want.keys()
    for key in want:
        np.testing.assert_allclose(written[key], want[key], atol=1e-5, err_msg=key)


@pytest.mark.heavy
def test_lora_goes_out_and_comes_back_as_an_adapter_of_peft(instruct, mpt, tmp_path):
    chain, parts, _, _ = instruct
    want = read_all(chain, **parts)
    to_hf.main([chain, str(tmp_path / "peft"), "--adapter", *options(parts)])
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    # CLIP has an out_proj as well, and the resampler a feed_forward.1 and a to_kv.
    targets = {"Wqkv", "attn.out_proj", "gated_cross_attn_layer.feed_forward.1", "attn.to_kv"}
    assert targets < set(about["target_modules"]) and about["task_type"] is None
    got = read_all(tmp_path / "peft", base=mpt[1] / "checkpoint.pt", **mpt[2])
    assert got[0].lora == want[0].lora
    pairs = [name for name in want[1] if ".lora_" in name]
    assert len(pairs) == 24
    assert_same({k: got[1][k] for k in pairs}, {k: want[1][k] for k in pairs})


def test_names_of_newer_and_older_peft_are_taken(instruct, mpt, tmp_path):
    chain, parts, _, state = instruct
    kernel = "lang_encoder.transformer.blocks.0.decoder_layer.attn.Wqkv"
    value = mpt[0].weights[f"{kernel}.weight"] + 1
    for name in (f"{kernel}.weight", f"{kernel}.base_layer.weight"):
        name = name.replace("lang_encoder.", "lang_encoder.base_model.model.")
        torch.save(flamingo_parts.tensors({**state, name: value}), tmp_path / "b.pt")
        first = chain.split(",")[0]
        opened = opening.open_pretrained(f"{first},{tmp_path / 'b.pt'}", **parts)
        np.testing.assert_array_equal(opened.reader.read(f"{kernel}.weight"), value)


def test_lora_without_its_scale_or_with_anothers_is_refused(instruct, tmp_path):
    chain, parts, _, _ = instruct
    bare = {k: v for k, v in parts.items() if k != "tuning_config"}
    with pytest.raises(
        MMJaxError, match=r"rank 4.*--tuning-config FILE.*r 64 with alpha 64.*r 128"
    ):
        opening.open_pretrained(chain, **bare)
    (tmp_path / "t.json").write_text(json.dumps({"lora": True, "lora_r": 64, "lora_alpha": 64}))
    with pytest.raises(MMJaxError, match="have rank 4, and .*t.json says 64"):
        opening.open_pretrained(chain, **bare, tuning_config=tmp_path / "t.json")
    with pytest.raises(MMJaxError, match="holds no LoRA weights"):
        opening.open_pretrained(chain.split(",")[0], **parts)
    # Otter's config.json says it itself.
    first, second = chain.split(",")
    for name, file in (("a.pt", first), ("b.pt", second)):
        shutil.copy(file, tmp_path / name)
    config = json.loads((Path(first).parent / "config.json").read_text())
    config["lora_config"] = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = opening.open_pretrained(f"{tmp_path}/a.pt,{tmp_path}/b.pt", **bare)
    assert (opened.lora.scale, opened.lora.dropout) == (3.0, 0.1)
    with pytest.raises(MMJaxError, match="FIRST.pt,SECOND.pt"):
        opening.open_pretrained(chain.split(",")[1], **parts)


def changed_gates(golden, change):
    state = flamingo_parts.trained_state(golden)
    return {re.sub(r"\.blocks\.(\d+)\.", lambda m: f".blocks.{change(int(m[1]))}.", k): v
            for k, v in state.items()}  # fmt: skip


def test_parts_that_do_not_fit_are_told_with_the_fix(mpt, llama, tmp_path):
    golden, folder, parts = mpt
    file = folder / "checkpoint.pt"

    def refused(match, path=file, **changes):
        with pytest.raises(MMJaxError, match=match):
            read_all(path, **{**parts, **changes})

    refused("gated blocks stand in transformer.blocks, which is .*mpt.* is llama with model.layers",
            lm=llama[2]["lm"])  # fmt: skip
    refused("its config.json and its weights|no such file|config.json", lm=tmp_path)
    for name, match in (
        ("deeper", "layers 1, 3, and a language model of 6 layers has them before 1, 3, 5"),
        ("wider", "a language model of width 32, and this one has 64; give --lm"),
    ):
        lm = tmp_path / name
        shutil.copytree(parts["lm"], lm)
        config = json.loads((lm / "config.json").read_text())
        config |= {"n_layers": 6} if name == "deeper" else {"d_model": 64}
        (lm / "config.json").write_text(json.dumps(config))
        refused(match, lm=lm)
    refused("hidden_size 1024 .the tensors: 16.", vision_config="ViT-L-14")
    refused("no file and no tower of mmjax; one of vit-b-32", vision_config="ViT-XXL")
    refused("heads cannot be read off its tensors; give --vision-config", vision_config=None)
    refused("no vision tower: neither visual.conv1.weight", vision=parts["lm"])
    refused("lacks the language model: give its folder, --lm DIR|without config.json", lm=None)
    # A block less than the interval says, and a tensor less in one of them.
    state = flamingo_parts.trained_state(golden)
    holes = {k: v for k, v in state.items() if ".blocks.3." not in k}
    torch.save(flamingo_parts.tensors(holes), tmp_path / "holes.pt")
    write_ids(golden, tmp_path)
    refused("before layers 1, and a language model of 4 layers has them before 1, 3",
            path=tmp_path / "holes.pt")  # fmt: skip
    state.pop("lang_encoder.transformer.blocks.3.gated_cross_attn_layer.ff.1.weight")
    torch.save(flamingo_parts.tensors(state | {"perceiver.more": np.ones(2)}), tmp_path / "l.pt")
    refused(r"1 missing: .*blocks.3.*ff.1.weight\n.*1 unexpected: perceiver.more",
            path=tmp_path / "l.pt")  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"cross_attn_every_n_layers": 4}))
    torch.save(flamingo_parts.tensors(flamingo_parts.trained_state(golden)), tmp_path / "a.pt")
    refused("config.json says cross_attn_every_n_layers 4, .* every 2", path=tmp_path / "a.pt")


def test_a_family_without_parts_says_so(llama):
    with pytest.raises(MMJaxError, match="a language model has no --vision"):
        opening.open_pretrained(llama[2]["lm"], vision=llama[2]["vision"])


def test_inspect_shows_the_sizes_and_that_all_keys_are_claimed(mpt, capsys):
    assert inspect.main([str(mpt[1] / "checkpoint.pt"), *options(mpt[2])]) == 0
    shown = capsys.readouterr().out
    assert "flamingo, openflamingo" in shown and "every key is claimed" in shown
    assert re.search(r"cross_every\s+│ 2 ", shown)
