"""What an evaluation would stumble on after days is told before a run begins."""

import dataclasses

import pytest

from mmjax.checkpoint import CheckpointSettings
from mmjax.train import evaluation
from mmjax.train.settings import EvalSettings, RunSettings
from mmjax.types import BadSample, Message, MMJaxError, Record

GOOD = [Record((Message("user", "what?"), Message("assistant", "red")), (), {})]


class Unreadable(list):
    def __getitem__(self, i):
        raise BadSample("corrupt_image", "x.png is cut off")


def settings(best=None, saves=5, task=(), **changes):
    tasks = ({"name": "vqa", "source": GOOD, **dict(task)},)
    return RunSettings(
        eval=EvalSettings(**{"tasks": tasks, "every": 10} | changes),
        checkpoint=CheckpointSettings(every=saves, best=best),
    )


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(task={"source": []}), "task vqa: its source holds no records"),
        (dict(task={"demos": [], "shots": 1}), "task vqa: its demos holds no records"),
        (dict(task={"source": {"kind": "json", "path": "/no/x.json"}}), "/no/x.json"),
        (dict(task={"source": [Record((Message("user", "what?"),), (), {})]}), "has no answers"),
        (dict(template="fuyu_promt"), "'fuyu_promt'; did you mean 'fuyu_prompt'"),
        (dict(best="eval/vqa/acuracy"), "'eval/vqa/acuracy'.*mean 'eval/vqa/accuracy'.*there are"),
        (dict(best="eval/vqa/loss"), "no evaluation reports an accuracy of this name"),
        (dict(best="eval/vqa/accuracy", saves=4), "every is 10 and .*every 4.*such as 8"),
        (dict(best="eval/vqa/accuracy", every=0), "eval.every is 0"),
    ],
)
def test_mistakes_of_evaluation_are_told_at_the_start(given, says):
    with pytest.raises(MMJaxError, match=says):
        evaluation.check(settings(**given))


def test_what_can_be_evaluated_is_let_through():
    sweep = {"resolutions": (None, 48)}
    evaluation.check(settings(best="eval/vqa/accuracy_48", task=sweep))
    evaluation.check(settings(task={"source": Unreadable([1, 2])}))
    never = EvalSettings(tasks=({"name": "vqa", "source": []},), final=False)
    evaluation.check(dataclasses.replace(settings(), eval=never))
