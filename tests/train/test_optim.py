"""Schedules at the steps that matter, clipping and decay against torch's arithmetic."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmjax.nn import paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.train import state as train_state
from mmjax.train.optim import OptimSettings, check_decay, decays, make_optimizer, schedule
from mmjax.types import MMJaxError
from tests import tiny


def values(steps=100, at=(), **kwargs):
    rate = schedule(OptimSettings(lr=1e-2, **kwargs), steps)
    return [float(rate(i)) for i in at]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_rises_from_the_first_step_to_the_peak(kind):
    got = values(schedule=kind, warmup=10, at=(0, 4, 9, 10))
    np.testing.assert_allclose(got, [1e-3, 5e-3, 1e-2, 1e-2], rtol=1e-5)


def test_each_schedule_ends_where_it_says():
    # 10 of warm-up leave 90: half-way is step 55.
    half = 1e-2 * 0.5 * (1 + math.cos(math.pi * 0.5))
    got = values(schedule="cosine", warmup=10, at=(55, 100))
    np.testing.assert_allclose(got, [half, 0], atol=1e-8)
    got = values(schedule="cosine", warmup=10, final_lr=0.2, at=(55, 100))
    np.testing.assert_allclose(got, [6e-3, 2e-3], rtol=1e-5)
    got = values(schedule="linear", warmup=10, final_lr=0.1, at=(55, 100))
    np.testing.assert_allclose(got, [5.5e-3, 1e-3], rtol=1e-5)
    assert values(schedule="constant", warmup=10, at=(55, 99)) == pytest.approx([1e-2, 1e-2])


def test_warm_up_may_be_a_share_or_nothing():
    assert values(warmup=0.05, at=(0, 4)) == pytest.approx([2e-3, 1e-2])
    # Of 100 steps; as floats 0.29 * 100 is below 29.
    assert values(warmup=0.29, at=(27, 28)) == pytest.approx([1e-2 * 28 / 29, 1e-2])
    assert values(warmup=1, at=(0,)) == pytest.approx([1e-2])  # one step, not all of them
    assert values(warmup=0, schedule="linear", at=(0, 50)) == pytest.approx([1e-2, 5e-3])
    assert values(steps=10, warmup=10, at=(9,)) == pytest.approx([1e-2])


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(MMJaxError, match=r"optim\.warmup is 200 steps and the run has 100"):
        schedule(OptimSettings(warmup=200), 100)


def settings(**kwargs):
    plain = dict(lr=0.1, warmup=0, schedule="linear", weight_decay=0.0, clip_norm=0.0)
    return OptimSettings(**plain | kwargs)


def test_a_restored_optimizer_goes_on_along_the_schedule():
    tx = make_optimizer(settings(), 10)
    params = {"a": {"kernel": jnp.ones(2)}}
    gradient = {"a": {"kernel": jnp.array([1.0, -2.0])}}
    state, steps = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update(gradient, state, params)
        steps.append(updates["a"]["kernel"])
    # With one gradient again and again Adam moves by exactly the learning rate.
    np.testing.assert_allclose([abs(s[0]) for s in steps], 0.1 - 0.01 * np.arange(6), rtol=1e-4)
    # What a checkpoint keeps: leaves by their path, put into a state made anew.
    leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
    again = jax.tree.unflatten(jax.tree.structure(tx.init(params)), leaves)
    ours, _ = tx.update(gradient, again, params)
    theirs, _ = tx.update(gradient, state, params)
    np.testing.assert_array_equal(ours["a"]["kernel"], theirs["a"]["kernel"])


def test_clipping_bounds_the_norm_over_all_parameters():
    gradient = {"a": {"kernel": jnp.array([3.0, 0.0])}, "b": {"bias": jnp.array([4.0])}}
    for bound, scale in ((1.0, 1 / 5), (10.0, 1.0), (0.0, 1.0)):
        # Adam hides the scale of its gradients; its first moment does not: (1 - b1) * g.
        tx = make_optimizer(settings(clip_norm=bound), 10)
        _, state = tx.update(gradient, tx.init(gradient), gradient)
        mu = optax.tree.get(state, "mu")
        np.testing.assert_allclose(mu["a"]["kernel"], [0.1 * 3 * scale, 0], rtol=1e-5)
        np.testing.assert_allclose(mu["b"]["bias"], [0.1 * 4 * scale], rtol=1e-5)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("decoder.layers.attn.q.kernel", True),
        ("patch_embed.kernel", True),
        ("decoder.layers.mlp.up.lora_a", True),
        ("decoder.layers.mlp.up.bias", False),
        ("decoder.layers.attn_norm.scale", False),
        ("decoder.embed.embedding", False),
    ],
)
def test_decay_acts_on(name, expected):
    assert decays(name) is expected


def test_decay_by_pattern_is_that_of_torchs_groups():
    """As AdamW with one group of decay 0.5 for a part, norms and gates too, and one of none."""
    names = ("cross.attn.q.kernel", "cross.attn_gate", "decoder.layers.mlp.up.kernel")
    tx = make_optimizer(settings(weight_decay=0.5, decay=("cross.*",)), 10)
    values = {name: np.array([3.0, -2.0], np.float32) for name in names}
    gradient = {name: np.array([0.3, 0.1], np.float32) * (i + 1) for i, name in enumerate(names)}
    opt, ours = tx.init(values), values
    moments = {name: [0.0, 0.0] for name in names}
    want = dict(values)
    for step in (1, 2):
        updates, opt = tx.update(gradient, opt, ours)
        ours = optax.apply_updates(ours, updates)
        lr = 0.1 - 0.01 * (step - 1)
        for name in names:
            g, (m, v) = gradient[name], moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            moments[name] = m, v
            decayed = want[name] * (1 - lr * 0.5 * name.startswith("cross."))
            hat = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
            want[name] = decayed - lr * hat
    for name in names:
        np.testing.assert_allclose(ours[name], want[name], rtol=1e-5, err_msg=name)


def test_a_decay_pattern_that_matches_nothing_is_named():
    names = ["cross.attn.q.kernel", "decoder.embed.embedding"]
    check_decay(settings(), names)  # no adapters here, and that is no mistake
    check_decay(settings(decay=()), names)
    with pytest.raises(MMJaxError, match=r"'cros\.\*' matches no parameter.*cross\.attn"):
        check_decay(settings(decay=("cros.*",)), names)


def test_decay_is_decoupled_and_scaled_by_the_learning_rate():
    tx = make_optimizer(settings(weight_decay=0.5), 10)
    params = {"kernel": jnp.full(2, 3.0), "bias": jnp.full(2, 3.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_decay_of_bfloat16_parameters_is_not_rounded_to_their_digits():
    tx = make_optimizer(settings(weight_decay=0.1), 10)
    params = {"kernel": jnp.full(2, 3.0, jnp.bfloat16)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.1 * 3.0, rtol=1e-6)


NAMES = ("adamw", "adafactor", "lion", "muon")


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_decays_kernels_alone_and_by_the_learning_rate(name):
    tx = make_optimizer(settings(name=name, weight_decay=0.5), 10)
    params = {"kernel": jnp.full((2, 3), 3.0), "bias": jnp.full(2, 3.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def stacked(values):
    """A kernel of the layers: muon leaves those before and after them to Adam."""
    return nnx.Param(values, out_sharding=("layers", "embed", "mlp"))


@pytest.mark.parametrize(
    "name, mu_dtype, kinds",
    [
        ("adamw", "auto", {"float32": 2}),
        ("adamw", "bfloat16", {"bfloat16": 1, "float32": 1}),
        ("lion", "auto", {"float32": 1}),
        ("lion", "bfloat16", {"bfloat16": 1}),
        ("muon", "bfloat16", {"bfloat16": 1}),
        ("adafactor", "auto", {"bfloat16": 1}),
        ("adafactor", "float32", {"float32": 1}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # of the parameters: all the same
def test_the_bytes_a_parameter_costs_are_those_of_the_docs(name, mu_dtype, kinds, dtype):
    tx = make_optimizer(settings(name=name, mu_dtype=mu_dtype), 10)
    shape = (1, 256, 512)
    made = jax.eval_shape(lambda: tx.init({"kernel": stacked(jnp.zeros(shape, dtype))}))
    leaves = jax.tree.leaves(made)
    whole = [str(x.dtype) for x in leaves if x.shape == shape]
    assert {kind: whole.count(kind) for kind in set(whole)} == kinds
    assert all(x.dtype == jnp.float32 for x in leaves if 1 < x.size < math.prod(shape))
    rest = sum(math.prod(x.shape) for x in leaves if x.shape != shape)
    assert rest <= 256 + 512 + 20  # rows, columns and counters


def test_second_moments_of_bfloat16_parameters_fall():
    tx = make_optimizer(settings(b1=0.0, b2=0.999, schedule="constant"), 10)
    params = {"bias": jnp.ones(2, jnp.bfloat16)}
    state = tx.init(params)
    for gradient in (1.0, 0.0, 0.0):
        _, state = tx.update({"bias": jnp.full(2, gradient, jnp.bfloat16)}, state, params)
    (nu,) = (x for x in jax.tree.leaves(state) if x.shape and float(x[0]))
    np.testing.assert_allclose(nu, 0.001 * 0.999**2, rtol=1e-5)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(MMJaxError, match=r"'adam' is unknown; one of adamw, adafactor, lion, muon"):
        make_optimizer(settings(name="adam"), 10)


def test_lion_moves_by_the_sign():
    tx = make_optimizer(settings(name="lion", b1=0.5, b2=0.25), 10)
    params = {"kernel": jnp.ones(2)}
    state = tx.init(params)
    first, state = tx.update({"kernel": jnp.array([3.0, -1.0])}, state, params)
    np.testing.assert_allclose(first["kernel"], [-0.1, 0.1], rtol=1e-6)
    # The momentum is (2.25, -0.75) by now: a small gradient against it does not turn the sign.
    second, _ = tx.update({"kernel": jnp.array([-1.0, -1.0])}, state, params)
    np.testing.assert_allclose(second["kernel"], [-0.09, 0.09], rtol=1e-5)


def test_adafactor_divides_by_the_row_and_column_means():
    tx = make_optimizer(settings(name="adafactor", b1=0.0), 10)
    rng = np.random.default_rng(0)
    grad = rng.normal(size=(128, 256)) * np.exp(rng.normal(size=(128, 1)))
    params = {"kernel": jnp.zeros((128, 256))}
    updates, _ = tx.update({"kernel": jnp.asarray(grad, jnp.float32)}, tx.init(params), params)
    square = grad**2
    v = square.mean(1, keepdims=True) * square.mean(0, keepdims=True) / square.mean()
    want = grad / np.sqrt(v)
    want /= max(1.0, np.sqrt((want**2).mean()))
    np.testing.assert_allclose(updates["kernel"], -0.1 * want, rtol=2e-4)


def test_adafactor_bounds_each_layers_matrix_by_itself_and_has_a_momentum():
    """Small matrices are not factored: v = b v + (1 - b) g^2 with b = 1 - t ** -0.8."""
    tx = make_optimizer(
        settings(name="adafactor", b1=0.75, mu_dtype="float32", schedule="constant"), 10
    )
    params = {"kernel": stacked(jnp.zeros((2, 3, 4)))}
    state, b = tx.init(params), 1 - 2**-0.8
    first, later = np.ones((2, 1, 1)), np.array([10.0, 0.1]).reshape(2, 1, 1)
    want, m = [], 0.0
    for step, u in enumerate((first, later / np.sqrt(b + (1 - b) * later**2)), 1):
        m = 0.75 * m + 0.25 * np.minimum(u, 1.0)  # the first layer's is 1.3 before it is bounded
        want.append(-0.1 * m / (1 - 0.75**step))
    for scale, expected in zip((first, later), want, strict=True):
        gradient = {"kernel": stacked(jnp.asarray(scale * np.ones((2, 3, 4)), jnp.float32))}
        updates, state = tx.update(gradient, state, params)
        expected = np.broadcast_to(expected, (2, 3, 4))
        np.testing.assert_allclose(updates["kernel"][...], expected, rtol=1e-4)


def test_muon_looks_ahead_along_a_momentum_of_b1():
    """Jordan's m = b m + (1 - b) g, then b m + (1 - b) g: of turns by 0 and 90 degrees, a turn."""
    tx = make_optimizer(settings(name="muon", b1=0.5), 10)
    params = {"kernel": stacked(jnp.zeros((1, 2, 2)))}
    state = tx.init(params)
    for turn in (np.eye(2), np.array([[0.0, -1.0], [1.0, 0.0]])):
        gradient = {"kernel": stacked(jnp.asarray(turn[None], jnp.float32))}
        updates, state = tx.update(gradient, state, params)
    moved = -np.asarray(updates["kernel"][...])[0]
    angle = np.degrees(np.arctan2(moved[1, 0], moved[0, 0]))
    # 0.5 (0.25, 0.5) + 0.5 (0, 1); optax also corrects both for their beginning at 0.
    np.testing.assert_allclose(angle, np.degrees(np.arctan2(0.75, 0.125)), atol=2)


def test_muon_makes_updates_orthogonal_and_as_large_as_those_of_adam():
    tx = make_optimizer(settings(name="muon", b1=0.95), 10)
    grad = np.random.default_rng(0).normal(size=(24, 64))
    params = {"kernel": stacked(jnp.zeros((1, 24, 64))), "head": {"kernel": jnp.zeros((2, 4))}}
    gradient = {"kernel": stacked(jnp.asarray(grad[None], jnp.float32))}
    gradient["head"] = {"kernel": jnp.full((2, 4), 1e-3)}
    updates, _ = tx.update(gradient, tx.init(params), params)
    size = 0.1 * 0.2 * np.sqrt(64)
    singular = np.linalg.svd(np.asarray(updates["kernel"][...])[0] / size, compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3  # Newton-Schulz comes only near to 1
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1, rtol=1e-4)


def make(config=tiny.CONFIG, **kwargs):
    return tiny.Fuyu(config, rngs=nnx.Rngs(0), **kwargs)


WIDE = dataclasses.replace(
    tiny.CONFIG,
    decoder=dataclasses.replace(
        tiny.CONFIG.decoder, d_model=128, num_heads=16, num_kv_heads=16, head_dim=8, d_mlp=256
    ),
)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_optimizer_keeps_lies_where_its_parameter_lies(name):
    """No array of a kernel's size is whole on a device, and none of its means is either."""
    tx = make_optimizer(settings(name=name), 10)
    with use(make_mesh({"fsdp": 4, "tensor": 2})) as mesh:
        names = set(paths.flatten(nnx.state(nnx.eval_shape(lambda: make(WIDE)))))
        _, abstract, _ = train_state.abstract_state(lambda: make(WIDE), names, tx, mesh)
        found = {
            paths.name_of(path): (leaf.shape, leaf.sharding.spec)
            for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.opt)
        }
    ends = {}
    for path, (shape, spec) in found.items():
        for kernel in ("attn.q.kernel", "attn.o.kernel", "mlp.up.kernel"):
            if path.endswith(kernel) and shape not in ((), (1,)):
                field = path.split(".decoder")[0].rsplit(".", 1)[-1]
                ends[field, kernel] = (shape, tuple(spec))
    whole = {
        "attn.q.kernel": ((2, 128, 16, 8), (None, "fsdp", "tensor", None)),
        "attn.o.kernel": ((2, 16, 8, 128), (None, "tensor", None, "fsdp")),
        "mlp.up.kernel": ((2, 128, 256), (None, "fsdp", "tensor")),
    }
    folded = whole | {
        "attn.q.kernel": ((2, 128, 128), (None, "fsdp", "tensor")),
        "attn.o.kernel": ((2, 128, 128), (None, "tensor", "fsdp")),
    }
    if name == "adafactor":
        rows = {k: ((2, s[1]), (None, spec[1])) for k, (s, spec) in folded.items()}
        columns = {k: ((2, s[2]), (None, spec[2])) for k, (s, spec) in folded.items()}
        want = {("ema", k): v for k, v in whole.items()}
        want |= {("v_row", k): v for k, v in rows.items()}
        want |= {("v_col", k): v for k, v in columns.items()}
        # The longest axis is averaged first: optax calls that of up's 128 x 256 its row.
    elif name == "adamw":
        want = {(f, k): v for f in ("mu", "nu") for k, v in whole.items()}
    else:
        want = {("mu", k): v for k, v in (folded if name == "muon" else whole).items()}
    assert ends == want


def place(abstract, seed):
    """The same random numbers on any mesh."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), abstract
    )


@pytest.mark.parametrize("name", NAMES)
def test_updates_do_not_depend_on_the_mesh_and_their_state_keeps_its_place(name):
    tx = make_optimizer(settings(name=name), 10)
    small = dataclasses.replace(
        WIDE, decoder=dataclasses.replace(WIDE.decoder, num_layers=1, vocab_size=32)
    )
    got = []
    for shape, count in (({}, 1), ({"fsdp": 2, "tensor": 2}, 4)):
        with use(make_mesh(shape, jax.devices()[:count])) as mesh:
            chosen = {"decoder.layers.attn.o.kernel", "decoder.layers.mlp.up.bias"}
            _, state, _ = train_state.abstract_state(lambda: make(small), chosen, tx, mesh)
            params, gradient = (place(state.params, seed) for seed in (1, 2))
            places = train_state.shardings(state)
            opt = jax.jit(tx.init, out_shardings=places.opt)(params)
            update = jax.jit(tx.update, out_shardings=(places.params, places.opt))
            for _ in range(2):
                updates, opt = update(gradient, opt, params)
            assert update._cache_size() == 1
            got.append(jax.device_get(paths.flatten(updates)))
    for key, value in got[0].items():
        assert np.abs(value).max() > 1e-3
        np.testing.assert_allclose(got[1][key], value, rtol=2e-3, atol=1e-5, err_msg=key)
