"""Answers of weights where they lie and of their copies: the same tokens."""

import jax
import numpy as np
import pytest
from flax import nnx

from mmjax.generate import copies
from mmjax.generate.loop import Generator
from mmjax.generate.sampling import Sampling
from mmjax.models import registry
from tests import small_flamingo, tiny


def small(family):
    """A model and prompts that look at pictures."""
    rng = np.random.default_rng(0)
    if family == "fuyu":
        return tiny.model(), [tiny.example(rng, t, p) for t, p in ((9, 3), (17, 5))]
    found = registry.family(family)
    config = found.Config.from_hf(small_flamingo.hf_config())
    graphdef, params = nnx.split(found.Model(config, rngs=nnx.Rngs(0)))
    # Gates are closed in a new model: it would not look.
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype), params)
    prompts = [tiny.example(rng, t, 0, vocab=300) for t in (9, 17)]
    for prompt in prompts:
        prompt["visual_index"][1] = 0
        prompt["patches"] = rng.integers(0, 256, (1, 8 * 8 * 3)).astype(np.uint8)
    return nnx.merge(graphdef, params), prompts


@pytest.mark.parametrize("family", ["fuyu", "flamingo"])
def test_each_copy_gives_the_same_answer(family, monkeypatch):
    model, prompts = small(family)
    graphdef, params = nnx.split(model)
    how = Generator(graphdef, eos=(), sampling=Sampling(temperature=2.0))
    want = [x.tolist() for x in how(params, prompts, 12)]
    blind = [prompt | {"patches": 255 - prompt["patches"]} for prompt in prompts]
    assert [x.tolist() for x in how(params, blind, 12)] != want  # they look
    for copy in (None, copies.APART):
        monkeypatch.setattr(Generator, "_copy", lambda *_, copy=copy: copy)
        assert [x.tolist() for x in how(params, prompts, 12)] == want, copy
