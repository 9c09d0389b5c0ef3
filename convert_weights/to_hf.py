"""Write a model back for PyTorch: transformers reads a model, PEFT an adapter.

python -m convert_weights.to_hf SRC DST [--layout hub|transformers5] [--dtype keep] [--adapter]

SRC is a converted folder (or any checkpoint that to_jax reads, then this changes its layout). A
model with a LoRA adapter is written merged, or with --adapter as the adapter alone.
"""

import argparse
import sys

from convert_weights.progress import bar, gigabytes
from mmjax.cli import run_guarded
from mmjax.models import checkpoints
from mmjax.parallel.mesh import use


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="convert_weights.to_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument(
        "--layout",
        choices=("hub", "transformers5"),
        help="names of the tensors: hub (default; every transformers reads it), or transformers5 "
        "(default for adapters: PEFT names modules as they stand in memory)",
    )
    parser.add_argument(
        "--dtype", choices=("keep", "bfloat16", "float16", "float32"), default="keep"
    )
    parser.add_argument("--adapter", action="store_true", help="write the LoRA adapter alone")
    parser.add_argument("--base", help="the model folder of an adapter, when SRC is one")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)

    ckpt = checkpoints.open_checkpoint(args.source, base=args.base)
    with use():
        abstract = checkpoints.abstract_params(ckpt.family, ckpt.config, lora=ckpt.lora)
    layout = args.layout or ("transformers5" if args.adapter else "hub")
    tensors, files = checkpoints.plan_export(
        ckpt, abstract, layout=layout, dtype=args.dtype, adapter=args.adapter
    )
    total = sum(tensor.nbytes for tensor in tensors)
    with bar(f"{ckpt.family.name} -> {layout}", total) as progress:
        checkpoints.write_export(
            args.destination,
            tensors,
            files,
            folders=ckpt.folders,
            overwrite=args.overwrite,
            progress=progress,
        )
    print(f"{args.destination}: {len(tensors)} tensors, {gigabytes(total)}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
