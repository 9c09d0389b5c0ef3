"""Rules: views that go both ways, pieces, and the published sizes of Fuyu-8B."""

import math
import warnings

import ml_dtypes
import numpy as np
import pytest

from mmjax.models import pretrained, registry
from mmjax.models.fuyu import weights as fuyu
from mmjax.models.fuyu.model import FuyuConfig
from mmjax.models.views import Canonical, Resized
from mmjax.types import MMJaxError
from mmjax.weights import operations as O
from mmjax.weights import rules as R
from mmjax.weights.writer import Arrays

OURS = {
    "kernel": (3, 6, 4),
    "q": (3, 6, 2, 5),
    "o": (3, 2, 5, 6),
    "bias": (3, 2, 5),
    "gate": (3, 6, 4),
    "up": (3, 6, 4),
    "head": (6, 20),
    "table": (20, 6),
    "patch": (2, 3, 4, 5),
    "patches": (3, 2, 2, 4, 5),
}
RULES = (
    R.Rule("kernel", "l.{l}.w", O.transpose),
    R.Rule("q", "l.{l}.q", O.Fused(1)),
    R.Rule("o", "l.{l}.o", O.reshape_in(2)),
    R.Rule("bias", "l.{l}.b", O.Fused(2)),
    R.Rule("gate", "l.{l}.gu", O.Chunk(0)),
    R.Rule("up", "l.{l}.gu", O.Chunk(1)),
    R.Rule("head", "head", O.transpose),
    R.Rule("table", "table"),
    R.Rule("patch", "conv", O.conv_patch),
    R.Rule("patches", "conv.{l}", O.conv_patch),
)


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in OURS.items()}


def exported():
    tensors = R.export(RULES, Arrays(params()))
    return Arrays({t.key: t.make() for t in tensors})


@pytest.mark.parametrize("shape", [(8, 768, 3072), (27, 1152, 1152), (50304, 2560), (36, 4096, 64)])
def test_pieces_are_of_nearly_one_size(shape):
    rule = R.Rule("x", "l.{l}.x") if len(shape) > 2 else R.Rule("x", "x")
    chunk = rule.chunk(shape, 4)
    stored = math.prod(math.ceil(n / c) * c for n, c in zip(shape, chunk, strict=True))
    assert math.prod(chunk) * 4 <= R.PIECE_BYTES and stored <= 1.05 * math.prod(shape)


def test_a_piece_is_layers_or_a_part_of_one_along_their_first_axis():
    """[3, 6, 4], of which theirs is three of [4, 6], in 4 bytes a number."""
    rule, shape = R.Rule("w", "l.{l}.w", O.transpose), (3, 6, 4)
    for limit, chunk in ((288, shape), (287, (2, 6, 4)), (100, (1, 6, 4)), (64, (1, 6, 2))):
        assert rule.chunk(shape, 4, limit) == chunk
    assert rule.chunk(shape, 4, 10) == (1, 6, 1)  # a row is the least
    assert R.Rule("w", "w").chunk((), 4, 1) == ()
    got = R.grid((slice(5, 13), slice(0, 3)), (4, 3))
    assert [index[0] for index in got] == [slice(5, 8), slice(8, 12), slice(12, 13)]


def test_every_nth_layer_of_theirs_may_be_ours():
    rule = R.Rule("w", "l.{l}.w", first=3, step=4)
    assert rule.keys((2, 6)) == ["l.3.w", "l.7.w"]
    ours = {"w": np.arange(22.0).reshape(11, 2)}
    tensors = R.export((rule,), Arrays(ours))
    assert [t.key for t in tensors] == [f"l.{3 + 4 * i}.w" for i in range(11)]
    assert [t.make()[0] for t in tensors] == [2.0 * i for i in range(11)]
    assert R.read_piece(
        rule, Arrays({t.key: t.make() for t in tensors}), (11, 2), (slice(9, 11), slice(1, 2)), "f4"
    ).tolist() == [[19.0], [21.0]]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"a": (3, 2)}, ["1 misshapen: a [3, 2] (the model has [2, 2])", "state the sizes"]),
        ({"a": None}, ["1 missing: a", "Download the missing shards"]),
        ({"c": (1,)}, ["1 unexpected: c", "Remove those tensors"]),
        ({"a": None, "b": (9,)}, ["1 missing: a", "1 misshapen: b", "Download the missing"]),
        ({"b": (9,), "c": (1,)}, ["1 unexpected: c", "1 misshapen: b", "Remove those"]),
        ({"a": None, "c": (1,)}, ["1 missing: a", "1 unexpected: c", "of different models"]),
    ],
)
def test_what_differs_is_told_with_what_to_do(change, told):
    rules = (R.Rule("x", "a"), R.Rule("y", "b"))
    shapes = {"a": (2, 2), "b": (3,), "d.inv_freq": (4,)} | change
    there = Arrays({k: np.zeros(v) for k, v in shapes.items() if v is not None})
    with pytest.raises(R.WeightsMismatch) as error:
        R.check(rules, {"x": (2, 2), "y": (3,)}, there, ignore=("inv_freq$",))
    for part in told:
        assert part in str(error.value)
    with pytest.raises(MMJaxError, match="no rule for z; add it"):
        R.by_ours(rules, ["x", "z"])


def test_export_is_the_inverse_of_reading():
    there, want = exported(), params()
    R.check(RULES, OURS, there)
    for rule in RULES:
        shape = OURS[rule.ours]
        index = tuple(slice(0, n) for n in shape)
        got = R.read_piece(rule, there, shape, index, np.float32)
        assert np.array_equal(got, want[rule.ours]), rule.ours


def test_a_number_beyond_float16_is_refused():
    """In bfloat16 it is a number like any other; in float16 it would be an infinity."""
    arrays = params() | {"table": np.full(OURS["table"], 65_504, np.float32)}
    tensors = {t.key: t for t in R.export(RULES, Arrays(arrays), "float16")}
    assert np.all(tensors["table"].make() == 65_504)
    arrays["table"][3, 1] = -70_000
    arrays["head"][0, 0] = np.inf  # of the file itself, and kept where the dtype has it
    for dtype in (None, "bfloat16"):
        assert np.isinf(
            {t.key: t for t in R.export(RULES, Arrays(arrays), dtype)}["head"].make()
        ).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the error says it all
        with pytest.raises(MMJaxError, match="table: holds a number beyond 65504.*bfloat16"):
            tensors["table"].make()


@pytest.mark.parametrize("limit", [16, 64, 200, 10**6])
def test_pieces_cover_every_number_once(limit):
    there, want = exported(), params()
    for rule in RULES:
        shape = OURS[rule.ours]
        chunk = rule.chunk(shape, 4, limit)
        out = np.full(shape, np.nan, np.float32)
        for index in R.grid(tuple(slice(0, n) for n in shape), chunk):
            assert np.isnan(out[index]).all()
            out[index] = R.read_piece(rule, there, shape, index, np.float32)
        assert np.array_equal(out, want[rule.ours]), rule.ours


def test_big_transposes_and_casts_are_exact():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(700, 900)).astype(np.float32)
    rule = R.Rule("w", "w", O.transpose)
    for dtype in (np.float32, "bfloat16", np.float16):
        got = R.read_piece(
            rule, Arrays({"w": x}), (900, 700), (slice(0, 900), slice(5, 700)), dtype
        )
        assert np.array_equal(got, x.T[:, 5:].astype(dtype))


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_fused_map_lie_by_head_or_one_after_the_other(parts):
    n, h, d = 2, 5, 4
    fused = np.arange(n * parts * h * d).reshape(n * parts * h, d)
    for i in range(parts):
        heads, apart = O.Fused(i, parts), O.Fused(i, parts, by_head=False)
        assert heads.theirs_shape((d, n, h)) == apart.theirs_shape((d, n, h)) == fused.shape
        assert heads.axis((d, n, h)) == 1 and heads.axis((n, h)) == 0
        for head, x in ((0, 0), (0, 4), (1, 2)):
            by_head = fused[head * parts * h + i * h + x]
            assert heads.view(fused, (d, n, h))[:, head, x].tolist() == by_head.tolist()
            one_after_the_other = fused[i * n * h + head * h + x]
            assert apart.view(fused, (d, n, h))[:, head, x].tolist() == one_after_the_other.tolist()
        chunk = O.Chunk(i, parts)
        assert chunk.theirs_shape((d, n * h)) == fused.shape and chunk.axis((d, n * h)) == 1
        assert np.array_equal(chunk.view(fused, (d, n * h)), fused[i * n * h : (i + 1) * n * h].T)
    assert O.Leading(2).theirs_shape((3, 4)) == (1, 1, 3, 4)
    assert O.reshape_in(2).axis((n, h, d)) == 2
    pixel = np.arange(6).reshape(2, 3, 1, 1)  # out, in
    assert O.conv_pixel.theirs_shape((3, 2)) == pixel.shape
    assert O.conv_pixel.view(pixel, (3, 2)).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_patch_kernel_is_the_convolution():
    rng = np.random.default_rng(0)
    conv, image = rng.normal(size=(5, 3, 4, 2)), rng.normal(size=(3, 4, 2))
    ours = O.conv_patch.view(conv, (4, 2, 3, 5))
    assert O.conv_patch.theirs_shape(ours.shape) == conv.shape
    assert O.conv_patch.axis(ours.shape) == 3  # their first, out
    want = (conv * image).sum((1, 2, 3))  # one step of a convolution, channels first
    got = np.einsum("rcx,rcxd->d", image.transpose(1, 2, 0), ours)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_hundreds_of_differences_are_counted_and_shortened():
    shapes = {"w": (300, 2, 2)}
    rules = (R.Rule("w", "layers.{l}.w"),)
    other = Arrays({f"other.{i}": np.zeros(1) for i in range(200)})
    with pytest.raises(R.WeightsMismatch) as error:
        R.check(rules, shapes, other)
    text = str(error.value)
    assert "300 missing: layers.0.w" in text and "and 288 more" in text
    assert "200 unexpected" in text and "and 188 more" in text
    assert len(text) < 1500


def published_keys():
    """The tensors of adept/fuyu-8b, written down from its published layout."""
    lm = "language_model.model."
    out = {
        "vision_embed_tokens.weight": (4096, 2700),
        "vision_embed_tokens.bias": (4096,),
        f"{lm}embed_tokens.weight": (262144, 4096),
        f"{lm}final_layernorm.weight": (4096,),
        f"{lm}final_layernorm.bias": (4096,),
        "language_model.lm_head.weight": (262144, 4096),
    }
    layer = {
        "self_attn.query_key_value": (12288, 4096),
        "self_attn.dense": (4096, 4096),
        "mlp.dense_h_to_4h": (16384, 4096),
        "mlp.dense_4h_to_h": (4096, 16384),
        "self_attn.q_layernorm": (64,),
        "self_attn.k_layernorm": (64,),
        "input_layernorm": (4096,),
        "post_attention_layernorm": (4096,),
    }
    for i in range(36):
        for name, shape in layer.items():
            out[f"{lm}layers.{i}.{name}.weight"] = shape
            out[f"{lm}layers.{i}.{name}.bias"] = shape[:1]
        out[f"{lm}layers.{i}.self_attn.rotary_emb.inv_freq"] = (16,)
    return out


class Shapes:
    """A reader that holds no numbers."""

    files = ()

    def __init__(self, shapes):
        self.shapes = shapes

    def keys(self):
        return self.shapes.keys()

    def shape(self, key):
        return self.shapes[key]


@pytest.mark.parametrize("layout", ["hub", "transformers5"])
def test_every_key_of_fuyu_8b_is_claimed_at_full_size(layout):
    shapes = {fuyu.from_hub(k, layout): s for k, s in published_keys().items()}
    family, found = registry.detect({"model_type": "fuyu"}, shapes)
    assert (family.name, found) == ("fuyu", layout)
    abstract = pretrained.abstract_params(family, FuyuConfig())
    assert sum(math.prod(leaf.shape) for leaf in abstract.values()) == 9_408_238_592
    ours = {name: leaf.shape for name, leaf in abstract.items()}
    hub = Shapes({fuyu.to_hub(k, layout): s for k, s in shapes.items()})
    R.check(fuyu.rules(FuyuConfig()), ours, hub, fuyu.IGNORE)
    counted = sum(math.prod(s) for s in R.expected(fuyu.rules(FuyuConfig()), ours).values())
    assert counted == 9_408_238_592


def test_unknown_families_are_refused_by_name():
    with pytest.raises(registry.MMJaxError, match="model_type 'llava'"):
        registry.detect({"model_type": "llava"}, ["x.weight"])
    with pytest.raises(registry.MMJaxError, match="did you mean 'fuyu'"):
        registry.family("fuyuu")


def test_layers_of_several_dtypes_keep_every_number():
    """Of the first layer's alone the others would be rounded, and nobody told."""
    layers = {"l.0.w": np.ones(2, ml_dtypes.bfloat16), "l.1.w": np.float32([1.001, 2])}
    same = {key: value.astype(np.float16) for key, value in layers.items()}
    rules, shapes = (R.Rule("w", "l.{l}.w"),), {"w": (2, 2)}
    there = Canonical(Arrays(layers), rules, shapes)
    assert there.dtype("w") == np.float32
    assert np.array_equal(there.read("w"), np.float32([[1, 1], [1.001, 2]]))
    assert Canonical(Arrays(same), rules, shapes).dtype("w") == np.float16
    double = Canonical(Arrays(same | {"l.1.w": np.ones(2)}), rules, shapes)
    assert double.dtype("w") == np.float64


@pytest.mark.parametrize("rows", [3, 7, 5])
def test_a_resized_table_is_cut_or_ends_in_zeros(rows):
    class Bounded(Arrays):  # as a stored array, which has nothing beyond its end
        def piece(self, key, index):
            assert index is ... or index[0].start <= index[0].stop <= len(self.arrays[key])
            return super().piece(key, index)

    table, other = np.arange(10.0).reshape(5, 2) + 1, np.ones(4)
    there = Resized(Bounded({"t": table, "o": other}), {"t": rows} if rows != 5 else {})
    want = np.concatenate([table, np.zeros((2, 2))])[:rows]
    assert there.shape("t") == want.shape and there.shape("o") == (4,)
    assert np.array_equal(there.read("t"), want) and np.array_equal(there.read("o"), other)
    for part in (slice(0, 1), slice(2, rows), slice(rows - 1, rows), slice(min(6, rows), rows)):
        assert np.array_equal(there.read("t", (part, slice(1, 2))), want[part, 1:])
