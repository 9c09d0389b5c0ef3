"""MiniCPM against what Bunny's own code made of the same tensors; transformers has none."""

import json
from pathlib import Path

import numpy as np
import pytest

import mmjax
from mmjax.models import exports, opening, pretrained
from mmjax.weights.rules import Tensor
from mmjax.weights.writer import write_shards

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden/minicpm.npz"))
CONFIG = json.loads(str(GOLDEN["config"]))
TENSORS = {k: v for k, v in GOLDEN.items() if k.startswith("model.")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("minicpm")
    (out / "config.json").write_text(json.dumps(CONFIG))
    write_shards(out, [Tensor(k, v.shape, v.dtype, lambda v=v: v) for k, v in TENSORS.items()])
    return out


def test_logits_and_greedy_tokens_are_bunnys(folder):
    ours, ids = mmjax.load(folder, dtype="float32"), GOLDEN["ids"].tolist()
    np.testing.assert_allclose(ours.logits(ids)[1], GOLDEN["logits"], atol=1e-6)
    text = ours.generate(ids, max_new_tokens=len(GOLDEN["greedy"]))[0]
    assert [int(token) for token in text.split()] == GOLDEN["greedy"].tolist()


def test_an_export_is_the_file_it_came_from(folder):
    opened = opening.open_pretrained(folder)
    tensors, files = exports.plan_export(
        opened, pretrained.abstract_params(opened.family, opened.config)
    )
    assert {t.key for t in tensors} == set(TENSORS)
    for tensor in tensors:
        np.testing.assert_array_equal(tensor.make(), TENSORS[tensor.key])
    stated = {key: files["config.json"][key] for key in CONFIG if key != "rope_scaling"}
    assert {**stated, "rope_scaling": None} == CONFIG
