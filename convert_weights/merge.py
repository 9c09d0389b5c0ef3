"""Add a model's LoRA adapters to its kernels: the result is an ordinary converted folder.

python -m convert_weights.merge SRC DST [--base DIR] [--overwrite]

SRC is a model folder with adapters (what train.py exports) or a PEFT adapter (then --base is the
model it belongs to). The sum is taken in float32, piece by piece, and kept in the kernel's dtype.
To merge for PyTorch, use convert_weights.to_hf, which merges by itself.
"""

import sys

from convert_weights.sources import add_overwrite, add_source, open_source
from mmjax.cli import Parser, run_guarded
from mmjax.models import converted, pretrained
from mmjax.monitor.transfer import bar, gigabytes
from mmjax.parallel.mesh import use


def main(argv: list[str] | None = None) -> None:
    parser = Parser("convert_weights.merge", __doc__)
    add_source(parser)
    parser.add_argument("destination", help="the folder to write; it appears whole or not at all")
    add_overwrite(parser)
    args = parser.read(argv)

    opened = open_source(args)
    with use():
        opened = pretrained.merged(opened)
        abstract = pretrained.abstract_params(opened.family, opened.config)
    plan = converted.plan_conversion(opened, abstract)
    with bar(f"{opened.family.name}, merged", plan.nbytes) as progress:
        converted.write_converted(
            opened, plan, args.destination, overwrite=args.overwrite, progress=progress
        )
    print(f"{args.destination}: {len(abstract)} parameters, {gigabytes(plan.nbytes)}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
