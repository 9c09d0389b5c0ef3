"""The flamingo suite without its peer: what is trained, what is asked, what its rows say."""

import jax
import numpy as np
import pytest

from bench import __main__ as cli
from bench import flamingo, flamingo_ours, report, runner
from mmjax.nn import paths

TRAIN, GENERATE = flamingo.flamingo_cases(True, "cpu")
FULL = flamingo.flamingo_cases(False, "cpu")


@pytest.fixture(scope="module")
def rows():
    """The rows of a quick run without the peer; it compiles into the cache of the whole suite."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"):
            patch.setenv(name.upper(), str(getattr(jax.config, name)))
        return list(runner.run_cases([TRAIN, GENERATE], peer=None, quick=True))


@pytest.mark.heavy
def test_rows_without_the_peer_have_times_and_do_not_count(rows):
    train, generate = rows
    for row in rows:
        assert "error" not in row and row["ours_ms"] > 0 and row["compile_s"] > 0
        assert row["parity_ok"] is None and row["ratio"] is None
    assert train["unit"] == "tokens" and train["trained"] < train["parameters"]
    assert train["temp_size_in_bytes"] > 0
    assert generate["peer_impl"] is None


def peer_row(row, impl, ratio):
    return row | {
        "peer_impl": impl, "peer_ms": row["ours_ms"] * ratio, "peer_per_s": 1.0, "ratio": ratio,
        "parity_err": 0.0, "parity_ok": True, "peer_note": "1 thread",
    }  # fmt: skip


@pytest.mark.heavy
def test_the_document_names_both_ways_of_the_peer_and_the_sizes(rows):
    train, generate = rows
    some = [
        peer_row(train, *TRAIN.peers, 1.3),
        *(peer_row(generate, impl, ratio) for impl, ratio in zip(GENERATE.peers, (9, 2), strict=1)),
    ]
    text = report.markdown(some, "c", "r")
    assert "## Flamingo" in text and "width 64, 2 layers" in text and "1 thread" in text
    assert f"{train['parameters'] / 1e6:.1f} M parameters" in text
    assert f"| {GENERATE.name} vs use_cache=False, its default |" in text
    assert f"- flamingo: {GENERATE.name} vs use_cache=True: 2.00x of 3x" in text
    assert "its default: " not in text  # 9x is above its target


def test_targets_stand_behind_an_image_up_to_its_end_of_chunk():
    for case in (TRAIN, *FULL[:2]):
        batch, size = flamingo.train_batch(case), case.size
        b, t, images = (case.options[k] for k in ("b", "t", "images"))
        assert batch["tokens"].shape == (b, t) and case.work == b * t
        assert batch["patches"].shape == (b, images, size.image**2 * 3)
        for tokens, seen, index in zip(
            batch["tokens"], batch["visual_index"], batch["target_index"], strict=True
        ):
            want, inside = [], False  # as OpenFlamingo walks over MMC4's tokens
            for i, token in enumerate(tokens):
                if token == size.media:
                    inside = True
                elif inside:
                    want.append(i)
                    inside = token != size.eoc
            assert index[index >= 0].tolist() == want
            assert np.array_equal(seen + 1, np.cumsum(tokens == size.media))
            assert (tokens == size.media).sum() == (tokens == size.eoc).sum() == images
        assert len({tuple(index) for index in batch["target_index"]}) == b


def test_prompts_have_two_or_three_images_and_end_in_a_question():
    for case in (GENERATE, *FULL[2:]):
        found = flamingo.prompts(case)
        assert len(found) == case.options["b"] and len(case.peers) == 2
        for row, example in enumerate(found):
            marks = example["tokens"] == case.size.media
            assert marks.sum() == len(example["patches"]) == 3 - row % 2
            assert marks[0] and (example["tokens"] == case.size.eoc).sum() == marks.sum() - 1
            assert example["visual_index"][-1] == marks.sum() - 1


@pytest.mark.heavy
def test_a_step_trains_what_openflamingo_trains(tmp_path):
    folder = tmp_path / "model"
    flamingo_ours.write_model(TRAIN.size, folder)
    subject = flamingo_ours.make(TRAIN, folder, "")
    before = jax.device_get(paths.flatten(subject.state.params))
    assert {name.split(".")[0] for name in before} == {"perceiver", "cross", "decoder"}
    frozen = {name.split(".")[0] for name in paths.flatten(subject.frozen)}
    assert frozen == {"vision", "decoder"}
    count = sum(x.size for name, x in before.items() if name != flamingo_ours.TABLE)
    assert subject.details["trained"] == count + 2 * TRAIN.size.d
    subject.step()
    after = jax.device_get(paths.flatten(subject.state.params))
    moved = np.flatnonzero(
        np.any(before[flamingo_ours.TABLE] != after[flamingo_ours.TABLE], axis=1)
    )
    assert moved.tolist() == [TRAIN.size.eoc, TRAIN.size.media]
    for name, value in before.items():
        assert np.any(value != after[name]), name


def test_a_missing_environment_of_the_peer_is_named_with_its_remedy(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        cli.parse(["--suite", "flamingo", "--flamingo-python", "/nowhere/python"])
    said = capsys.readouterr().err
    assert "there is no /nowhere/python" in said and "make .venv-flamingo/installed" in said
    assert cli.parse(["--suite", "train", "--flamingo-python", "/nowhere"]).suites == ["train"]
    assert cli.parse(["--suite", "flamingo", "--peer", "none"]).peer == "none"
    monkeypatch.setenv("FLAMINGO_PYTHON", "/somewhere/else")
    with pytest.raises(SystemExit):
        cli.parse(["--suite", "flamingo"])
    assert "there is no /somewhere/else" in capsys.readouterr().err
