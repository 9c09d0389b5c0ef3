"""Beam search and constraints against transformers' generate: the same tokens, whatever ends."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.generation import logits_process

import mmjax.loading
from mmjax.generate.beam import Beams
from mmjax.generate.constraints import Constraints
from mmjax.generate.likelihood import Continuations
from mmjax.generate.loop import Generator, _generate
from mmjax.generate.sampling import Sampling
from mmjax.parallel.mesh import use
from tests.parity import peer

# A vocabulary so small that the end token comes up in most answers, early in some.
VOCAB, EOS, NEW = 24, 10, 16


def prompts():
    rng = np.random.default_rng(0)
    none = np.zeros((0, 3 * peer.PATCH**2), np.float32)
    return [(rng.integers(8, VOCAB, n).astype(np.int32), none) for n in (3, 6, 9, 14, 21)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    theirs = peer.tiny_fuyu(vocab=VOCAB, eos=EOS, seed=3)
    theirs.save_pretrained(folder)
    with use():
        return theirs, mmjax.loading.load(folder, dtype="float32")


def cut(row, eos):
    ends = [i for i, token in enumerate(row) if token in eos]
    return row[: ends[0]] if ends else row


def their_tokens(theirs, samples, eos=(EOS,), **options):
    """Return what the peer generates for a batch, each row cut at its end token."""
    inputs = peer.left_padded(samples)
    del inputs["position_ids"]
    start = inputs["input_ids"].shape[1]
    if "pixel_values" in inputs:
        # This release does not repeat Fuyu's patches for its beams, so the prompt goes in embedded.
        with torch.no_grad():
            embedded = theirs(**inputs, output_hidden_states=True).hidden_states[0]
        inputs = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
        start = 0  # and does not come out
    out = theirs.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=list(eos), pad_token_id=0,
        **options,
    )  # fmt: skip
    return [cut(row, eos) for row in out[:, start:].tolist()]


def our_tokens(loaded, samples, eos=(EOS,), beams=None, constraints=None, rows=None):
    graphdef, params = nnx.split(loaded.model)
    generate = Generator(
        graphdef, eos, beams=beams or Beams(), constraints=constraints or Constraints()
    )
    return [row.tolist() for row in generate(params, peer.examples(samples), NEW, rows=rows)]


@pytest.mark.parametrize(
    "num_beams", [3, *(pytest.param(n, marks=pytest.mark.heavy) for n in (2, 4))]
)
def test_beam_search_is_identical_in_one_program(both, num_beams):
    theirs, loaded = both
    answers, programs = set(), _generate._cache_size()
    grid = itertools.product((0.0, 1.0, 2.0), (False, True, "never"))
    if num_beams != 3:
        grid = (0.0, False), (1.0, True), (2.0, False), (2.0, True), (2.0, "never")
    for length_penalty, early_stopping in grid:
        options = dict(
            num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping
        )
        want = their_tokens(theirs, prompts(), **options)
        got = our_tokens(loaded, prompts(), beams=Beams(**options))
        assert got == want, options
        answers.add(str(want))
    assert len(answers) >= 4  # penalties and stopping rules do make a difference here
    assert _generate._cache_size() == programs + 1


def test_a_prompt_is_answered_alone_as_in_a_batch(both):
    theirs, loaded = both
    beams = Beams(3, 2.0, "never")
    together = our_tokens(loaded, prompts(), beams=beams)
    lengths = {len(row) for row in together}
    assert min(lengths) < NEW and max(lengths) == NEW
    for sample, answer in zip(prompts(), together, strict=True):
        assert our_tokens(loaded, [sample], beams=beams, rows=5) == [answer]
        alone = their_tokens(
            theirs, [sample], num_beams=3, length_penalty=2.0, early_stopping="never"
        )
        assert alone == [answer]


@pytest.mark.heavy
def test_several_end_tokens_and_several_answers_are_identical(both):
    theirs, loaded = both
    eos, options = (EOS, 5, 19), dict(num_beams=4, num_return_sequences=3)
    want = their_tokens(theirs, prompts(), eos, **options)
    graphdef, params = nnx.split(loaded.model)
    got = Generator(graphdef, eos, beams=Beams(**options))(params, peer.examples(prompts()), NEW)
    assert [[row.tolist() for row in rows] for rows in got] == [
        want[i : i + 3] for i in range(0, 15, 3)
    ]
    assert len({len(row) for row in want}) > 3


@pytest.mark.heavy
def test_beams_are_identical_where_images_stand_in_the_prompt(both):
    theirs, loaded = both
    rng = np.random.default_rng(5)
    samples = []
    for layout in ([(2, 3), 5], [2, (1, 2), 3, (2, 2), 4]):
        ids, patches = peer.sample(7, layout)
        ids = np.where(ids >= 8, rng.integers(8, VOCAB, len(ids)), ids).astype(np.int32)
        samples.append((ids, patches))
    want = their_tokens(theirs, samples, num_beams=3, length_penalty=0.0)
    assert our_tokens(loaded, samples, beams=Beams(3, 0.0)) == want
    blind = [(ids, patches + 1) for ids, patches in samples]
    assert their_tokens(theirs, blind, num_beams=3, length_penalty=0.0) != want


CONSTRAINTS = [
    pytest.param(dict(repetition_penalty=1.4), 1, marks=pytest.mark.heavy),
    pytest.param(dict(repetition_penalty=1.4), 3, marks=pytest.mark.heavy),
    pytest.param(dict(no_repeat_ngram_size=2), 1, marks=pytest.mark.heavy),
    pytest.param(dict(no_repeat_ngram_size=3), 3, marks=pytest.mark.heavy),
    pytest.param(dict(min_new_tokens=9), 1, marks=pytest.mark.heavy),
    pytest.param(dict(min_new_tokens=9), 3, marks=pytest.mark.heavy),
    (dict(repetition_penalty=0.8, no_repeat_ngram_size=2, min_new_tokens=5), 3),
]


@pytest.mark.heavy
@pytest.mark.parametrize("options, num_beams", CONSTRAINTS)
def test_constraints_are_identical_greedily_and_with_beams(both, options, num_beams):
    theirs, loaded = both
    beams = Beams(num_beams)
    got = our_tokens(loaded, prompts(), beams=beams, constraints=Constraints(**options))
    # The peer's n-grams see the padding of a batch, so it answers one prompt after the other.
    want = [their_tokens(theirs, [s], num_beams=num_beams, **options)[0] for s in prompts()]
    assert got == want
    assert got != their_tokens(theirs, prompts(), num_beams=num_beams)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_scores_are_the_peers_own(n):
    """Rows of every length, shorter than an n-gram too; what lies behind them is not looked at."""
    rng = np.random.default_rng(n)
    history = rng.integers(0, 6, (8, 12)).astype(np.int32)
    scores = rng.normal(size=(8, 9)).astype(np.float32)
    filled = np.arange(1, 9, dtype=np.int32) + 3 * (np.arange(8) > 5)
    limits = Constraints(1.3, n, min_new_tokens=4)
    longer = Constraints(no_repeat_ngram_size=13)(scores, history, filled, 3, np.asarray([2]))
    np.testing.assert_array_equal(longer, scores)  # no row of 12 has such an n-gram
    for step in (3, 4):
        got = np.asarray(limits(scores, history, filled, step, np.asarray([2, 8])))
        for row in range(8):
            ids = torch.from_numpy(history[row : row + 1, : filled[row]]).long()
            want = torch.from_numpy(scores[row : row + 1])
            for change in (
                logits_process.RepetitionPenaltyLogitsProcessor(1.3),
                logits_process.NoRepeatNGramLogitsProcessor(n),
                logits_process.MinLengthLogitsProcessor(ids.shape[1] - step + 4, [2, 8]),
            ):
                want = change(ids, want)
            np.testing.assert_allclose(got[row], want[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("given", [{}, dict(top_k=3), dict(top_p=0.7), dict(top_k=4, top_p=0.8)])
def test_draws_have_the_peers_distribution(given):
    """Of 4,000 draws no share is off by more than 0.03, four standard deviations."""
    logits = np.float32([2.0, 0.3, -1.0, 1.2, 0.9, -0.4])
    want = torch.from_numpy(logits)[None]
    for change, value in (
        (logits_process.TemperatureLogitsWarper, 1.7),
        (logits_process.TopKLogitsWarper, given.get("top_k", 6)),
        (logits_process.TopPLogitsWarper, given.get("top_p", 1.0)),
    ):
        want = change(value)(None, want)
    want = want.softmax(-1)[0].numpy()
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = Sampling(1.7, **given)(jnp.broadcast_to(logits, (4000, 6)), keys)
    shares = np.bincount(drawn, minlength=6) / 4000
    np.testing.assert_array_equal(shares > 0, want > 0)
    np.testing.assert_allclose(shares, want, atol=0.03)


def test_likelihoods_of_given_answers_are_the_peers(both):
    """The peer's from its logits of prompt and answer in one pass, each alone."""
    theirs, ours = both
    rng, asked, want = np.random.default_rng(1), [], []
    for row, (tokens, patches) in enumerate(prompts()):
        answers = [rng.integers(8, VOCAB, n).astype(np.int32) for n in (1, 3, 1 + row)]
        counted = tuple(np.ones(len(x), bool) for x in answers)
        prompt = ours.encode(tokens) | {"patches": patches}
        asked.append(Continuations(prompt, tuple(answers), counted))
        want.append([])
        for answer in answers:
            whole = torch.tensor(np.concatenate([tokens, answer])[None].astype(np.int64))
            with torch.no_grad():
                logits = theirs(input_ids=whole).logits[0].double()
            log_p = torch.log_softmax(logits, -1)[len(tokens) - 1 : -1]
            own = torch.gather(log_p, 1, torch.tensor(answer.astype(np.int64))[:, None])
            want[-1].append(float(own.sum()))
    for found, right in zip(ours.log_likelihoods(asked), want, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-4)
