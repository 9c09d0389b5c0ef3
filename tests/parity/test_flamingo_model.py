"""Flamingo against OpenFlamingo's own code: every stage, loss, gradients, and generated tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.generate.beam import Beams
from mmjax.generate.likelihood import Continuations
from mmjax.generate.loop import pad_batch
from mmjax.models import registry
from mmjax.parallel.mesh import use
from mmjax.weights import rules
from mmjax.weights.writer import Arrays
from tests.parity import backward, flamingo_golden, flamingo_peer, forward

IN_SHORT = ("flamingo_mpt",)
"""With ALiBi and grouped layers; what else language models have is in test_language.py."""
GOLDENS = [
    pytest.param(path, marks=() if path.stem in IN_SHORT else pytest.mark.heavy, id=path.stem)
    for path in flamingo_golden.paths()
]


@pytest.fixture(scope="module", params=GOLDENS)
def pair(request, tmp_path_factory):
    """One run of the peer, and its weights loaded by us."""
    golden = flamingo_golden.load(request.param)
    folder = flamingo_peer.write_folder(golden, tmp_path_factory.mktemp("of") / golden.name)
    return golden, mmjax.load(folder)


@pytest.fixture(scope="module")
def rows(pair):
    """Our logits of the peer's prompts, and of the first with two of its images swapped."""
    golden, ours = pair
    prompts = flamingo_peer.examples(golden)
    first, last = prompts[0], golden.vision_x.shape[1] - 1
    swapped = {**first, "patches": first["patches"][[last, *range(1, last), 0]]}
    batch, lengths = pad_batch([*prompts, swapped])
    logits = forward.logits(ours, batch)
    return [row[:n] for row, n in zip(logits, lengths, strict=True)]


def test_logits_equal(pair, rows):
    golden, _ = pair
    for got, want in zip(rows, golden.logits, strict=False):
        np.testing.assert_allclose(got, want[-len(got) :], atol=1e-4)


def test_text_whose_image_is_missing_sees_all_alike(pair):
    golden, ours = pair
    ids, images = golden.missing_input_ids[0], golden.missing_vision_x[0]
    batch, _ = pad_batch([flamingo_peer.example(ids, images, golden.config["ids"]["image"])])
    logits = forward.logits(ours, batch)
    np.testing.assert_allclose(logits[0, : len(ids)], golden.missing_logits[0], atol=1e-4)


def test_the_order_of_images_matters(rows):
    """By a hundred times what ours and the peer's logits may differ by; tokens need not change."""
    assert np.abs(rows[0][-1] - rows[-1][-1]).max() > 1e-2


@pytest.mark.heavy
def test_text_alone_is_the_same_whatever_else_is_in_its_batch(pair):
    """A batch without any image has no rows for one; one with an image has padding in them."""
    _, ours = pair
    batch, _ = pad_batch([ours.encode(list(range(3, 12)))])
    assert "patches" not in batch
    alone = forward.logits(ours, batch)
    padded = batch | {"patches": np.zeros((1, 1, ours.config.patch_dim), np.uint8)}
    np.testing.assert_allclose(forward.logits(ours, padded), alone, atol=1e-5)
    with use(ours.mesh):

        @nnx.jit(graph=False)
        def prompt(model, batch):
            hidden, _ = model.prefill(batch, jnp.array([9]), model.init_cache(1, 64))
            return model.logits(hidden)

        np.testing.assert_allclose(prompt(ours.model, batch), alone[:, 8], atol=1e-4)


def test_loss_and_every_trained_gradient_equal(pair):
    golden, ours = pair
    batch, lengths = pad_batch(flamingo_peer.examples(golden))
    backward.place_targets(batch, backward.labelled(golden.labels, lengths))
    value, flat = backward.loss_and_gradients(ours, batch)
    assert value == pytest.approx(float(golden.loss), rel=1e-5)
    table = registry.family("flamingo").weights.rules(ours.config, "openflamingo")
    named = {t.key: t.make() for t in rules.export(table, Arrays(flat))}
    errors = golden.gradient_errors(named)
    # A gate is one number, a sum over all tokens in which much cancels: judged beside the others.
    for gate in ("attn_gate", "ff_gate"):
        keys = [k for k in errors if k.endswith(gate)]
        ours_, theirs = (np.array([x[k].item() for k in keys]) for x in (named, golden.gradients))
        errors |= dict.fromkeys(keys, flamingo_golden.relative_error(ours_, theirs))
    assert max(errors.values()) < 1e-4, sorted(errors.items(), key=lambda x: -x[1])[:5]


def test_greedy_tokens_are_the_same_alone_and_in_a_batch(pair):
    golden, ours = pair
    prompts, end = flamingo_peer.examples(golden), golden.config["ids"]["endofchunk"]
    start = golden.input_ids.shape[1]
    want = [row[: [*row, end].index(end)] for row in golden.greedy[:, start:]]
    got = ours.generate_tokens(prompts, max_new_tokens=12)
    for row, tokens in enumerate(want):
        np.testing.assert_array_equal(got[row], tokens)
        alone = ours.generate_tokens(prompts[row : row + 1], max_new_tokens=12)
        np.testing.assert_array_equal(alone[0], tokens)


@pytest.mark.heavy
def test_three_beams_find_the_same_tokens(pair):
    golden, ours = pair
    prompts, end = flamingo_peer.examples(golden), golden.config["ids"]["endofchunk"]
    got = ours.generate_tokens(prompts, max_new_tokens=12, beams=Beams(3, length_penalty=0.0))
    start = golden.input_ids.shape[1]
    for row, tokens in zip(golden.beam3[:, start:], got, strict=True):
        np.testing.assert_array_equal(tokens, row[: [*row, end].index(end)])


def test_likelihoods_behind_a_prompt_with_images_are_the_peers(pair):
    """Its logits of whole rows tell how likely the last two tokens, or one, are behind the rest.

    Each prompt has both answers, of which one is the other's beginning; one ends with a picture.
    """
    golden, ours = pair
    asked, want = [], []
    for example, logits in zip(flamingo_peer.examples(golden), golden.logits, strict=True):
        tokens, at = example["tokens"], len(example["tokens"]) - 2
        fields = {name: x if name == "patches" else x[:at] for name, x in example.items()}
        answers = tokens[at:], tokens[at:-1]
        counted = tuple(np.ones(len(x), bool) for x in answers)
        asked.append(Continuations(fields, answers, counted))
        shifted = np.float64(logits[-3:-1])
        log_p = shifted - np.logaddexp.reduce(shifted, axis=-1, keepdims=True)
        each = log_p[np.arange(2), tokens[at:]]
        want.append([each.sum(), each[0]])
    for found, right in zip(ours.log_likelihoods(asked), want, strict=True):
        np.testing.assert_allclose(found, right, atol=2e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype, most", [(None, 1e-4), ("int8", 0.1)])
def test_a_token_behind_a_prompt_sees_its_last_image(pair, dtype, most):
    """The peer's cached path for class log-likelihoods: one token behind cached prompts.

    An int8 cache moves logits of 5 to 11 by 0.013 to 0.083.
    """
    golden, ours = pair
    batch, lengths = pad_batch(flamingo_peer.examples(golden))
    rows = np.array([1, 0, 1])
    with use(ours.mesh):

        @nnx.jit(graph=False)
        def run(model, batch, lengths, tokens):
            cache = model.init_cache(2, 64, dtype)
            _, cache = model.prefill(batch, lengths, cache)
            cache = cache.take(rows)
            assert cache.k.dtype == jnp.float32  # media keys are not rounded
            return model.logits(model.decode(tokens, cache)[0])

        logits = run(ours.model, batch, lengths, jnp.asarray(golden.next_ids[rows, 0], jnp.int32))
    np.testing.assert_allclose(logits, golden.cached_next_logits[rows, 0], atol=most)
