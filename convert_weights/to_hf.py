"""Write a model back for PyTorch: transformers reads a model, PEFT an adapter.

python -m convert_weights.to_hf SRC DST [--layout NAME] [--dtype keep] [--adapter] [--whole]

SRC is a converted folder (or any model that to_jax reads, then this changes its layout). A
model with a LoRA adapter is written merged, or with --adapter as the adapter alone. A Flamingo is
written as Otter's folders are, or with --layout openflamingo as checkpoint.pt: what OpenFlamingo
trains, and the kernels that an adapter was merged into. A Bunny is written as its merged models
are, or with --layout projector as mm_projector.bin, which its first stage trains.
"""

import sys

from convert_weights.sources import add_dtype, add_overwrite, add_source, open_source
from mmjax.cli import Parser, run_guarded
from mmjax.models import exports, pretrained
from mmjax.monitor.transfer import bar, gigabytes
from mmjax.parallel.mesh import use


def main(argv: list[str] | None = None) -> None:
    parser = Parser("convert_weights.to_hf", __doc__)
    add_source(parser)
    parser.add_argument("destination", help="the folder to write; it appears whole or not at all")
    parser.add_argument(
        "--layout",
        help="names of the tensors, and for adapters of the modules. Fuyu and language models: hub "
        "(default; every transformers reads it) or transformers5 (default for adapters: PEFT names "
        "modules as they stand in memory). Flamingo: otter (default) or openflamingo. Bunny: bunny "
        "(default) or projector",
    )
    add_dtype(parser, "keep", "bfloat16", "float16", "float32")
    parser.add_argument("--adapter", action="store_true", help="write the LoRA adapter alone")
    parser.add_argument(
        "--whole", action="store_true", help="of a layout of trained parts: all the rest as well"
    )
    add_overwrite(parser)
    args = parser.read(argv)

    opened = open_source(args)
    with use():
        abstract = pretrained.abstract_params(opened.family, opened.config, lora=opened.lora)
    layout = exports.choose_layout(opened.family, args.layout, adapter=args.adapter)
    tensors, files = exports.plan_export(
        opened, abstract, layout=layout, dtype=args.dtype, adapter=args.adapter, whole=args.whole
    )
    beside = [t for content in files.values() if not isinstance(content, dict) for t in content]
    total = sum(tensor.nbytes for tensor in (*tensors, *beside))
    with bar(f"{opened.family.name} -> {layout}", total) as progress:
        exports.write_export(
            args.destination,
            tensors,
            files,
            form=exports.partial_form(opened.family, layout),
            folders=opened.folders,
            overwrite=args.overwrite,
            progress=progress,
        )
    print(f"{args.destination}: {len(tensors)} tensors, {gigabytes(total)}")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
