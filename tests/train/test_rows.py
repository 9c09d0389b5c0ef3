"""Some rows of a table are trained: the others stay bit for bit, whatever the optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmjax.nn import paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.schema import to_dataclass
from mmjax.train import build, optim, state, step
from mmjax.train import rows as trained_rows
from mmjax.train.rows import Rows, RowSettings
from mmjax.train.settings import LoRASettings, ModelSettings, RunSettings
from mmjax.types import MMJaxError
from tests import tiny

TABLE, HEAD = "decoder.embed.embedding", "decoder.head.kernel"
ROWS = {TABLE: Rows(0, (5, 9, 63)), HEAD: Rows(1, (9, 11))}
SETTINGS = optim.OptimSettings(
    lr=1e-2, warmup=0, schedule="constant", weight_decay=0.5, decay=("*",)
)


def tables(seed):
    """A little model: a table, a head and a kernel of layers, of random numbers."""
    rng = np.random.default_rng(seed)

    def param(shape, axes):
        return nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32), out_sharding=axes)

    embed, head = param((64, 8), ("vocab", "embed")), param((8, 64), ("embed", "vocab"))
    up = param((2, 8, 16), ("layers", "embed", "mlp"))
    return nnx.State(
        {
            "decoder": {
                "embed": {"embedding": embed},
                "head": {"kernel": head},
                "layers": {"mlp": {"up": {"kernel": up}}},
            }
        }
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_other_rows_stay_bit_for_bit_under_every_optimizer_with_decay(name):
    tx = optim.make_optimizer(dataclasses.replace(SETTINGS, name=name), 10)
    params, before = tables(0), paths.flatten(tables(0))
    opt = tx.init(params)
    for seed in (1, 2):
        updates, opt = tx.update(trained_rows.masked(ROWS, tables(seed)), opt, params)
        params = trained_rows.restored(ROWS, optax.apply_updates(params, updates), params)
    after = paths.flatten(params)
    for table, one in ROWS.items():
        old, new = (np.moveaxis(np.asarray(x[table]), one.axis, 0) for x in (before, after))
        assert np.flatnonzero(np.any(old != new, axis=1)).tolist() == list(one.ids)
        rest = np.setdiff1d(np.arange(64), one.ids)
        assert old[rest].tobytes() == new[rest].tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt):
            if paths.name_of(path).endswith(table) and leaf.shape == before[table].shape:
                moments = np.abs(np.moveaxis(np.asarray(leaf, np.float32), one.axis, 0))
                # Adafactor adds 1e-30 to every square.
                assert moments[rest].max() < 1e-29 < moments[list(one.ids)].min()
    kernel = "decoder.layers.mlp.up.kernel"
    assert np.all(before[kernel] != after[kernel])


@pytest.mark.heavy
@pytest.mark.parametrize(
    "mesh, accumulate",
    [pytest.param({}, 1, marks=pytest.mark.heavy), ({"fsdp": 2, "tensor": 2}, 2)],
)
def test_gradient_norm_and_clipping_see_the_chosen_rows_alone(whole, mesh, accumulate):
    """SGD moves by the gradient: what is chosen moves as without a choice, and makes the norm."""
    want = {}
    for name, rows in ROWS.items():
        keep = np.zeros(64, bool)
        keep[list(rows.ids)] = True
        want[name] = np.where(keep[:, None] if rows.axis == 0 else keep, whole[name], 0)
    norm = np.sqrt(sum((x**2).sum() for x in want.values()))
    clip = optax.chain(optax.clip_by_global_norm(norm / 4), optax.sgd(1.0))
    got, metrics, same = moved(clip, mesh, rows=ROWS, accumulate=accumulate)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name] / 4, atol=2e-6, err_msg=name)
        assert same[name].sum() >= 32 * (64 - len(ROWS[name].ids))


@pytest.fixture(scope="module")
def whole():
    """The gradients of both tables, without a choice of rows."""
    return moved(optax.sgd(1.0), {})[0]


def moved(tx, mesh, **options):
    """How far one step moves each parameter, its metrics, and which numbers are as they were."""
    count = int(np.prod(list(mesh.values()) or [1]))
    with use(make_mesh(mesh, jax.devices()[:count])) as where:
        graphdef, train, frozen = state.init(tiny.model, {*ROWS}, tx, where)
        fn = step.make_train_step(graphdef, tx, lambda _: 1.0, **options)
        after, metrics = jax.jit(fn)(train, frozen, tiny.batch())
        old, new = (jax.device_get(paths.flatten(t.params)) for t in (train, after))
    far = {name: old[name] - new[name] for name in old}
    return far, jax.device_get(metrics), {name: old[name] == new[name] for name in old}


SIZES = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, patch_size=8
)
MODEL = ModelSettings(config=SIZES, words=("what is it? red", "User: Assistant:"))


@pytest.fixture(scope="module")
def plan():
    return build.blueprint(MODEL, LoRASettings(), 0)


def resolve(plan, *settings, new=()):
    params = nnx.state(nnx.eval_shape(plan.make))
    return trained_rows.resolve(settings, params, plan.processor, new)


def test_rows_are_named_by_id_by_token_and_by_their_name_in_the_config(plan):
    eos, image = plan.config.eos_token_id, plan.config.image_token_id
    token = plan.processor.tokenizer.convert_ids_to_tokens(eos)
    found = resolve(
        plan, RowSettings(TABLE, ("image", token, 9)), RowSettings("*head.kernel", (9,))
    )
    assert found == {TABLE: Rows(0, tuple(sorted((image, eos, 9)))), HEAD: Rows(1, (9,))}
    assert resolve(plan, RowSettings("*.embedding"), new=(62, 63)) == {TABLE: Rows(0, (62, 63))}
    # Of two settings the rows of both, each once and in order; the token with the id 0 is one.
    first = plan.processor.tokenizer.convert_ids_to_tokens(0)
    both = resolve(
        plan, RowSettings("decoder.*.embedding", (63, 9, 63)), RowSettings(TABLE, (first, 9, 40))
    )
    assert both == {TABLE: Rows(0, (0, 9, 40, 63))}
    assert resolve(plan, RowSettings("decoder.embed", (9,))) == {}  # a pattern is of whole names
    with pytest.raises(MMJaxError, match=f"no row {plan.config.vocab_size}$"):
        resolve(plan, RowSettings(TABLE, (plan.config.vocab_size,)))
    many = trained_rows.describe({TABLE: Rows(0, tuple(range(10)))}, plan.processor)
    shown = many[f"rows of {TABLE}"]
    assert shown.count(",") == 7 and shown.endswith(" and 2 more")
    assert shown.startswith(f"0 {first}, 1 ")
    eight = trained_rows.describe({TABLE: Rows(0, tuple(range(8)))}, plan.processor)
    assert eight[f"rows of {TABLE}"] == shown.removesuffix(" and 2 more")
    told = trained_rows.describe(found, plan.processor)
    assert f"{eos} {token}" in told[f"rows of {TABLE}"]
    assert trained_rows.count(found, TABLE, (64, 32)) == 3 * 32
    assert trained_rows.count(found, HEAD, (32, 64)) == 32
    assert trained_rows.count(found, "decoder.layers.mlp.up.kernel", (2, 8, 8)) == 128


@pytest.mark.parametrize(
    "rows, says",
    [
        (dict(rows=("imag",)), ["'imag' is no token", "did you mean 'image'?"]),
        (dict(rows=(10_000,)), ["no row 10000", TABLE]),
        (dict(rows=(9, -1)), ["no row -1", TABLE]),
        (dict(rows=()), ["no rows for"]),
        (dict(rows="new"), ["rows='new'", "name the tokens"]),
        (dict(params="*attn.q.kernel", rows=(1,)), ["is no table of the vocabulary", "train"]),
    ],
)
def test_rows_that_cannot_be_meant_are_named(plan, rows, says):
    with pytest.raises(MMJaxError) as error:
        resolve(plan, RowSettings(**dict(params=TABLE) | rows))
    for part in says:
        assert part in str(error.value)


def test_a_recipe_writes_rows_as_plain_values():
    made = to_dataclass(
        RunSettings, dict(train_rows=(dict(params="a", rows=["<image>", 7]), dict(params="b")))
    )
    assert made.train_rows == (RowSettings("a", ("<image>", 7)), RowSettings("b", "new"))
    with pytest.raises(MMJaxError, match=r"train_rows\[0\]\.rows"):
        to_dataclass(RunSettings, dict(train_rows=(dict(params="a", rows="old"),)))
