"""Convert a PyTorch checkpoint to a folder of mmjax.

python -m convert_weights.to_jax SRC DST [--dtype bfloat16|float32|keep] [--base DIR] [--overwrite]
    [--lm DIR] [--vision FILE_OR_DIR] [--vision-config NAME_OR_JSON] [--tuning-config FILE]

SRC is a folder or a file in any layout of a supported family, a PEFT adapter (then --base is the
model it belongs to), or a file of trained parts, OpenFlamingo's or a Bunny's projector (then
--lm and --vision are the rest); several files, a.pt,b.pt, are loaded in order. DST gets the
parameters, config.json, tokenizer and processor files, and appears only when it is whole. The
memory needed does not grow with the model.
"""

import sys

from convert_weights.sources import add_dtype, add_overwrite, add_source, open_source
from mmjax.cli import Parser, run_guarded
from mmjax.models import converted, pretrained
from mmjax.monitor.transfer import bar, gigabytes
from mmjax.parallel.mesh import use


def main(argv: list[str] | None = None) -> None:
    parser = Parser("convert_weights.to_jax", __doc__)
    add_source(parser)
    parser.add_argument("destination", help="the folder to write; it appears whole or not at all")
    add_dtype(parser, "keep", "bfloat16", "float32")
    add_overwrite(parser)
    args = parser.read(argv)

    opened = open_source(args)
    with use():
        abstract = pretrained.abstract_params(opened.family, opened.config, lora=opened.lora)
    plan = converted.plan_conversion(opened, abstract, args.dtype)
    with bar(f"{opened.family.name} ({opened.kind})", plan.nbytes) as progress:
        converted.write_converted(
            opened, plan, args.destination, overwrite=args.overwrite, progress=progress
        )
    print(f"{args.destination}: {len(abstract)} parameters, {gigabytes(plan.nbytes)}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
