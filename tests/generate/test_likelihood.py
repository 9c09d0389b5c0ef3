"""Likelihoods of given answers: with the cache as in one whole pass, whatever runs beside them."""

import jax
import numpy as np
import pytest
from flax import nnx

from mmjax.generate.likelihood import Continuations, continuations, log_likelihoods
from mmjax.generate.loop import pad_batch
from mmjax.parallel.mesh import use
from mmjax.types import BadSample
from tests import tiny


@pytest.fixture(scope="module")
def parts():
    with use():
        return nnx.split(tiny.model())


def asked():
    """Three prompts with 3, 1 and 4 answers; one begins as another, one has uncounted tokens."""
    rng = np.random.default_rng(0)
    out = []
    for t, patches, sizes in ((9, 3, (1, 4, 2)), (30, 0, (3,)), (17, 5, (2, 2, 19, 1))):
        tokens = [rng.integers(8, 64, n).astype(np.int32) for n in sizes]
        tokens[-1][:1] = tokens[0][:1]
        counted = [np.ones(n, bool) for n in sizes]
        counted[0][0] = sizes[0] == 1
        prompt = tiny.example(rng, t, patches)
        out.append(Continuations(prompt, tuple(tokens), tuple(counted)))
    return out


def in_one_pass(parts, one):
    """Return the sums from the logits of each prompt with its answer behind it, without a cache."""
    rows = []
    for tokens in one.tokens:
        visual = np.concatenate([one.prompt["visual_index"], np.full(len(tokens), -1, np.int32)])
        row = np.concatenate([one.prompt["tokens"], tokens])
        rows.append(one.prompt | {"tokens": row, "visual_index": visual})
    (batch, _), t = pad_batch(rows), len(one.prompt["tokens"])
    log_p = np.float64(jax.nn.log_softmax(_logits(parts, batch)))
    return [
        sum(log_p[i, t - 1 + j, token] for j, token in enumerate(tokens) if mask[j])
        for i, (tokens, mask) in enumerate(zip(one.tokens, one.counted, strict=True))
    ]


@jax.jit
def _logits(parts, batch):
    model = nnx.merge(*parts)
    return model.logits(model(batch))


@pytest.mark.parametrize("rows", [8, 3])
def test_they_equal_those_of_one_pass_without_a_cache(parts, rows):
    """With 3 rows the 8 answers of the 3 prompts run in three parts."""
    with use():
        got = log_likelihoods(*parts, asked(), rows=rows)
    for found, one in zip(got, asked(), strict=True):
        np.testing.assert_allclose(found, in_one_pass(parts, one), rtol=1e-5, atol=1e-4)


def test_an_int8_cache_stays_near(parts):
    with use():
        exact = log_likelihoods(*parts, asked(), rows=8)
        near = log_likelihoods(*parts, asked(), rows=8, cache_dtype="int8")
    errors = np.concatenate(near) - np.concatenate(exact)
    assert 0 < np.abs(errors).max() < 0.2


def example(tokens, mask):
    tokens = np.array(tokens, np.int32)
    rest = {"positions": np.arange(len(tokens)), "visual_index": np.full(len(tokens), -1)}
    return {
        "tokens": tokens,
        "loss_mask": np.array(mask, bool),
        **rest,
        "patches": np.zeros((0, 3)),
    }


def test_what_examples_share_is_the_prompt():
    """The third's tokenizer joined the prompt's last letter to the answer; an end mark is cut."""
    one = continuations(
        [
            example([1, 2, 3, 4, 5, 9], [0, 0, 0, 0, 1, 0]),
            example([1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 1, 1]),
            example([1, 2, 3, 8, 7], [0, 0, 0, 0, 1]),
        ]
    )
    assert one.prompt["tokens"].tolist() == [1, 2, 3] and len(one.prompt["positions"]) == 3
    assert [x.tolist() for x in one.tokens] == [[4, 5], [4, 5, 6, 7], [8, 7]]
    assert [x.tolist() for x in one.counted] == [[False, True], [False, True, True, True],
                                                 [False, True]]  # fmt: skip
    assert one.counts.tolist() == [1, 3, 1] and one.longest == 4
    assert one.prompt["patches"].shape == (0, 3)


@pytest.mark.parametrize("mask", [[0, 0, 0], [1, 1, 1]])
def test_an_answer_without_a_token_of_its_own_is_refused(mask):
    with pytest.raises(BadSample, match="an answer has no token of its own behind its prompt"):
        continuations([example([1, 2, 3], [0, 0, 1]), example([1, 2, 4], mask)])


def test_an_answer_that_shows_an_image_is_refused():
    shows = example([1, 2, 3, 4], [0, 0, 1, 1])
    begins = example([1, 2, 3, 4], [0, 0, 1, 1])
    shows["visual_index"][3] = 0
    begins["visual_index"][2:] = 0
    for one in (shows, begins):
        with pytest.raises(BadSample, match="an answer shows an image"):
            continuations([example([1, 2, 5], [0, 0, 1]), one])
