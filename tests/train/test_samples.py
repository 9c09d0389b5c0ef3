"""Samples in the log: a prompt, its targets, and what the model finds likeliest in their places."""

import json
from types import SimpleNamespace

import jax
import numpy as np
from flax import nnx

from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import put_batch
from mmjax.train.samples import Samples, short
from tests import tiny


class Words:
    """A tokenizer of sixty tokens, four fewer than the model's table has rows."""

    def __len__(self):
        return 60

    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens and all(0 <= i < 60 for i in ids)
        return " ".join(map(str, ids))


def test_a_picture_is_no_wall_of_marks_in_the_terminal():
    row, image = "|SPEAKER|" * 12 + "|NEWLINE|", "<image>"
    assert short(row * 3 + "<s> User: 1111111111 ......?") == (
        "(|SPEAKER| x 12|NEWLINE|) x 3<s> User: 1111111111 ......?"
    )
    assert short(row + "a") == "|SPEAKER| x 12|NEWLINE|a"
    assert short(image * 2 + "a") == image * 2 + "a" and short(image * 729) == "<image> x 729"


def test_a_sample_shows_what_the_model_finds_likeliest_at_each_target(tmp_path):
    batch = tiny.batch(seed=3)
    batch["tokens"] = np.minimum(batch["tokens"], 59)
    batch["segment_ids"][0, 12:] = 2  # the first sample ends there, and targets may lie behind it
    batch["target_index"][0] = (5, 9, 13, -1)
    model = tiny.model()
    best = np.argmax(model.logits(model(batch))[0], -1)
    shown = [int(best[i - 1]) if best[i - 1] < 60 else 0 for i in (5, 9)]
    graphdef, params = nnx.split(model)
    processor, sent = SimpleNamespace(tokenizer=Words()), []
    with use(make_mesh({"data": 2}, jax.devices()[:2])) as mesh:
        warned = []
        writer = SimpleNamespace(sample=lambda *given: sent.append(given), warn=warned.append)
        samples = Samples(graphdef, processor, tmp_path, mesh, writer)
        placed = put_batch(batch, mesh, 8)
        params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.P()))
        text = samples(
            40, batch, placed, params, nnx.State({}), [[("vqa", "é7\ud83d"), ("ocr", "9")]]
        )
        samples(80, batch, placed, params, nnx.State({}), [[]])
        samples._file = tmp_path  # which cannot be written, as on a full disk
        samples(120, batch, placed, params, nnx.State({}), [[]])
    text_there = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert '"vqa/é7' in text_there  # as people write it, not escaped
    first, second = map(json.loads, text_there.splitlines())
    tokens = batch["tokens"][0]
    assert (
        first
        == {
            "step": 40,
            "record": "vqa/é7\\ud83d",  # half a character, which no file holds
            "input": " ".join(map(str, tokens[:12])),
            "labels": f"{tokens[5]} {tokens[9]}",
            "predicted": " ".join(map(str, shown)),
        }
    )
    assert second["step"] == 80 and second["predicted"] == first["predicted"]
    fields = {name: value for name, value in first.items() if name != "step"}
    assert sent[0] == (40, "samples", fields) and sent[1][0] == 80
    assert len(sent) == 3 and len(warned) == 1 and "sample of step 120 could not be" in warned[0]
    assert "predicted: " + first["predicted"] in text
    # No more than the first targets, and never a token that the tokenizer has not.
    many = {"tokens": np.arange(1000, 1100)[None] % 60, "target_index": np.arange(1, 100)[None]}
    many["segment_ids"] = np.ones_like(many["tokens"])
    found = samples._first(many, np.full(64, 60))
    assert found["labels"].split() == [str(t) for t in many["tokens"][0, 1:65]]
    assert found["predicted"] == " ".join("0" * 64)
    assert samples._text(np.arange(58, 62)) == "58 59 0 0"
