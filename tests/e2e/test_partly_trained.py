"""A run with everything that trains a part of a model: what moves, what does not, and going on."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import mmjax
from convert_weights import from_run, to_hf
from mmjax.checkpoint import CheckpointSettings
from mmjax.nn import paths
from mmjax.parallel.mesh import make_mesh, use
from mmjax.schema import to_dataclass
from mmjax.train import build, initial, loop
from mmjax.train.design import make_outline
from mmjax.train.settings import LoRASettings, RunSettings
from mmjax.types import MMJaxError
from mmjax.weights.store import StoreReader
from tests import small_flamingo

TABLE = "decoder.embed.embedding"
SOURCE = dict(kind="magnifier", split="train", image_size=32)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda _: make_mesh({}, jax.devices()[:1]))


def settings(steps):
    """Adapters on the decoder, whole gated blocks, two rows of the embedding, two sources."""
    made = to_dataclass(
        RunSettings,
        dict(
            steps=steps,
            train=("cross.*",),
            train_rows=(dict(params=TABLE, rows=("eoc", "<image>")),),
            lora=dict(rank=2),
            model=dataclasses.asdict(small_flamingo.MODEL),
            data=dict(
                sources=dict(chat=SOURCE, choice=dict(SOURCE, mc_share=1.0)),
                template=dict(chat="otter_chat", choice="guanaco_no_prompt_chat"),
                loss_weights=dict(chat=0.2, choice=1.0),
                multiturn=dict(turns=3, max_images=3, max_tokens=120),
                augment=dict(chat=("square_pad", "flip")),
                too_long="truncate",
                max_images=2,
                **dict(seq_len=128, max_patches=4, max_targets=32, batch_size=2),
            ),
            optim=dict(
                rates=(dict(params="cross.*", lr=5e-3),),
                **dict(lr=1e-2, warmup=0, schedule="constant", decay=("cross.*",)),
            ),
            log=dict(every=1, samples=2, pictures=2, tensorboard=False),
        ),
    )
    return dataclasses.replace(made, checkpoint=CheckpointSettings(every=2))


def weights(model):
    reader = StoreReader(model / "params")
    return {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118


def json_of(model):
    return json.loads((model / "config.json").read_text())


def first_weights(run):
    with use(make_mesh({}, jax.devices()[:1])) as mesh:
        plan = build.blueprint(run.model, run.lora, run.seed)
        outline = make_outline(run, plan.make, mesh)
        train, frozen = initial.init_state(plan, run, outline, mesh)
    values = paths.flatten(train.params) | paths.flatten(frozen)
    return plan, outline.chosen, {name: np.asarray(x) for name, x in values.items()}


@pytest.mark.heavy
def test_a_run_trains_its_part_and_goes_on_where_it_stood(tmp_path, capsys):
    loop.run(settings(2), tmp_path / "cut")
    capsys.readouterr()
    loop.run(settings(4), tmp_path / "cut")
    assert "continuing at step 2\nconfig.steps was 2 and is 4\n" in capsys.readouterr().out
    loop.run(settings(4), tmp_path / "whole")
    got, undisturbed = (weights(tmp_path / run / "model") for run in ("cut", "whole"))
    for name, value in undisturbed.items():
        assert value.tobytes() == got[name].tobytes(), name

    plan, chosen, before = first_weights(settings(4))
    ids = (plan.config.eoc_token_id, plan.config.media_token_id)
    for name, value in before.items():
        moved = got[name] != value
        if name == TABLE:
            assert np.flatnonzero(moved.any(1)).tolist() == sorted(ids)
        elif name not in chosen:
            assert not moved.any(), name
        elif name.endswith(("kernel", "lora_b", "gate")):
            assert moved.any(), name

    lines = (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["step"] for s in samples] == [0, 2]
    assert all(s["labels"] and "<image>" in s["input"] for s in samples)
    drawn = sorted((tmp_path / "whole" / "pictures").iterdir())
    assert [p.name for p in drawn] == ["step_0000000.png", "step_0000002.png"]
    assert Image.open(drawn[0]).width == 1024
    rows = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    last = next(r for r in rows if r.get("step") == 4)
    assert (last["train/lr"], last["train/lr/cross.*"]) == pytest.approx((1e-2, 5e-3))
    parts = {k: last[f"train/loss/{k}"] for k in ("chat", "choice") if f"train/loss/{k}" in last}
    want = sum({"chat": 0.2, "choice": 1.0}[k] * v for k, v in parts.items())
    np.testing.assert_allclose(last["train/loss"], want, rtol=1e-5)

    # A checkpoint becomes the model that the run wrote at that step.
    for step, same in {2: False, 4: True}.items():
        saved, folder = tmp_path / f"cut/checkpoints/{step}", tmp_path / f"at_{step}"
        from_run.main([str(saved), str(folder)])
        assert f"{folder}: step {step} of {tmp_path / 'cut'}" in capsys.readouterr().out
        written = {name: value.tobytes() for name, value in weights(folder).items()}
        assert (written == {name: x.tobytes() for name, x in got.items()}) is same
        assert json_of(folder) == json_of(tmp_path / "cut/model")
    with pytest.raises(MMJaxError, match=r"checkpoints/3 is not there; .*cut has steps 2, 4"):
        from_run.main([str(tmp_path / "cut/checkpoints/3"), str(tmp_path / "at_3")])
    for given in ("--lm", "--vision-config", "--init"):  # another model, or a message of None
        asked = [str(tmp_path / "cut"), str(tmp_path / "other"), given, str(folder)]
        with pytest.raises(MMJaxError, match=f"with random weights alone; leave {given} away"):
            from_run.main(asked)
    with pytest.raises(MMJaxError, match=r"at_4 exists; give another destination, or --overw"):
        from_run.main([str(tmp_path / "nothing"), str(folder)])  # told first
    with pytest.raises(MMJaxError, match=r"at_4 is no run of train.py: give its workdir"):
        from_run.main([str(folder), str(tmp_path / "again")])

    # Another scale of the adapters is another model, which no checkpoint tells.
    louder = dataclasses.replace(settings(5), lora=LoRASettings(rank=2, alpha=160.0))
    with pytest.raises(MMJaxError, match=r"cut holds adapters .* scale 8, .*lora.alpha=16"):
        loop.run(louder, tmp_path / "cut")


@pytest.mark.heavy
def test_what_was_trained_is_remembered_by_runs_that_go_on_from_it(tmp_path, caplog):
    loop.run(settings(2), tmp_path / "whole")
    # An adapter for PEFT is not all of it, of this run or of one that goes on with adapters alone.
    to_hf.main([str(tmp_path / "whole" / "model"), str(tmp_path / "peft"), "--adapter"])
    left = f"an adapter leaves out cross.*, {TABLE}, which was trained with it"
    assert left in caplog.text
    more = dataclasses.replace(
        settings(2),
        train=(),
        train_rows=(),
        optim=dataclasses.replace(settings(2).optim, rates=(), decay=()),
        model=dataclasses.replace(
            small_flamingo.MODEL, init=str(tmp_path / "whole" / "model"), config={}, words=()
        ),
    )
    loop.run(more, tmp_path / "more")
    assert sorted(json_of(tmp_path / "more/model")["mmjax"]["trained"]) == ["cross.*", TABLE]
    # The frozen part is read from where the run began, wherever that is by now.
    (tmp_path / "whole/model").rename(tmp_path / "moved")
    asked = [str(tmp_path / "more"), str(tmp_path / "newest")]
    with pytest.raises(MMJaxError, match=r"model.init .*whole/model.* not here; .*--init"):
        from_run.main(asked)
    from_run.main([*asked, "--init", str(tmp_path / "moved")])
    newest = weights(tmp_path / "newest")
    for name, value in weights(tmp_path / "more/model").items():
        assert newest[name].tobytes() == value.tobytes(), name

    model = mmjax.load(tmp_path / "newest")
    picture = np.zeros((8, 8, 3), np.uint8)
    assert isinstance(
        model.generate("<image>User: what is it? GPT:", [picture], max_new_tokens=2)[0], str
    )
