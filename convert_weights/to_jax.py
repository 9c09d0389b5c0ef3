"""Convert a PyTorch checkpoint to a folder of mmjax.

python -m convert_weights.to_jax SRC DST [--dtype bfloat16|float32|keep] [--base DIR] [--overwrite]

SRC is a folder or a file in any layout of a supported family, or a PEFT adapter (then --base is the
model it belongs to). DST gets the parameters, config.json, tokenizer and processor files, and
appears only when it is whole. The memory needed does not grow with the model.
"""

import argparse
import sys

from convert_weights.progress import bar, gigabytes
from mmjax.cli import run_guarded
from mmjax.models import checkpoints
from mmjax.parallel.mesh import use


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="convert_weights.to_jax",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--dtype", choices=("keep", "bfloat16", "float32"), default="keep")
    parser.add_argument("--base", help="the model folder of an adapter")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)

    ckpt = checkpoints.open_checkpoint(args.source, base=args.base)
    with use():
        abstract = checkpoints.abstract_params(ckpt.family, ckpt.config, lora=ckpt.lora)
    plan = checkpoints.plan_conversion(ckpt, abstract, args.dtype)
    with bar(f"{ckpt.family.name} ({ckpt.kind})", plan.nbytes) as progress:
        checkpoints.write_converted(
            ckpt, plan, args.destination, overwrite=args.overwrite, progress=progress
        )
    print(f"{args.destination}: {len(abstract)} parameters, {gigabytes(plan.nbytes)}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
