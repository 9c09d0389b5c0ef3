"""Averages of tiny models: numbers, adapters, dtypes, what is refused and what is overwritten."""

import dataclasses

import numpy as np
import pytest

from convert_weights import average, merge, to_hf, to_jax
from mmjax.models import averages, converted, exports, opening, pretrained, registry
from mmjax.models.views import is_lora
from mmjax.nn.linear import LoRA
from mmjax.parallel.mesh import use
from mmjax.types import MMJaxError
from mmjax.weights import rules as R
from mmjax.weights.writer import Arrays
from tests import tiny

FAMILY = registry.family("fuyu")
ADAPTER = LoRA(2, 6.0, ("attn.q", "head"))


def random_params(seed, config=tiny.CONFIG, lora=None, dtype=np.float32):
    rng = np.random.default_rng(seed)
    with use():
        abstract = pretrained.abstract_params(FAMILY, config, lora=lora)
    return {
        name: rng.normal(size=leaf.shape).astype(np.float32 if is_lora(name) else dtype)
        for name, leaf in abstract.items()
    }


def save(folder, params, config=tiny.CONFIG, lora=None):
    converted.save_model(folder, params, family=FAMILY, config=config, lora=lora)
    return folder


def read(folder):
    """Every parameter of a converted folder, as stored."""
    opened = opening.open_pretrained(folder)
    assert opened.lora is None
    return {key: opened.reader.read(key) for key in opened.reader.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A model as the hub has it, in bfloat16, and its parameters."""
    params = random_params(0, dtype="bfloat16")
    folder = tmp_path_factory.mktemp("one") / "hub"
    tensors = R.export(FAMILY.weights.rules(tiny.CONFIG), Arrays(params))
    exports.write_export(folder, tensors, {"config.json": tiny.CONFIG.to_hf()})
    (folder / "tokenizer_config.json").write_text('{"of": "one"}')
    return folder, params


def test_average_of_layouts_dtypes_and_adapters(one, tmp_path):
    """A hub's folder, one of ours and one with adapters: their average, adapters merged first."""
    hub, first = one
    second, third = random_params(1), random_params(2, lora=ADAPTER)
    sources = (hub, save(tmp_path / "b:2", second), save(tmp_path / "c", third, lora=ADAPTER))
    named = [f"{path}:{share}" for path, share in zip(sources, (0.5, 0.2, 0.3), strict=True)]
    for name in ("tokenizer_config.json", "added_tokens.json"):
        (tmp_path / "c" / name).write_text('{"of": "c"}')
    average.main([*named, "--out", str(tmp_path / "out")])
    got = read(tmp_path / "out")

    merged = {name: x for name, x in third.items() if not is_lora(name)}
    a, b = (third[f"decoder.layers.attn.q.lora_{side}"] for side in "ab")
    merged["decoder.layers.attn.q.kernel"] += 3 * np.einsum("ldr,lrnh->ldnh", a, b)
    a, b = (third[f"decoder.head.lora_{side}"] for side in "ab")
    merged["decoder.head.kernel"] += 3 * a @ b
    assert got.keys() == first.keys() == merged.keys()
    for name, value in got.items():
        want = 0.5 * first[name].astype(np.float64) + 0.2 * second[name] + 0.3 * merged[name]
        assert value.dtype == np.float32  # the widest of bfloat16 and float32
        np.testing.assert_allclose(value, want, atol=1e-6, err_msg=name)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"of": "one"}'
    assert not (tmp_path / "out" / "added_tokens.json").exists()  # no tokenizer is of two models


def test_dtype_is_kept_or_the_one_asked_for(one, tmp_path):
    hub, params = one
    for dtype, expected in (("keep", "bfloat16"), ("float32", "float32")):
        out = tmp_path / dtype
        average.main([f"{hub}:0.25", f"{hub}:0.75", "--out", str(out), "--dtype", dtype])
        for name, value in read(out).items():
            assert str(value.dtype) == expected
            np.testing.assert_array_equal(value.astype(np.float32), params[name].astype(np.float32))


def test_no_command_replaces_a_folder_unless_told_to(one, tmp_path):
    hub, there = str(one[0]), tmp_path / "there"
    adapted = str(save(tmp_path / "adapted", random_params(2, lora=ADAPTER), lora=ADAPTER))
    for command, given in (
        (to_jax, [hub, str(there)]),
        (to_hf, [hub, str(there)]),
        (merge, [adapted, str(there)]),
        (average, [f"{hub}:0.5", f"{hub}:0.5", "--out", str(there)]),
    ):
        there.mkdir(exist_ok=True)
        (there / "config.json").write_text("another model")
        with pytest.raises(MMJaxError, match="there exists; give another destination, or --overwr"):
            command.main(given)
        assert (there / "config.json").read_text() == "another model"
        command.main([*given, "--overwrite"])
        assert opening.open_pretrained(there).family.name == "fuyu"


@pytest.mark.parametrize(
    "given, says",
    [
        (["{}:0.3", "{}:0.6"], "sum to 0.9, not to 1; .*: 0.333333, 0.666667"),
        (["{}:1"], "two models or more, and 1"),
        (["{}:1.5", "{}:-0.5"], "the weight -0.5 is not above 0"),
        (["{}:0.5", "{}"], "no weight; give each model as SRC:WEIGHT"),
        (["{}:0.5", "{}:half"], "no weight; give each model as SRC:WEIGHT"),
        (["{}:0.5", ":0.5"], ":0.5: no weight; give each model as SRC:WEIGHT"),
    ],
)
def test_weights_that_are_no_average_are_refused(one, tmp_path, given, says):
    with pytest.raises(MMJaxError, match=says):
        average.main([text.format(one[0]) for text in given] + ["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_models_that_differ_are_refused_by_the_first_difference(one, tmp_path):
    ours = opening.open_pretrained(one[0])
    longer = dataclasses.replace(
        tiny.CONFIG, decoder=dataclasses.replace(tiny.CONFIG.decoder, num_layers=1)
    )
    other = opening.open_pretrained(save(tmp_path / "short", random_params(1, longer), longer))
    with pytest.raises(MMJaxError, match=r"hub and .*short .*: decoder.num_layers is 2 and 1"):
        averages.averaged([(ours, 0.5), (other, 0.5)])
    alien = dataclasses.replace(ours, family=registry.family("language"))
    with pytest.raises(MMJaxError, match="family is 'fuyu' and 'language'"):
        averages.averaged([(ours, 0.5), (alien, 0.5)])
    # A file that is not what its config.json says.
    torn = dataclasses.replace(ours, reader=Arrays(dict.fromkeys(["x"], np.zeros(1))))
    with pytest.raises(R.WeightsMismatch, match="missing"):
        averages.averaged([(ours, 0.5), (torn, 0.5)])


def test_what_a_config_leaves_out_of_comparisons_may_differ():
    @dataclasses.dataclass(frozen=True)
    class Config:
        inner: LoRA
        path: str = dataclasses.field(default="", compare=False)

    a, b = Config(ADAPTER, "a"), Config(dataclasses.replace(ADAPTER, rank=4), "b")
    assert list(averages._differing(a, b)) == [("inner.rank", 2, 4)]
