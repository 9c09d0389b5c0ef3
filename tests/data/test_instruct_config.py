"""Instruct-Flamingo's dataset config, and the samples it names."""

import json

import pytest

from mmjax.data.catalog import make_source, make_sources
from mmjax.data.instruct_config import expand_config
from mmjax.data.mixture import Mixture
from mmjax.data.sources import JsonSource
from mmjax.data.templates import TEMPLATES
from mmjax.types import BadSample, Message, MMJaxError


def sample(i, **more):
    return {"input": f"<img_path>p{i}.png<img_path>What is {i}?", "output": f"It is {i}."} | more


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def config(tmp_path):
    """Two datasets of 4 and 16 samples, shared out 3 to 1."""
    write(tmp_path / "sets/small.json", [sample(i) for i in range(4)])
    write(tmp_path / "sets/large.json", [sample(i) for i in range(16)])
    (tmp_path / "pictures").mkdir()
    rows = [
        dict(dataset_name="small", json_path="sets/small.json", img_dir="pictures", ratio=3),
        dict(dataset_name="large", json_path=f"{tmp_path}/sets/large.json", img_dir="", ratio=1.0),
    ]
    return write(tmp_path / "config.json", rows)


def mixture(config, **options):
    spec = dict(kind="instruct_flamingo", path=str(config), **options)
    return Mixture.of(make_sources({"all": spec}))


def test_a_config_is_a_source_for_each_dataset(config):
    specs = expand_config(config)
    folder = config.parent
    assert specs == {
        "small": dict(
            kind="json", path=f"{folder}/sets/small.json", image_root=f"{folder}/pictures"
        ),
        "large": dict(kind="json", path=f"{folder}/sets/large.json"),
    }
    small, large = make_sources({"all": dict(kind="instruct_flamingo", path=str(config))}).values()
    assert small[1].messages == (
        Message("user", "<image>What is 1?"),
        Message("assistant", "It is 1."),
    )
    assert small[1].images == (f"{folder}/pictures/p1.png",)
    assert large[1].images == (f"{folder}/sets/p1.png",)
    elsewhere = expand_config(config, img_dir="pictures")
    assert elsewhere["large"]["image_root"] == f"{folder}/pictures"


@pytest.mark.parametrize(
    "options, counts",
    [
        ({}, (4, 16)),
        (dict(num_samples=100), (75, 25)),
        (dict(num_samples=10), (8, 2)),  # 7.5 and 2.5; the first of equal remainders takes the rest
        (dict(num_samples=60, sampling="sqrt"), (20, 40)),
        (dict(sampling="sqrt"), (4, 16)),
    ],
)
def test_samples_of_an_epoch_are_shared_out(config, options, counts):
    found = mixture(config, **options)
    assert found.counts == counts and found.names == ("small", "large")
    drawn = [found.pick(i)[0] for i in range(found.epoch)]
    assert (drawn.count(0), drawn.count(1)) == counts


def test_a_list_of_samples_is_one_dataset(config):
    path = config.parent / "sets/large.json"
    found = mixture(path, num_samples=5)
    assert found.names == ("large",) and found.counts == (5,) and len(found.sources[0]) == 16
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
    other = mixture(write(config.parent / "chat.json", [{"conversations": turns}] * 2))
    assert other.names == ("chat",) and other.sources[0][1].messages[1].text == "A dog."


def test_an_instruction_stands_before_the_input_and_an_empty_output_is_bad(tmp_path):
    rows = [sample(0, instruction="Look at <img_path>first.png<img_path>. ")]
    rows += [sample(i, output=text) for i, text in enumerate(["", " ", "\n"], 1)]
    rows += [{"input": "<img_path>a.png What?", "output": "x"}]
    source = JsonSource(write(tmp_path / "a.json", rows), image_root=tmp_path)
    assert source[0].messages[0].text == "Look at <image>. <image>What is 0?"
    assert source[0].images == (f"{tmp_path}/first.png", f"{tmp_path}/p0.png")
    for i in (1, 2, 3):
        with pytest.raises(BadSample) as error:
            TEMPLATES["guanaco_chat"](source[i])
        assert error.value.reason == "empty_answer"
    with pytest.raises(BadSample, match="1 <img_path> marks"):
        source[4]


def test_every_record_once_needs_no_ratios(config):
    rows = json.loads(config.read_text())
    rows = [{k: v for k, v in row.items() if k != "ratio"} for row in rows]
    assert list(expand_config(write(config, rows))) == ["small", "large"]
    with pytest.raises(MMJaxError, match="ratio is None"):
        expand_config(config, num_samples=10)
    assert len(expand_config(config, num_samples=10, sampling="sqrt")) == 2


def test_everything_wrong_is_said_at_once(config):
    rows = json.loads(config.read_text())
    rows[0] |= {"json_path": "sets/smal.json", "img_dri": "x"}
    rows[1] |= {"img_dir": "gone", "ratio": 0}
    rows.append(dict(rows[1], dataset_name="d", json_path="sets/large.json", img_dir=["a"]))
    rows += [dict(rows[1], dataset_name="small"), {"dataset_name": "c", "json_path": None}]
    rows.append(dict(dataset_name="e", json_path="e" * 300))  # longer than a name may be
    write(config, rows)
    with pytest.raises(MMJaxError) as error:
        expand_config(config, num_samples=10)
    lines = str(error.value).splitlines()[1:]
    for line, says in zip(
        lines,
        [
            "(small): unknown key 'img_dri'; did you mean 'img_dir'?",
            "(small): json_path 'sets/smal.json' does not exist, nor in",
            "(large): img_dir 'gone' does not exist",
            "(large): ratio is 0; a share above 0",
            "(d): img_dir is ['a']; it names the folder of the images",
            "(d): ratio is 0",
            "(small): dataset_name 'small' is a text that no other dataset has",
            "(c): json_path is None; it names the samples",
            "(c): ratio is None",
            "(e): json_path 'eee",
            "(e): ratio is None",
        ],
        strict=True,
    ):
        assert says in line


@pytest.mark.parametrize(
    "value, options, says",
    [
        ([], {}, "no dataset"),
        ({}, {}, "expected a JSON array"),
        ([1], {}, "expected one JSON object"),
        ([], dict(sampling="root"), "sampling 'root'"),
        ([], dict(num_samples=0), "num_samples 0"),
        ([], dict(num_samples="10"), "num_samples '10': .*a whole number from 1 up"),
        ([], dict(num_samples=None), "num_samples None: .*a whole number from 1 up"),
    ],
)
def test_configs_that_are_none(tmp_path, value, options, says):
    with pytest.raises(MMJaxError, match=says) as error:
        expand_config(write(tmp_path / "c.json", value), **options)
    assert not isinstance(error.value, BadSample)


def test_draws_and_kinds_are_checked(config):
    with pytest.raises(MMJaxError, match="draws 0 is a number"):
        JsonSource(config.parent / "sets/small.json", draws=0)
    assert JsonSource(config.parent / "sets/small.json", draws=1).draws == 1
    with pytest.raises(MMJaxError, match="stands for several sources"):
        make_source(dict(kind="instruct_flamingo", path=str(config)))
