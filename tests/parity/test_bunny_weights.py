"""Bunny's published files both ways, from the weights and outputs of Bunny's own runs."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file  # noqa

from convert_weights import to_hf
from mmjax.types import MMJaxError
from tests.parity import bunny_examples, bunny_files, bunny_golden
from tests.parity.bunny_files import PROJECTOR
from tests.parity.bunny_golden import TOWER
from tests.parity.parameters import assert_same, options, read_all


class Files:
    """A golden, the folder of its merged model, and the parameters in that."""

    def __init__(self, name, folder):
        self.golden = bunny_golden.load(bunny_golden.COMMITTED / f"bunny_{name}.npz")
        self.folder = folder
        self.merged = bunny_golden.write_checkpoint(self.golden, folder)
        self.sizes = bunny_examples.tower_json(self.golden, folder)
        self.tower = bunny_golden.write_tower(self.golden, folder)
        self.lm = bunny_files.write_language_model(self.golden, folder / "lm", bias=3.0)
        self.ckpt, self.params = read_all(self.merged, vision_config=self.sizes)

    @property
    def parts(self):
        """Keywords that name what stage 1 and adapters leave out."""
        return {"lm": self.lm, "vision": self.tower, "vision_config": self.sizes}

    def same(self, path, **parts):
        """Fail unless a checkpoint is this model."""
        ckpt, params = read_all(path, **parts)
        assert ckpt.config == self.ckpt.config
        assert_same(params, self.params)


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    return Files("phi_siglip", tmp_path_factory.mktemp("phi"))


@pytest.fixture(scope="module")
def stablelm(tmp_path_factory):
    return Files("stablelm_clip", tmp_path_factory.mktemp("stablelm"))


def test_a_tower_is_inside_or_beside_under_either_of_its_names(phi, stablelm, tmp_path):
    for model in (phi, stablelm):
        golden, name = model.golden, model.golden.name
        for prefix in (True, False):
            where = tmp_path / f"{name} {prefix}"
            beside = bunny_golden.write_checkpoint(golden, where, tower="beside", prefix=prefix)
            model.same(beside)  # named by mm_vision_tower
            state = {
                k if prefix else k.replace("vision_tower.vision_model.", "vision_tower."): v
                for k, v in golden.weights.items()
            }
            config = golden.config | {"vision_config": golden.tower_config}
            model.same(bunny_files.write(state, where / "inside", config))  # sizes told there
            config = golden.config | {"mm_vision_tower": "google/somewhere"}
            bare = {k: v for k, v in state.items() if not k.startswith(TOWER)}
            bare = bunny_files.write(bare, where / "bare", config)
            model.same(bare, vision=where / golden.config["mm_vision_tower"])


def test_an_eva_tower_comes_from_its_own_file(tmp_path):
    eva = Files("phi_eva", tmp_path)
    eva.same(bunny_golden.write_checkpoint(eva.golden, tmp_path / "b", tower="beside"),
             vision_config=eva.sizes)  # fmt: skip


def test_a_clip_tower_comes_from_open_clip_and_is_written_in_transformers_names(stablelm, tmp_path):
    torch.save(bunny_files.tensors(bunny_files.open_clip(stablelm.golden)), tmp_path / "clip.pt")
    bare = bunny_golden.write_checkpoint(stablelm.golden, tmp_path, tower="beside")
    stablelm.same(bare, vision=tmp_path / "clip.pt", vision_config=stablelm.sizes)
    to_hf.main([str(bare), str(tmp_path / "hf"), "--vision", str(tmp_path / "clip.pt"),
                "--vision-config", str(stablelm.sizes)])  # fmt: skip
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), stablelm.golden.weights)


def test_a_siglip_of_the_first_release_lacks_its_last_layer_and_its_head(phi, tmp_path):
    """Nothing looks at either: the layers that are there are the same."""
    gone = re.compile(r"encoder\.layers\.2\.|\.head\.")
    state = {k: v for k, v in phi.golden.weights.items() if not gone.search(k)}
    folder = bunny_files.write(state, tmp_path / "a", phi.golden.config)
    ckpt, params = read_all(folder, vision_config=phi.sizes)
    assert (ckpt.config.vision.num_layers, ckpt.config.vision.feature_layer) == (2, -1)
    cut = {k: v[:2] if k.startswith("vision.layers.") else v for k, v in phi.params.items()}
    assert_same(params, cut)
    to_hf.main([str(folder), str(tmp_path / "hf"), "--vision-config", str(phi.sizes)])
    assert_same(read_all(tmp_path / "hf")[1], cut)


@pytest.mark.parametrize("path", bunny_golden.paths(), ids=lambda path: path.stem)
def test_every_golden_is_its_parts(path, tmp_path):
    """A projector alone, the language model as on a hub, and the tower are the merged model."""
    model = Files(path.stem.removeprefix("bunny_"), tmp_path)
    state, where = bunny_files.part(model.golden, PROJECTOR), tmp_path / "stage1"
    bunny_files.write(state, where, model.golden.config, "mm_projector.bin")
    model.same(where / "mm_projector.bin", **model.parts)
    model.same(where, **model.parts)


def test_a_projector_without_its_config_is_told_by_its_tensors(phi, tmp_path):
    state = bunny_files.part(phi.golden, PROJECTOR)
    bunny_files.write(state, tmp_path, None, "mm_projector.bin")
    ckpt, params = read_all(tmp_path / "mm_projector.bin", **phi.parts)
    assert_same(params, phi.params)
    kind, square = ckpt.config.projector.kind, ckpt.config.image_aspect_ratio
    assert (kind, square) == ("mlp2x_gelu", "square")  # as the peer reads a config without it


def test_phi_of_the_first_release_has_q_k_and_v_as_one_map(phi, tmp_path):
    config = phi.golden.config
    merged = bunny_files.write(bunny_files.fused(phi.golden.weights), tmp_path / "merged", config)
    phi.same(merged, vision_config=phi.sizes)
    lm = bunny_files.fused(bunny_files.language_state(phi.golden))
    lm = bunny_files.write(lm, tmp_path / "lm", bunny_files.language_config(phi.golden))
    state = bunny_files.part(phi.golden, PROJECTOR)
    bunny_files.write(state, tmp_path / "1", config, "mm_projector.bin")
    phi.same(tmp_path / "1", **{**phi.parts, "lm": lm})


def test_shards_pickles_and_wrappers_hold_the_same(phi, tmp_path):
    golden, half = phi.golden, len(phi.golden.weights) // 2
    items = list(golden.weights.items())
    shards = [dict(items[:half]), dict(items[half:])]
    for kind in ("safetensors", "bin"):
        stem = "model" if kind == "safetensors" else "pytorch_model"
        for i, shard in enumerate(shards, 1):
            file = f"{stem}-{i:05d}-of-00002.{kind}"
            bunny_files.write(shard, tmp_path / kind, golden.config, file)
        phi.same(tmp_path / kind, vision_config=phi.sizes)
    wrapped = {f"module.{k}": v for k, v in items}
    bunny_files.write(wrapped, tmp_path / "ddp", golden.config, "pytorch_model.bin")
    phi.same(tmp_path / "ddp", vision_config=phi.sizes)


def test_rows_of_the_vocabulary_are_those_of_the_checkpoint(phi, tmp_path):
    """The peer cuts the table to its tokenizer on merging; the base has more rows."""
    cut = ("model.embed_tokens.weight", "lm_head.weight")
    state = {k: v[:120] if k in cut else v for k, v in phi.golden.weights.items()}
    for stated in (120, 128):
        config = phi.golden.config | {"vocab_size": stated, "eos_token_id": 119}
        folder = bunny_files.write(state, tmp_path / str(stated), config)
        ckpt, params = read_all(folder, vision_config=phi.sizes)
        assert ckpt.config.vocab_size == 120
        assert params["decoder.embed.embedding"].shape == (120, 32)
