"""Write a model folder from a run's checkpoint: the best, the newest, or any that was kept.

python -m convert_weights.from_run RUN DST [--overwrite] [--init DIR] [--lm DIR]
    [--vision FILE_OR_DIR] [--vision-config NAME_OR_JSON] [--tuning-config FILE]

RUN is one checkpoint of train.py, WORKDIR/checkpoints/STEP, or a WORKDIR, whose step that was best
by checkpoint.best is taken, else the newest. DST becomes what a run leaves as WORKDIR/model when it
ends; the run may still go on. A checkpoint holds what is trained: the rest is read from where the
run began, which the options name if it has moved. convert_weights.to_hf writes DST for PyTorch.
"""

import sys

from convert_weights.sources import PARTS, add_overwrite
from mmjax.cli import Parser, run_guarded


def main(argv: list[str] | None = None) -> None:
    parser = Parser("convert_weights.from_run", __doc__)
    parser.add_argument("run", help="a workdir of train.py, or one of its checkpoints")
    parser.add_argument("destination", help="the folder to write; it appears whole or not at all")
    add_overwrite(parser)
    parser.add_argument("--init", metavar="DIR", help="where the run's model.init is now")
    for name, (value, _) in PARTS.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, metavar=value, help=f"where its model.parts {name} is now")
    args = parser.read(argv)

    from mmjax.train.saved import export_step  # by now the arguments are good

    parts = {name: value for name in PARTS if (value := getattr(args, name)) is not None}
    workdir, step = export_step(
        args.run, args.destination, init=args.init, parts=parts, overwrite=args.overwrite
    )
    print(f"{args.destination}: step {step} of {workdir}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
