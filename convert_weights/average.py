"""Average the weights of several recipes of one model: the result is an ordinary converted folder.

python -m convert_weights.average --out DST SRC:WEIGHT SRC:WEIGHT [...] [--dtype keep] [--overwrite]

Each SRC is what to_jax reads: a converted folder, a model in any layout, or an adapter (then
--base is the model it belongs to); all are of one architecture. Adapters are merged first. The
weights are above 0 and sum to 1: a:0.3 b:0.7. The sum is taken in float32, piece by piece: the
memory needed grows neither with the models nor with their number. Tokenizer and processor files
are those of the first SRC.
"""

import sys

from convert_weights.sources import add_dtype, add_overwrite, add_parts, open_source
from mmjax.cli import Parser, run_guarded
from mmjax.models import averages, converted, pretrained
from mmjax.monitor.transfer import bar, gigabytes
from mmjax.parallel.mesh import use
from mmjax.types import MMJaxError


def main(argv: list[str] | None = None) -> None:
    parser = Parser("convert_weights.average", __doc__)
    what = "a model and its weight, such as runs/a/model:0.3"
    parser.add_argument("sources", nargs="+", metavar="SRC:WEIGHT", help=what)
    parser.add_argument("--out", required=True, metavar="DST", help="the folder to write")
    add_parts(parser)
    add_dtype(parser, "keep", "bfloat16", "float32")
    add_overwrite(parser)
    args = parser.read(argv)

    given = [_split(text) for text in args.sources]
    averages.check_weights([weight for _, weight in given])
    models = [(open_source(args, source), weight) for source, weight in given]
    with use():
        opened = averages.averaged(models)
        abstract = pretrained.abstract_params(opened.family, opened.config)
    plan = converted.plan_conversion(opened, abstract, args.dtype)
    with bar(f"{opened.family.name}, average of {len(models)}", plan.nbytes) as progress:
        converted.write_converted(
            opened, plan, args.out, overwrite=args.overwrite, progress=progress
        )
    print(f"{args.out}: {len(abstract)} parameters, {gigabytes(plan.nbytes)}")


def _split(text: str) -> tuple[str, float]:
    """Return source and weight of an argument SRC:WEIGHT."""
    source, _, weight = text.rpartition(":")  # the last: a path may hold one too
    try:
        share = float(weight)
    except ValueError:
        share = None
    if not source or share is None:
        raise MMJaxError(f"{text}: no weight; give each model as SRC:WEIGHT, a:0.3 b:0.7")
    return source, share


if __name__ == "__main__":
    sys.exit(run_guarded(main))
