"""Bunny against its own code: features, logits, loss, gradients, and generated tokens."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from mmjax.generate.loop import pad_batch
from mmjax.models import registry
from mmjax.parallel.mesh import use
from mmjax.weights import rules
from mmjax.weights.writer import Arrays
from tests.parity import backward, bunny_examples, bunny_golden, forward

NEW = 12
# `make test-heavy` has what the other towers and language models answer.
IN_SHORT = {"bunny_qwen2_siglip"}
SOME = [
    pytest.param(path, marks=() if path.stem in IN_SHORT else pytest.mark.heavy, id=path.stem)
    for path in bunny_golden.paths()
]


@pytest.fixture(scope="module", params=bunny_golden.paths(), ids=lambda path: path.stem)
def pair(request, tmp_path_factory):
    """One model of the peer, and its weights loaded by us."""
    golden = bunny_golden.load(request.param)
    return golden, bunny_examples.load(golden, tmp_path_factory.mktemp(golden.name))


def test_features_equal(pair):
    golden, ours = pair
    case = golden.first
    images = case.pixel_values.transpose(0, 2, 3, 1)
    with use(ours.mesh):
        features = nnx.jit(lambda m, x: m.features(x), graph=False)(ours.model, images)
    largest = np.abs(case.features).max()  # 13 or so: other CPUs round otherwise
    np.testing.assert_allclose(features, case.features, atol=3e-6 * largest)


def test_logits_equal_in_every_case(pair):
    """Padded on either side, cut behind its images, of text alone, of two images."""
    golden, ours = pair
    for case in golden.cases.values():
        batch, lengths = pad_batch(bunny_examples.examples(case, ours.config.image_tokens))
        logits = forward.logits(ours, batch)
        left = case.config["tokenizer_padding_side"] == "left"
        for row, n in enumerate(lengths):
            theirs = case.logits[row, -n:] if left else case.logits[row, :n]
            np.testing.assert_allclose(logits[row, :n], theirs, atol=1e-4, err_msg=case.name)


@pytest.mark.parametrize("pair", SOME, indirect=True)
def test_packed_rows_equal_rows_apart(pair):
    """Two samples with images in one row: each has its own image, cut or whole."""
    golden, ours = pair
    first, second = bunny_examples.examples(golden.first, ours.config.image_tokens)[:2]
    second = second | {
        "visual_index": np.where(
            second["visual_index"] >= 0, second["visual_index"] + len(first["patches"]), -1
        )
    }
    row = {key: np.concatenate([first[key], second[key]])[None] for key in first}
    row["segment_ids"] = np.repeat([1, 2], [len(first["tokens"]), len(second["tokens"])])[None]
    packed = forward.logits(ours, row)
    at = len(first["tokens"])
    np.testing.assert_allclose(packed[0, :at], golden.first.logits[0, :at], atol=1e-4)
    n = len(second["tokens"])
    np.testing.assert_allclose(packed[0, at:], golden.first.logits[1, :n], atol=1e-4)


@pytest.mark.parametrize("pair", SOME, indirect=True)
def test_loss_and_every_gradient_equal(pair):
    golden, ours = pair
    case, n = golden.first, ours.config.image_tokens
    batch, _ = pad_batch(bunny_examples.examples(case, n))
    found = bunny_examples.targets(case, n)
    backward.place_targets(batch, found)
    value, flat = backward.loss_and_gradients(ours, batch)
    assert value == pytest.approx(case.loss, rel=1e-5)
    table = registry.family("bunny").weights.rules(ours.config)
    named = {t.key: t.make() for t in rules.export(table, Arrays(flat))}
    errors = golden.gradient_errors(named)
    assert len(errors) == len(golden.gradients) > 30
    assert max(errors.values()) < 1e-4, sorted(errors.items(), key=lambda x: -x[1])[:5]


@pytest.mark.parametrize("pair", SOME, indirect=True)
def test_answers_are_the_peers_alone_and_in_a_batch_of_other_lengths_and_images(pair):
    golden, ours = pair
    case = golden.first
    prompts = bunny_examples.prompts(case, ours.config.image_tokens)
    ours = dataclasses.replace(ours, config=_without_end(ours.config))
    together = ours.generate_tokens(prompts, max_new_tokens=NEW)
    for i, prompt in enumerate(prompts):
        (alone,) = ours.generate_tokens([prompt], max_new_tokens=NEW)
        np.testing.assert_array_equal(alone, case.greedy[i])
        np.testing.assert_array_equal(together[i], alone)


def test_answers_without_a_cache_are_the_same(pair):
    """Each new token is the likeliest behind all those before it, run anew."""
    golden, ours = pair
    case, rows = golden.first, []
    prompts = bunny_examples.prompts(case, ours.config.image_tokens)
    for prompt, answer in zip(prompts, case.greedy, strict=True):
        count = len(answer)
        more = {"tokens": answer, "visual_index": np.full(count, -1)}
        more |= {"loss_mask": np.zeros(count, bool), "patches": prompt["patches"][:0]}
        more["positions"] = len(prompt["tokens"]) + np.arange(count)
        rows.append({k: np.concatenate([v, more[k]]).astype(v.dtype) for k, v in prompt.items()})
    batch, lengths = pad_batch(rows)
    likeliest = forward.logits(ours, batch).argmax(-1)
    for row, n in enumerate(lengths):
        np.testing.assert_array_equal(likeliest[row, n - NEW - 1 : n - 1], case.greedy[row])


@pytest.mark.parametrize("pair", SOME, indirect=True)
def test_another_image_gives_another_answer(pair):
    golden, ours = pair
    case = golden.first
    first = bunny_examples.prompts(case, ours.config.image_tokens)[0]
    other = {**first, "patches": case.pixel_values[1:2].transpose(0, 2, 3, 1).reshape(1, -1)}
    last = len(first["tokens"]) - 1
    one, two = (forward.logits(ours, pad_batch([x])[0])[0, last] for x in (first, other))
    assert np.abs(one - two).max() > 1e-2


def _without_end(config):
    """The peer's tokens were drawn to a fixed length: no token ends an answer."""
    return dataclasses.replace(config, eos_token_id=config.vocab_size)
