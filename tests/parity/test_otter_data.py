"""MIMIC-IT beside Otter's own code: token ids, labels, the order of rows and of their pictures."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from mmjax.data.mimicit import MimicitSource
from mmjax.data.templates import get_template
from mmjax.models.flamingo.processor import FlamingoProcessor, ProcessorConfig

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import otter_data as files  # noqa: E402

OTTER = dict(
    image_size=files.SIDE,
    fit="squash",
    image_mean=(0.481, 0.458, 0.408),
    image_std=(0.269, 0.261, 0.276),
    bos=True,
    answer_token=True,
)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(os.environ.get("OTTER_GOLDENS", GOLDEN)) / "otter_data.npz") as file:
        return json.loads(file["rows"].item()), file["picture"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("mimicit")
    files.write_files(made)
    return made


def source(folder, case):
    """Open a case as a recipe for Otter does."""
    group, _, _, related, symbols, _ = files.CASES[case]
    frames = files.FRAMES if group == "VIDEO_TEXT" else None
    return MimicitSource(
        **files.paths(folder, case),
        group=group,
        populate_rel_ins=related,
        keep_symbols=symbols,
        frames_as="medium",
        frames=frames,
    )


def processor(frames=1):
    return FlamingoProcessor(ProcessorConfig(**OTTER, frames=frames), files.tokenizer())


def rows(folder, case):
    """Return (example, grey levels of its pictures) of each row in the order of the source."""
    opened, template = source(folder, case), get_template("otter_tight_chat")
    for i in range(len(opened)):
        record = opened[i]
        counts = [len(one) if isinstance(one, tuple) else 1 for one in record.images]
        made = processor(counts[0] if counts else 1).encode(template(record), record.images)
        pictures = made["patches"].reshape(-1, files.SIDE**2 * 3)
        yield record, made, pictures.mean(-1).round().astype(int).tolist()


@pytest.mark.parametrize("case", files.CASES)
def test_rows_tokens_targets_and_pictures_equal(golden, folder, case):
    theirs = golden[0][case]
    for row, (record, made, colours) in zip(theirs, rows(folder, case), strict=True):
        assert record.meta["id"] == row["id"]
        np.testing.assert_array_equal(made["tokens"], row["tokens"])
        np.testing.assert_array_equal(made["loss_mask"], np.array(row["labels"]) != -100)
        if case.startswith("text"):  # the peer's grey picture, which no text looks at
            assert not colours and row["shape"][-1] == 224
        elif case != "context":
            assert colours == row["colours"]
            assert record.meta["image_ids"] and len(colours) == row["shape"][2]


def test_examples_in_context_have_pictures_of_their_own(golden, folder):
    """The peer reads the entry's alone, and its first example looks at it (the third at none)."""
    theirs = golden[0]["context"][0]
    _, made, colours = next(rows(folder, "context"))
    assert colours == [files.colour(i) for i in (0, 1, 2)]
    assert theirs["colours"] == [files.colour(2)]
    image = files.tokenizer().convert_tokens_to_ids("<image>")
    assert (made["tokens"] == image).sum() == theirs["tokens"].count(image) == 3
    first = made["tokens"].tolist().index(image)
    assert [made["visual_index"][i] for i in (0, first, -1)] == [-1, 0, 2]


def test_pixels_equal(golden, folder):
    config = ProcessorConfig(**OTTER)
    rows = FlamingoProcessor(config, files.tokenizer()).encode_prompt("a", [files.picture()])
    pixels = config.normalise(rows["patches"].reshape(files.SIDE, files.SIDE, 3))
    np.testing.assert_allclose(pixels.transpose(2, 0, 1), golden[1], atol=1e-6)
