"""The bunny suite: both sides agree on toy sizes; what is trained, what is asked, what rows say."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from bench import bunny, bunny_ours, bunny_torch, cases, report, runner
from mmjax.nn import paths

ALL, LORA, GENERATE = bunny.bunny_cases(True, "cpu")
FULL = bunny.bunny_cases(False, "cpu")


@pytest.fixture(scope="module")
def rows():
    """The rows of a quick run, a variant of the peer each; compiled into the suite's own cache."""
    chosen = [dataclasses.replace(ALL, peers=(bunny.GATHERED,)), GENERATE]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"):
            patch.setenv(name.upper(), str(getattr(jax.config, name)))
        return list(runner.run_cases(chosen, peer="torch", quick=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the toy size, as both sides read it."""
    found = tmp_path_factory.mktemp("bunny") / "model"
    bunny.write_model(bunny.TINY, found)
    return found


def numbers(shapes, *roots):
    return sum(int(np.prod(shape)) for name, shape in shapes if name.startswith(roots))


@pytest.mark.heavy
def test_both_sides_lose_the_same_and_answer_the_same(rows):
    for row in rows:
        assert "error" not in row and row["parity_ok"] and row["ratio"] > 0, row["case"]
    train, generate = rows
    assert train["parity_err"] < 1e-5
    assert generate["parity_err"] == 0 and generate["parity_bound"] == 0
    assert "peft" in train["env"]["versions"]["peer"]


@pytest.mark.heavy
def test_the_tower_is_not_trained_and_its_size_is_told(rows):
    found = list(bunny.shapes(bunny.TINY))
    every, tower = numbers(found, ""), numbers(found, bunny.TOWER)
    assert (rows[0]["parameters"], rows[0]["trained"]) == (every, every - tower)
    text = report.markdown(rows, "c", "r")
    assert "## Bunny" in text and "a Phi of width 64, 2 layers" in text and "4 tokens an" in text
    counts = f"{every / 1e6:.1f} M parameters, of which {(every - tower) / 1e6:.1f} M are trained"
    assert counts in text and f"| {GENERATE.name} vs sdpa |" in text


@pytest.mark.heavy
def test_adapters_learn_beside_peft_and_the_projector_at_its_own_rate(folder):
    subject = bunny_ours.make(LORA, folder, "")
    adapter = numbers(bunny.adapter_shapes(bunny.TINY), "")
    projector = numbers(bunny.shapes(bunny.TINY), bunny.PROJECTOR)
    assert subject.details["trained"] == adapter + projector
    before = jax.device_get(paths.flatten(subject.state.params))
    metrics = [subject.step()]
    after = jax.device_get(paths.flatten(subject.state.params))
    rates = bunny.TRAINED["lora"]
    for name, value in before.items():
        # The first update of Adam is the learning rate, whatever the gradient; rounded in float32.
        rate = rates["projector_lr" if name.startswith("projector.") else "lr"]
        assert np.abs(after[name] - value).max() == pytest.approx(rate, rel=0.02), name
    metrics += [subject.step() for _ in range(3)]
    want = bunny_torch.make(LORA, folder, bunny.SDPA).outputs()
    for name, values in want.items():
        np.testing.assert_allclose([m[name] for m in metrics], values, rtol=1e-5)


def test_targets_are_answers_behind_the_image_and_padding_is_on_the_right():
    for case in (ALL, FULL[0]):
        batch, size = bunny.train_batch(case), case.size
        b, t = case.options["b"], case.options["t"]
        filled = batch["segment_ids"] > 0
        lengths = filled.sum(1)
        assert filled.shape == (b, t) and case.work == lengths.sum() and len(set(lengths)) == b
        assert batch["patches"].shape == (b, 1, size.image**2 * 3)
        for row, length in enumerate(lengths):
            assert filled[row, :length].all()
            places = np.flatnonzero(batch["visual_index"][row] == 0)
            assert np.array_equal(places, places[0] + np.arange(size.image_tokens))
            index = batch["target_index"][row]
            index = index[index >= 0]
            assert places[-1] < index[0] and index[-1] == length - 1 and (np.diff(index) > 0).all()
            assert (np.diff(index) > 1).sum() == row % 2  # a second question
            assert (batch["tokens"][row, index] > cases.EOS).all()


def test_prompts_are_ragged_and_hold_an_image_each():
    for case in (GENERATE, FULL[-1]):
        found = bunny.prompts(case)
        assert len(found) == case.options["b"] == len({len(e["tokens"]) for e in found})
        for example in found:
            assert (example["visual_index"] == 0).sum() == case.size.image_tokens
            assert example["visual_index"][-1] == -1 and len(example["patches"]) == 1
        assert len({e["patches"].tobytes() for e in found}) == len(found)


def test_the_peer_leaves_out_nothing_that_is_asked_for(folder):
    """Its tower, cut short, gives hidden_states[-2] of the whole one."""
    from safetensors.torch import load_file
    from transformers import SiglipVisionConfig, SiglipVisionModel

    whole = SiglipVisionModel(SiglipVisionConfig(**bunny.siglip_config(bunny.TINY)))
    root = f"{bunny.TOWER}vision_model."
    state = load_file(folder / "model.safetensors")
    whole.load_state_dict({k.removeprefix(root): v for k, v in state.items() if k.startswith(root)})
    pixels = torch.randn(2, 3, bunny.TINY.image, bunny.TINY.image)
    with torch.no_grad():
        want = whole.eval()(pixels, output_hidden_states=True).hidden_states[-2]
        got = bunny_torch.Parts(bunny.TINY, folder).tower.eval()(pixels).last_hidden_state
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
