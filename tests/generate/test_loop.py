"""Generation: with the cache as without, batched as alone."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.generate import beam, copies, loop
from mmjax.generate.beam import Beams, Prefilled
from mmjax.generate.constraints import Constraints
from mmjax.generate.loop import Generator, _generate, bucket, pad_batch, room_for
from mmjax.generate.sampling import Sampling
from mmjax.parallel.mesh import make_mesh, use
from mmjax.parallel.sharding import parameter_shardings
from mmjax.types import MMJaxError
from tests import compiler_options, tiny


def greedy_without_cache(model, example, steps):
    """A whole forward pass for each token, of rows filled up to one length: one program."""
    graphdef, params = nnx.split(model)
    start = len(example["tokens"])
    size = start + steps
    tokens, visual = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32)
    tokens[0, :start], visual[0, :start] = example["tokens"], example["visual_index"]

    @jax.jit
    def likeliest(params, tokens, n):
        model = nnx.merge(graphdef, params)
        positions = jnp.arange(size)[None]
        batch = {
            "tokens": tokens,
            "positions": positions,
            "segment_ids": (positions < n).astype(jnp.int32),
            "visual_index": visual,
            "patches": jnp.asarray(example["patches"])[None],
        }
        return jnp.argmax(model.logits(model(batch)[0, n - 1]))

    for n in range(start, size):
        tokens[0, n] = likeliest(params, tokens, n)
    return tokens[0, start:].tolist()


@pytest.fixture(scope="module")
def model():
    from mmjax.parallel.mesh import use

    with use():
        return tiny.model()


def examples():
    rng = np.random.default_rng(0)
    return [tiny.example(rng, t, p) for t, p in ((9, 3), (30, 0), (17, 5), (5, 2))]


def test_cached_equals_uncached_and_batched_equals_single(model, monkeypatch):
    graphdef, params = nnx.split(model)
    generate = Generator(graphdef, eos=())
    batched = generate(params, examples(), 12)
    counted = []

    def counting(*args):
        tokens, counts = _generate(*args)
        counted.append(counts)
        return tokens, counts

    monkeypatch.setattr(loop, "_generate", counting)
    for example, tokens in zip(examples(), batched, strict=True):
        alone = generate(params, [example], 12, rows=4)[0]
        assert tokens.tolist() == alone.tolist()
    assert np.array(counted)[..., 0].tolist() == [[12, 0, 0, 0]] * 4  # padding says nothing
    assert batched[0].tolist() == greedy_without_cache(model, examples()[0], 12)


@pytest.mark.parametrize("rows, dtype", [(1, None), (2, None), (1, "int8")])
def test_decoding_on_a_cpu_copies_no_cache(model, rows, dtype):
    """Every step would read and write the whole cache once more; one row did, four times."""
    graphdef, params = nnx.split(model)
    batch, lengths = pad_batch(examples()[:rows])
    room = room_for(batch["tokens"].shape[1], 4)
    how = Generator(graphdef, eos=(), cache_dtype=dtype)
    draws = jax.random.key(0), np.zeros(rows, np.int32), how.sampling.numbers()
    some = batch, lengths, draws, how.beams.ranking(room), jnp.int32(4), jnp.int32(rows)
    lowered = _generate.lower(how, room, copies.APART_FIRST, params, *some)
    text = lowered.compile(compiler_options=compiler_options.LIBRARY).as_text()
    c = model.config.decoder
    sizes = f"1,{rows},{c.num_kv_heads},{room}"
    buffers = [rf"f32\[{sizes},{c.head_dim}\]"]
    if dtype == "int8":
        kept = rf"= {buffers[0]}\S* (get-tuple-element|parameter|copy)\("
        assert not re.findall(kept, text)  # no float copy goes from step to step
        buffers = [rf"s8\[{sizes},{c.head_dim}\]", rf"f32\[{sizes}\]"]
    for buffer in buffers:
        assert len(re.findall(rf"= {buffer}\S* get-tuple-element\(", text)) >= 2 * c.num_layers
        assert not re.findall(rf"= {buffer}\S* copy\(", text)
    # Nor does a stacked one exist, whose pages would be new to the process in every call.
    assert f"[{c.num_layers},{rows},{c.num_kv_heads},{room},{c.head_dim}]" not in text


class Device:
    def __init__(self, limit, used=0):
        self.limit, self.used = limit, used

    def memory_stats(self):
        return {"bytes_limit": self.limit, "bytes_in_use": self.used} if self.limit else None


def test_a_gpu_takes_layers_apart_where_it_has_room_for_a_second_copy(model, monkeypatch):
    graphdef, params = nnx.split(model)
    how = Generator(graphdef, eos=(), beside=1000)
    assert how._copy(params, 2, 64) == "apart first"  # a CPU has room
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    kept = sum(x.nbytes for x in jax.tree.leaves(model.init_cache(2, 64)))
    need = 2 * weights + kept * 3 // 2 + 1000
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for limit, copy in ((need, "apart"), (need - 1, None), (0, None)):
        for used in (0, limit):  # at the moment: a run that goes on has to answer alike
            device = Device(limit, used)
            monkeypatch.setattr(copies, "_devices", lambda mesh, device=device: [device])
            assert how._copy(params, 2, 64) == copy
    monkeypatch.setattr(copies, "_devices", lambda mesh: [Device(need)])
    beams = dataclasses.replace(how, beams=Beams(2))
    assert beams._copy(params, 2, 64) is None and beams._copy(params, 1, 64) == "apart"


def test_gpus_gather_over_fsdp_where_each_has_room_for_all(model, monkeypatch):
    graphdef, params = nnx.split(model)
    how = Generator(graphdef, eos=())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kept = sum(x.nbytes for x in jax.tree.leaves(model.init_cache(4, 64)))
    for shape, ways in (({"fsdp": 4}, 4), ({"fsdp": 2, "tensor": 2}, 2)):
        mesh = make_mesh(shape, jax.devices()[:4])
        with use(mesh):
            own = jax.device_put(params, parameter_shardings(params, mesh))
            shards = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(own)]
            cut = [
                size * (mesh.shape["fsdp"] if "fsdp" in tuple(x.sharding.spec) else 1)
                for x, size in zip(jax.tree.leaves(own), shards, strict=True)
            ]
            need = sum(shards) + sum(cut) + 1.5 * (kept // ways)
            for limit, copy in ((int(need) + 1, "apart"), (int(need) - 1, None)):
                monkeypatch.setattr(copies, "_devices", lambda _, limit=limit: [Device(limit)] * 4)
                assert how._copy(own, 4, 64) == copy
    monkeypatch.setattr(copies, "_devices", lambda mesh: [Device(10**12)] * 2)
    with use(make_mesh({"tensor": 2}, jax.devices()[:2])):
        assert how._copy(params, 4, 64) == "apart"  # nothing to gather, but a scan would copy


def test_greedy_takes_the_first_of_equals_and_an_index_whatever_comes():
    logits = np.zeros((4, 6), np.float32)
    logits[1, [2, 4]] = 3
    logits[2] = -np.inf
    logits[3, 3] = np.nan
    assert Sampling()(logits, None).tolist() == [0, 2, 0, 0]
    keys = jax.random.split(jax.random.key(0), 2)  # more than there are to keep: all
    assert Sampling(1e-4, top_k=50)(logits[:2], keys).tolist()[1] in (2, 4)


def test_prompts_of_several_lengths_are_padded_on_the_right():
    bare, rng = examples()[1], np.random.default_rng(1)
    floats = tiny.example(rng, 9, 5)
    floats["patches"] = floats["patches"].astype(np.float32)
    batch, lengths = pad_batch([bare, floats], rows=3)
    assert lengths.tolist() == [30, 9, 1]  # a row of padding is a prompt of one token
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        **dict.fromkeys(("tokens", "positions", "visual_index"), ((3, 32), "int32")),
        "segment_ids": ((3, 32), "int32"),
        "patches": ((3, 6, 48), "float32"),
    }
    for row, (one, n) in enumerate(((bare, 30), (floats, 9))):
        for name in ("tokens", "visual_index"):
            assert batch[name][row, :n].tolist() == one[name].tolist()
        assert batch["segment_ids"][row].tolist() == [1] * n + [0] * (32 - n)
        assert (batch["visual_index"][row, n:] == -1).all()
    assert (batch["visual_index"][2] == -1).all() and not batch["segment_ids"][2].any()
    assert (batch["positions"] == np.arange(32)).all()
    np.testing.assert_array_equal(batch["patches"][1, :5], floats["patches"])
    assert not batch["patches"][[0, 2]].any() and not batch["patches"][1, 5:].any()
    assert "patches" not in pad_batch([bare])[0]
    with pytest.raises(MMJaxError, match="mixes images given as grey levels"):
        pad_batch([examples()[0], floats])


@pytest.mark.parametrize(
    "given, first, longest",
    [
        ((1.0, False), False, False),
        ((2.0, True), True, False),
        ((0.5, "never"), False, True),
        ((0.0, "never"), False, False),
        ((-1.0, "never"), False, False),  # the longest answer is then no best one
    ],
)
def test_ended_beams_are_ranked_by_their_length_from_one_on(given, first, longest):
    divisors, *rule = Beams(3, *given).ranking(4)
    np.testing.assert_allclose(divisors, [n ** given[0] for n in (1, 2, 3, 4)], rtol=1e-6)
    assert [bool(x) for x in rule] == [first, longest]


@pytest.mark.parametrize("beams", [Beams(), Beams(2, early_stopping=True)])
def test_nothing_is_decoded_once_every_answer_has_ended(beams):
    """The second row is padding, which never says the end token, 3."""
    n, calls = beams.num_beams, []
    says = jnp.repeat(jnp.float32([[0, 1, 2, 9], [0, 9, 1, -99]]), n, axis=0)

    class Nothing(NamedTuple):
        def take(self, rows):
            return self

    def decode(tokens, cache):
        jax.debug.callback(lambda: calls.append(1))
        return says, cache

    def answer(history, draws, ranking):
        real, ends, limits = jnp.arange(2) < 1, jnp.int32([3]), Constraints(min_new_tokens=2)
        lengths, most = jnp.int32([2, 1]), jnp.int32(9)
        some = Prefilled(decode, says[::n], Nothing(), history, lengths, real, most, ends)
        if n > 1:
            return beam.search(some, beams, ranking, limits)
        return loop._draw(some, draws, Sampling(), limits)

    draws = jax.random.key(0), np.zeros(2, np.int32), Sampling().numbers()
    rows, counts = jax.jit(answer)(np.zeros((2, 12), np.int32), draws, beams.ranking(12))
    jax.effects_barrier()
    assert counts[0, 0] == 2 and rows[0, 0, 2:5].tolist() == [2, 2, 3]
    assert len(calls) == 2


def drawn(logits, places, sampling, limits=Constraints()):  # noqa: B008
    """Five new tokens of prompts [7] and [8, 9], and their counts, for each pair of places."""
    history = np.zeros((2, 8), np.int32)
    history[0, 0], history[1, :2] = 7, (8, 9)

    def answer(draws):
        real, ends = jnp.ones(2, bool), jnp.int32([3])
        some = Prefilled(
            lambda tokens, cache: (logits, cache), logits, (), jnp.asarray(history),
            jnp.int32([1, 2]), real, jnp.int32(5), ends,
        )  # fmt: skip
        return loop._draw(some, draws, sampling, limits)

    run = jax.jit(answer)
    for pair in places:
        rows, counts = run((jax.random.key(0), np.int32(pair), sampling.numbers()))
        assert rows[0, 0, 0] == 7 and rows[1, 0, :2].tolist() == [8, 9]
        yield [rows[0, 0, 1:6].tolist(), rows[1, 0, 2:7].tolist()], counts[:, 0].tolist()


def test_tokens_of_prompt_and_answer_and_no_others_are_said_once():
    """Zeros lie behind both; an end is said once too, and what follows it counts no more."""
    logits = jnp.tile(jnp.arange(10.0)[::-1].at[7:].set(jnp.float32([9.5, 9.4, 9.3])), (2, 1))
    limits = Constraints(no_repeat_ngram_size=1)
    ((tokens, counts),) = drawn(logits, [(0, 1)], Sampling(), limits)
    assert tokens == [[8, 9, 0, 1, 2], [7, 0, 1, 2, 3]] and counts == [5, 4]


def test_a_draw_is_of_its_place_and_its_step():
    found = drawn(jnp.zeros((2, 10_000)), [(4, 5), (4, 4), (5, 4)], Sampling(1.0))
    (first, other), alike, turned = (tokens for tokens, _ in found)
    assert len({*first, *other}) == 10
    assert alike == [first, first] and turned == [other, first]


def test_a_row_stops_at_the_end_token_and_the_others_go_on(model):
    graphdef, params = nnx.split(model)
    free = Generator(graphdef, eos=())(params, examples(), 12)
    end = int(free[0][4])
    stopped = Generator(graphdef, eos=(end,))(params, examples(), 12)
    for all_tokens, kept in zip(free, stopped, strict=True):
        hits = np.flatnonzero(all_tokens == end)
        assert kept.tolist() == all_tokens[: hits[0] if len(hits) else 12].tolist()
    assert len(stopped[0]) <= 4


def test_sampling_is_seeded_and_narrows(model):
    graphdef, params = nnx.split(model)
    generate = Generator(graphdef, eos=(), sampling=Sampling(temperature=1.5))
    first, again, other = (generate(params, examples(), 8, seed=s) for s in (0, 0, 1))
    assert [x.tolist() for x in first] == [x.tolist() for x in again]
    assert [x.tolist() for x in first] != [x.tolist() for x in other]
    greedy = Generator(graphdef, eos=())(params, examples(), 8)
    for narrow in (Sampling(1.5, top_k=1), Sampling(1.5, top_p=1e-6)):
        tokens = Generator(graphdef, eos=(), sampling=narrow)(params, examples(), 8, seed=3)
        assert [x.tolist() for x in tokens] == [x.tolist() for x in greedy]
    with pytest.raises(MMJaxError, match="top_p"):
        Sampling(top_p=0.0)


def test_other_temperatures_and_shares_compile_nothing_anew(model):
    graphdef, params = nnx.split(model)
    answers, programs = [], []
    for temperature, top_p in ((0.7, 0.9), (1.5, 0.9), (1.5, 1e-6), (0.7, 0.9)):
        generate = Generator(graphdef, eos=(), sampling=Sampling(temperature, top_p=top_p))
        answers.append([x.tolist() for x in generate(params, examples(), 8, seed=3)])
        programs.append(_generate._cache_size())
    assert len(set(programs)) == 1
    greedy = Generator(graphdef, eos=())(params, examples(), 8)
    assert answers[2] == [x.tolist() for x in greedy]
    assert answers[0] == answers[3] and answers[0] != answers[1] != answers[2]


def test_draws_obey_the_constraints(model):
    graphdef, params = nnx.split(model)
    sampling, limits = Sampling(temperature=0.7), Constraints(1.0, 1, min_new_tokens=11)
    generate = Generator(graphdef, eos=(), sampling=sampling)
    free = [x.tolist() for x in generate(params, examples(), 12, seed=2)]
    assert any(len(set(x)) < 12 for x in free)
    generate = Generator(graphdef, tuple(range(12)), sampling, constraints=limits)
    drawn = generate(params, examples(), 12, seed=2)
    for example, tokens in zip(examples(), drawn, strict=True):
        assert len(tokens) >= 11 and min(tokens[:11]) >= 12
        assert len(set(tokens)) == len(tokens) and not set(tokens) & set(example["tokens"])
    # As many as the most are a least that can be, and all that may be said.
    cut = generate(params, examples(), 11, seed=2)
    assert [x.tolist() for x in cut] == [x[:11].tolist() for x in drawn]


def test_buckets_are_few_and_large_enough():
    sizes = {bucket(n) for n in range(1, 2049)}
    assert all(bucket(n) >= n for n in range(1, 2049))
    assert sorted(sizes) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]


def test_a_cache_is_hardly_longer_than_prompt_and_answer():
    """Of a long prompt and a short answer, all that is read for each token is keys and values."""
    t = bucket(2364)
    assert (t, room_for(t, 128), room_for(t, 100), room_for(t, 1)) == (3072, 3200, 3200, 3088)
    assert all(room_for(t, n) - t >= n for n in range(1, 600))
    assert len({room_for(t, n) for n in range(1, 513)}) == 11  # few programs
