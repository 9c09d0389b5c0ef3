"""The validation loss of each task, against the loss of its records one by one."""

import jax
import numpy as np
import pytest
from flax import nnx

from mmjax.data.packing import BatchShape, pack
from mmjax.data.templates import get_template
from mmjax.evals.tasks import Task
from mmjax.parallel.mesh import make_mesh, use
from mmjax.train.build import blueprint
from mmjax.train.loss import loss_sum
from mmjax.train.settings import DataSettings, EvalSettings, ModelSettings, RunSettings
from mmjax.train.validation import ValidationLoss, with_answer
from mmjax.types import Message, Record

SIZES = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, patch_size=8
)
TEMPLATES = {"vqa": "fuyu_chat", "hard": "plain"}  # of sources; a task may be called as one is
SETTINGS = RunSettings(
    model=ModelSettings(
        config=SIZES, words=("what is it? red green blue", "User: Assistant:"), dtype="float32",
        frozen_dtype="float32",
    ),
    data=DataSettings(
        seq_len=48, max_patches=24, max_targets=8, batch_size=2, template=dict(TEMPLATES)
    ),
    eval=EvalSettings(limit=4),
)  # fmt: skip


def record(number, answer, side=16, in_meta=False, question="what is it?"):
    pixels = np.random.default_rng(number).integers(0, 256, (side, 16, 3), np.uint8)
    messages = (Message("user", question), Message("assistant", answer))
    if in_meta:
        return Record(messages[:1], (pixels,), {"answers": [answer, "other"]})
    return Record(messages, (pixels,))


class Pairs(list):
    """Records two of which are judged together: the evaluation asks whole pairs."""

    @property
    def units(self):
        return [(i, i + 1) for i in range(0, len(self), 2)]


@pytest.mark.heavy
def test_each_task_has_the_mean_loss_of_its_records():
    easy = [record(i, "red") for i in range(3)] + [record(9, "red", side=800)]  # too long
    hard = Pairs(record(i, "green blue", in_meta=True) for i in range(8))
    closed = Record(easy[0].messages[:1], easy[0].images, {"unscored": True})  # of a test split
    untold = Record(easy[0].messages[:1], easy[0].images, {})  # as where it is asked, passed over
    tasks = [
        Task("easy", easy, prompt="{question} green"),
        Task("none", [record(1, " "), closed, untold]),
    ]
    tasks.append(Task("hard", hard, limit=2))
    with use(make_mesh({}, jax.devices()[:1])) as mesh:
        plan = blueprint(SETTINGS.model, SETTINGS.lora, 0)
        model = plan.make()
        graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
        validation = ValidationLoss(tasks, SETTINGS, plan.processor, graphdef, mesh)
        got = validation(params, frozen)
        want = {}
        asked = [record(i, "red", question="what is it? green") for i in range(3)]
        for name, records in (("easy", asked), ("hard", hard[:2])):
            sums = np.zeros(2)
            for one in records:
                segments = get_template(TEMPLATES.get(name, "fuyu_chat"))(with_answer(one))
                example = plan.processor.encode(segments, one.images)
                sums += np.array(loss_sum(model, pack([example], BatchShape(2, 48, 24, 8))))
            want[f"eval/{name}/loss"] = sums[0] / sums[1]
    assert got.keys() == want.keys()  # nothing is left of the task without an answer
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5)
    assert validation._sums._cache_size() == 1
