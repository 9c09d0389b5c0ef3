"""The options that say where a model comes from, which all commands share."""

from __future__ import annotations

import argparse

from mmjax.models import opening, pretrained

PARTS = {
    "lm": (
        "DIR",
        "a model without its language model: that one's folder, as on Hugging Face",
    ),
    "vision": (
        "FILE_OR_DIR",
        "its vision tower: a folder of transformers' CLIP or SigLIP, or a state dict of open_clip, "
        "timm or EVA-CLIP",
    ),
    "vision_config": (
        "NAME_OR_JSON",
        "the tower's sizes, where heads and activation are not known: ViT-L-14, ViT-L-14-336, ... "
        "(with QuickGELU, as OpenAI's weights need), timm's name of a SigLIP, or a JSON file of "
        "open_clip, timm or transformers",
    ),
    "tuning_config": ("FILE", "JSON with lora_r and lora_alpha of a file with LoRA weights"),
}


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add SRC and the options for what it leaves out."""
    parser.add_argument("source", help="a folder, a file, or files a.pt,b.pt: the last counts")
    add_parts(parser)


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Add the options for what a model leaves out."""
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="the model folder of an adapter; a Bunny's language model does",
    )
    for name, (value, text) in PARTS.items():
        parser.add_argument("--" + name.replace("_", "-"), metavar=value, help=text)


def add_dtype(parser: argparse.ArgumentParser, *choices: str) -> None:
    """Add --dtype, the first choice being what is done without it."""
    text = f"of the weights that are written; {choices[0]} (the default): as they are stored in SRC"
    parser.add_argument("--dtype", choices=choices, default=choices[0], help=text)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add --overwrite."""
    text = "replace the model folder that is there; it stays until the new one is whole"
    parser.add_argument("--overwrite", action="store_true", help=text)


def open_source(args: argparse.Namespace, source: str | None = None) -> pretrained.Pretrained:
    """Open the model that the options name; source: another than SRC."""
    parts = {name: getattr(args, name) for name in PARTS}
    return opening.open_pretrained(source or args.source, base=args.base, **parts)
