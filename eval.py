"""Evaluate: python eval.py --config=configs/<recipe>.py[:args] --checkpoint=DIR [--workdir=DIR].

--tasks=FILE.json asks other tasks than the recipe's, such as benchmarks by name
(docs/evaluation.md).
"""

from absl import flags

from mmjax.cli import run_with_config
from mmjax.types import MMJaxError

flags.DEFINE_string("checkpoint", None, "a workdir of train.py, one of its checkpoints, or a model")
flags.DEFINE_enum("weights", None, ["int8", "nf4"], "quantise the kernels of a model folder")
flags.DEFINE_string("tasks", None, "a JSON file of tasks, in place of the recipe's")
flags.DEFINE_string("workdir", None, "where results go; default: the workdir of the checkpoint")


def main(config) -> None:
    from mmjax.schema import to_dataclass
    from mmjax.train.evaluation import run_eval
    from mmjax.train.settings import RunSettings
    from mmjax.train.tasks import with_tasks

    if not flags.FLAGS.checkpoint:
        raise MMJaxError("give --checkpoint=DIR: a workdir, one of its checkpoints, or a model")
    settings = to_dataclass(RunSettings, config)
    given = flags.FLAGS
    if given.tasks:
        settings = with_tasks(settings, given.tasks)
    run_eval(settings, given.checkpoint, given.workdir, weights=given.weights)


if __name__ == "__main__":
    run_with_config(main)
