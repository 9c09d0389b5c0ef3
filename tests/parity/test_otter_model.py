"""Otter against its own code: its folder, logits, loss, gradients, frames and greedy answers."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.config import resolve_recipe
from mmjax.generate.loop import pad_batch
from mmjax.models import registry
from mmjax.nn import paths
from mmjax.schema import to_dataclass
from mmjax.train.settings import RunSettings
from mmjax.train.state import chosen_by
from mmjax.weights import rules
from mmjax.weights.writer import Arrays
from tests.parity import backward, forward, otter_golden

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = ("mpt", *(pytest.param(lm, marks=pytest.mark.heavy) for lm in ("llama", "mosaic1b")))


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """One run of the peer, and its save_pretrained folder loaded by us."""
    golden = otter_golden.load(request.param)
    folder = otter_golden.write_folder(golden, tmp_path_factory.mktemp("otter") / golden.name)
    return golden, mmjax.load(folder)


def test_token_ids_come_from_the_tokenizer_in_its_folder(pair):
    golden, ours = pair
    ids, config = golden.config["ids"], ours.config
    assert (config.eoc_token_id, config.media_token_id) == (ids["endofchunk"], ids["image"])
    assert (config.answer_token_id, config.eos_token_id) == (ids["answer"], ids["eos"])
    assert config.cross_every == golden.every
    assert config.perceiver.max_frames == golden.config["config"]["max_num_frames"]


def test_logits_equal(pair):
    golden, ours = pair
    batch, lengths = pad_batch(otter_golden.examples(golden))
    logits = forward.logits(ours, batch)
    for got, n, want in zip(logits, lengths, golden.logits, strict=True):
        np.testing.assert_allclose(got[:n], want[-n:], atol=1e-4)


def test_loss_and_every_trained_gradient_equal(pair):
    golden, ours = pair
    batch, lengths = pad_batch(otter_golden.examples(golden))
    backward.place_targets(batch, backward.labelled(golden.labels, lengths))
    value, flat = backward.loss_and_gradients(ours, batch)
    assert value == pytest.approx(float(golden.loss), rel=1e-5)
    weights = registry.family("flamingo").weights
    table = rules.export(weights.rules(ours.config, "otter"), Arrays(flat))
    errors = golden.gradient_errors({weights.from_hub(t.key, "otter"): t.make() for t in table})
    # A gate is one number, a sum over all tokens in which much cancels.
    assert len(errors) == sum("perceiver" in k or "gated" in k for k in golden.weights) + (
        2 if golden.lm == "llama" else 1  # the embedding, and LLaMA's head
    )
    worst = sorted(errors.items(), key=lambda x: -x[1])[:5]
    assert max(v for k, v in errors.items() if not k.endswith("gate")) < 1e-4, worst
    assert max(errors.values()) < 1e-3, worst


def test_the_recipe_trains_what_the_peer_trains(pair):
    golden, ours = pair
    recipe = "otter_video" if golden.lm == "llama" else "otter_9b"
    settings = to_dataclass(RunSettings, resolve_recipe(f"{CONFIGS}/{recipe}.py"))
    params = paths.flatten(nnx.state(ours.model, nnx.Param))
    chosen = chosen_by(settings, list(params))
    weights = registry.family("flamingo").weights
    named = rules.by_ours(weights.rules(ours.config, "otter"), chosen)
    keys = {key for name, rule in named.items() for key in rule.keys(params[name].shape)}
    assert sorted(weights.from_hub(key, "otter") for key in keys) == golden.trained


def test_greedy_answers_equal_the_peers_without_its_cache(pair):
    """With its cache the peer sees no image behind the first new token; only that one is right."""
    golden, ours = pair
    prompts, end = otter_golden.examples(golden), golden.config["ids"]["endofchunk"]
    start = golden.input_ids.shape[1]
    ends = {end, ours.config.eos_token_id}
    got = ours.generate_tokens(prompts, max_new_tokens=12)
    for tokens, want in zip(got, golden.greedy[:, start:], strict=True):
        stop = next((i for i, token in enumerate(want) if token in ends), len(want))
        np.testing.assert_array_equal(tokens, want[:stop])
    assert (golden.greedy_cached[:, start] == golden.greedy[:, start]).all()
    n = golden.greedy_cached.shape[1]
    assert (golden.greedy_cached[:, start:] != golden.greedy[:, start:n]).any()
