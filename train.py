"""Train: python train.py --config=configs/<recipe>.py[:args] [--workdir=DIR] [--config.key=value].

With --plan nothing is trained: the memory of each device is printed, for the devices that are here,
or with --plan_devices=8 --plan_memory=80 for eight of 80 GB, wherever they are.
"""

from absl import flags

from mmjax.cli import run_with_config
from mmjax.config import folder_of_runs
from mmjax.types import MMJaxError

flags.DEFINE_string(
    "workdir",
    None,
    "the folder this run lives in, else runs/<recipe>; one that exists is continued",
)
flags.DEFINE_bool("plan", False, "print the memory the run needs on each device, and exit")
flags.DEFINE_integer("plan_devices", 0, "plan for so many devices; 0 for those that are here")
flags.DEFINE_float("plan_memory", 0, "GB of each device; 0 for what the devices here have")


def main(config) -> None:
    from mmjax.parallel.distributed import joined
    from mmjax.schema import to_dataclass
    from mmjax.train.loop import run
    from mmjax.train.settings import RunSettings

    given = flags.FLAGS
    settings = to_dataclass(RunSettings, config)
    if given.plan or given.plan_devices or given.plan_memory:
        from mmjax.train.plan_report import print_plan

        print_plan(settings, devices=given.plan_devices, memory=given.plan_memory)
        return
    workdir = folder_of_runs(given.config) if given.workdir is None else given.workdir
    if not workdir:  # as of a variable that is not set
        raise MMJaxError("--workdir is empty; give the folder this run lives in")
    with joined():
        run(settings, workdir)


if __name__ == "__main__":
    run_with_config(main)
