"""Train: python train.py --config=configs/<recipe>.py[:args] --workdir=DIR [--config.key=value]."""

from absl import flags

from mmjax.cli import run_with_config
from mmjax.types import MMJaxError

flags.DEFINE_string("workdir", None, "the folder this run lives in; one that exists is continued")


def main(config) -> None:
    from mmjax.config import to_dataclass
    from mmjax.parallel.distributed import joined
    from mmjax.train.loop import run
    from mmjax.train.settings import RunSettings

    if not flags.FLAGS.workdir:
        raise MMJaxError("give --workdir=DIR, the folder this run lives in")
    with joined():
        run(to_dataclass(RunSettings, config), flags.FLAGS.workdir)


if __name__ == "__main__":
    run_with_config(main)
