"""What is trained, what is frozen, and that states are born in place."""

import jax
import numpy as np
import pytest
from flax import nnx

from mmjax.nn import paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.train import optim, state
from mmjax.types import MMJaxError
from tests import tiny

NAMES = ["embed.embedding", "layers.q.kernel", "layers.q.lora_a", "layers.q.lora_b", "head.kernel"]
TX = optim.make_optimizer(optim.OptimSettings(), 10)


def make():
    return tiny.Fuyu(tiny.CONFIG, rngs=nnx.Rngs(0))


def all_names():
    return list(paths.flatten(nnx.state(nnx.eval_shape(make))))


def test_names_are_chosen_by_pattern_and_adapter():
    assert state.trainable_names(NAMES, (), False) == set(NAMES)
    assert state.trainable_names(NAMES, (), True) == {"layers.q.lora_a", "layers.q.lora_b"}
    assert state.trainable_names(NAMES, ("layers.*", "embed.*"), False) == {"head.kernel"}
    assert state.trainable_names(NAMES, ("*_b",), True) == {"layers.q.lora_a"}


@pytest.mark.parametrize(
    "train, rows, freeze, lora, expected",
    [
        (("head.*",), (), (), False, {"head.kernel"}),
        (("*.kernel",), (), ("head.*",), False, {"layers.q.kernel"}),
        (("head.*",), (), (), True, {"head.kernel", "layers.q.lora_a", "layers.q.lora_b"}),
        (("head.*",), (), ("*_a",), True, {"head.kernel", "layers.q.lora_b"}),
        (("head.*",), ("embed.*",), (), False, {"head.kernel", "embed.embedding"}),
        ((), ("embed.*",), (), True, {"embed.embedding", "layers.q.lora_a", "layers.q.lora_b"}),
        ((), ("embed.*",), ("layers.*",), False, {"embed.embedding", "head.kernel"}),
    ],
)
def test_what_train_names_is_trained_beside_adapters_and_rows(train, rows, freeze, lora, expected):
    assert state.trainable_names(NAMES, freeze, lora, train, rows) == expected


def test_a_head_that_is_the_embedding_is_said_to_be_that():
    """As in a recipe for LLaMA that is given an MPT: the nearest name would be no help."""
    names = ["decoder.embed.embedding", "decoder.layers.attn.q.kernel"]
    for what in ("train", "freeze"):
        given = {"freeze": (), "lora": False} | {what: ("decoder.head.*",)}
        says = rf"{what} pattern 'decoder\.head\.\*' .*head is its embedding table, {names[0]}"
        with pytest.raises(MMJaxError, match=says):
            state.trainable_names(names, **given)
    both = [*names, "decoder.head.kernel"]
    assert state.trainable_names(both, (), False, ("decoder.head.*",)) == {both[-1]}


@pytest.mark.parametrize(
    "train, rows, freeze, says",
    [
        (("perciever.*",), (), (), "train pattern 'perciever.*' matches no parameter"),
        ((), ("embed.embeding",), (), "did you mean 'embed.embedding'?"),
        ((), ("embed.*",), ("embed.*",), "train_rows trains rows of embed.embedding, which freeze"),
        (("head.*",), (), ("*.kernel",), "nothing is left to train"),
    ],
)
def test_train_patterns_that_cannot_be_meant_are_refused(train, rows, freeze, says):
    with pytest.raises(MMJaxError) as error:
        state.trainable_names(NAMES, freeze, False, train, rows)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "freeze, says",
    [
        (("visoin.*",), "'visoin.*' matches no parameter; names look like embed.embedding"),
        (("*",), "nothing is left to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(freeze, says):
    with pytest.raises(MMJaxError) as error:
        state.trainable_names(NAMES, freeze, False)
    assert says in str(error.value)


def test_a_split_model_is_whole_again_when_merged():
    chosen = {n for n in all_names() if n.endswith("kernel")}
    model = tiny.model()
    graphdef, params, frozen = state.split(model, chosen)
    assert set(paths.flatten(params)) == chosen
    assert set(paths.flatten(frozen)) == set(all_names()) - chosen
    batch = tiny.batch(b=2)
    merged = nnx.merge(graphdef, params, frozen)
    np.testing.assert_array_equal(merged(batch), model(batch))


def test_the_abstract_state_tells_what_init_makes():
    with use(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})) as mesh:
        chosen = state.trainable_names(all_names(), ("decoder.embed.*",), False)
        _, abstract, rest = state.abstract_state(make, chosen, TX, mesh)
        _, made, frozen = state.init(make, chosen, TX, mesh)
    assert int(made.step) == 0 and set(paths.flatten(frozen)) == {"decoder.embed.embedding"}
    assert jax.tree.structure((abstract, rest)) == jax.tree.structure((made, frozen))
    pairs = zip(jax.tree.leaves((abstract, rest)), jax.tree.leaves((made, frozen)), strict=True)
    for told, got in pairs:
        assert (told.shape, told.dtype) == (got.shape, got.dtype)
        assert told.sharding.is_equivalent_to(got.sharding, got.ndim)


def test_moments_lie_where_their_parameters_lie():
    with use(make_mesh({"fsdp": 4, "tensor": 2})) as mesh:
        _, abstract, _ = state.abstract_state(make, set(all_names()), TX, mesh)
    place = {x.shape: x.sharding for x in jax.tree.leaves(abstract.params)}
    moments = [x for x in jax.tree.leaves(abstract.opt) if x.shape]
    assert len(moments) == 2 * len(jax.tree.leaves(abstract.params))
    for name, x in paths.flatten(abstract.params).items():
        twins = [
            leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.opt)
            if paths.name_of(path).endswith(name) and leaf.shape == x.shape
        ]  # fmt: skip
        assert len(twins) == 2, name
        assert all(t.sharding == x.sharding for t in twins), name
    assert place


def test_the_same_seed_makes_the_same_numbers_on_any_mesh():
    got = []
    for shape, count in (({}, 1), ({"fsdp": 4, "tensor": 2}, 8)):
        with use(make_mesh(shape, jax.devices()[:count])) as mesh:
            _, made, _ = state.init(make, set(all_names()), TX, mesh)
            got.append(jax.device_get(paths.flatten(made.params)))
    for name, value in got[0].items():
        np.testing.assert_array_equal(value, got[1][name], err_msg=name)
