"""The pre-flight check before a Flamingo: what is left out of WebDataset shards, what is broken."""

import json
import re
import sys
from pathlib import Path

import pytest
from test_check import printed
from test_webdataset import pairs, write_tar

from mmjax.data import check as command
from mmjax.train.build import blueprint, train_iterator
from mmjax.train.settings import DataSettings, LoRASettings, ModelSettings, RunSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_flamingo_document_goldens import chat, document

SIDE = 14
CONFIG = {
    "text_config": dict(
        model_type="llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, vocab_size=64,
    ),
    "vision_config": dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        image_size=SIDE, patch_size=14,
    ),
    "perceiver_config": dict(num_layers=1, num_heads=2, head_dim=8, num_latents=4),
    "cross_attn_every_n_layers": 1,
}  # fmt: skip
MODEL = ModelSettings(family="flamingo", config=CONFIG, words=("Aa. Bb. Cc. One. Captiön 0",))


def settings(sources, template, **data):
    shape = dict(seq_len=24, max_patches=6, max_targets=16, batch_size=2, template=template)
    return RunSettings(model=MODEL, data=DataSettings(sources=sources, **(shape | data)))


@pytest.fixture
def documents(tmp_path):
    """Forty good documents, ten with one picture, nine below the threshold and one broken."""
    good = document(["Aa.", "Bb."], [[0.9, 0.1], [0.1, 0.5]])
    infos = [good] * 38 + [chat("_!_IMAGE1_!_ One.", 1)] * 2
    infos += [document(["Aa.", "Bb."], [[0.9, 0.1]])] * 10
    infos += [document(["Aa."], [[0.1]])] * 9 + [good | {"text_list": None}]
    members = [(f"{i:03}.json", json.dumps(info).encode()) for i, info in enumerate(infos)]
    return dict(kind="mmc4", path=str(write_tar(tmp_path / "mmc4.tar", members)))


def test_documents_left_out_by_settings_are_counted_and_do_not_fail(documents, tmp_path):
    run = settings({"mmc4": documents}, "interleaved")
    (report,) = command.check(run)
    singles = report.counts["single_image"]
    assert report.counts == dict(too_few_images=9, single_image=singles, bad_record=1)
    assert 0 < singles < 10 and report.good == 40 + 10 - singles
    assert report.images == 38 * 2 + 2 + 10 - singles
    assert report.broken_share == pytest.approx(1 / 60)
    assert report.bad_share == pytest.approx((10 + singles) / 60)
    failed, text = printed([report], run)
    assert not failed and "too_few_images" in text and "'text_list' is no list" in text
    strict = settings({"mmc4": documents}, "interleaved", max_bad_share=0.01)
    assert printed([report], strict)[0]
    assert (
        "mmc4: 1.7% would be dropped, and data.max_bad_share is 1.0%"
        in printed([report], strict)[1]
    )
    none = settings({"mmc4": documents | {"textsim_threshold": 1.0}}, "interleaved")
    assert printed(command.check(none, limit=10), none)[0]  # nothing is left to train on


def test_training_goes_on_where_half_the_documents_are_left_out(documents, tmp_path):
    run = settings({"mmc4": documents}, "interleaved", max_bad_share=0.02)
    processor = blueprint(MODEL, LoRASettings(), 0).processor
    batches = train_iterator(run, processor, tmp_path / "run")
    for _ in range(40):
        batch = next(batches)
    batches.close()
    assert batch["patches"].shape == (2, 6, SIDE * SIDE * 3)
    listed = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in listed] == ["bad_record"]


def test_pairs_of_pictures_and_captions(tmp_path):
    write_tar(tmp_path / "000.tar", [*pairs(0, 5), ("9.txt", b"no picture")])
    write_tar(tmp_path / "001.tar", [*pairs(5, 5), ("9.png", b"broken"), ("9.txt", b"x")])
    run = settings(
        {"laion": dict(kind="laion", path=f"{tmp_path}/{{000..001}}.tar")}, "laion_caption"
    )
    (report,) = command.check(run, threads=2)
    assert (report.records, report.good, report.images) == (12, 10, 10)
    assert report.counts == dict(missing_image=1, corrupt_image=1) and not report.repeated
    assert "000.tar: byte" in report.first["missing_image"][0]
    # What is found in a picture's bytes names the sample they are of.
    says = r"001\.tar:\d+ \(id 001\.tar/9\): <6 bytes>: cannot be read as an image"
    assert re.search(says, report.first["corrupt_image"][0])
