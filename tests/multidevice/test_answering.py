"""Generation on a mesh: the answers of one device, and no weights that travel for each token."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.generate import copies
from mmjax.generate.likelihood import Continuations, log_likelihoods
from mmjax.generate.loop import Generator, _generate, pad_batch, room_for
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import parameter_shardings
from tests import tiny

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
D = tiny.CONFIG.decoder.d_model


def travels(text):
    """Return how many numbers each collective within the last loop, over tokens, receives."""
    parts = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    entry = parts[re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1]]
    todo, seen = re.findall(r"body=%([\w.\-]+)", entry)[-1:], set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += re.findall(r"(?:to_apply|calls|body|condition)=%([\w.\-]+)", parts[name])
    lines = "\n".join(parts[name] for name in seen)
    found = re.findall(rf"= (.*?) (?:{KINDS})(?:-start)?\(", lines)
    shapes = [re.findall(r"\w+\[([0-9,]*)\]", shape) for shape in found]
    return [sum(math.prod(int(n) for n in s.split(",") if n) for s in one) for one in shapes]


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_weights_travel_once_an_answer_and_not_once_a_token(tied):
    rng = np.random.default_rng(0)
    prompts = [tiny.example(rng, t, p) for t, p in ((9, 3), (30, 0), (17, 5), (5, 2))]
    decoder = dataclasses.replace(tiny.CONFIG.decoder, tied=tied)
    graphdef, params = nnx.split(tiny.model(dataclasses.replace(tiny.CONFIG, decoder=decoder)))
    how = Generator(graphdef, eos=())
    want = [x.tolist() for x in how(params, prompts, 6)]
    batch, lengths = pad_batch(prompts)
    room = room_for(batch["tokens"].shape[1], 6)
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    with use(mesh):
        params = jax.device_put(params, parameter_shardings(params, mesh))
        draws = jax.random.key(0), np.zeros(4, np.int32), how.sampling.numbers()
        some = batch, lengths, draws, how.beams.ranking(room), jnp.int32(6), jnp.int32(4)
        for copy in (None, copies.APART, copies.APART_FIRST):
            run = _generate.lower(how, room, copy, params, *some).compile()
            tokens, counts = run(params, *some)
            got = [row[:n].tolist() for row, n in zip(tokens[:, 0], counts[:, 0], strict=True)]
            assert got == want
            # Of a token: what a row looked up, and whether it has ended. No keys, and no values.
            most = max(travels(run.as_text()))
            assert most == 2 * D * D if copy is None else most <= D


@pytest.mark.parametrize("rows", [4, 3])
def test_answers_are_as_likely_on_a_mesh(rows):
    """Of rows that divide over the devices, and of rows that do not."""
    rng = np.random.default_rng(0)
    asked = []
    for t, p in ((9, 3), (17, 5)):
        answers = tuple(rng.integers(8, 64, n).astype(np.int32) for n in (1, 3, 2))
        counted = tuple(np.ones(len(x), bool) for x in answers)
        asked.append(Continuations(tiny.example(rng, t, p), answers, counted))
    graphdef, params = nnx.split(tiny.model())
    want = log_likelihoods(graphdef, params, asked, rows=rows)
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    with use(mesh):
        params = jax.device_put(params, parameter_shardings(params, mesh))
        got = log_likelihoods(graphdef, params, asked, rows=rows)
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(want), atol=1e-4)
