"""Read off its tensors what a Flamingo was trained with: interval and sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.models.language.architecture import Architecture
from mmjax.types import MMJaxError
from mmjax.weights.reader import Reader

LANGUAGE = "lang_encoder."
GATED = "gated_cross_attn_layer"
_HEAD_DIM = 64  # of resampler and gated blocks, in every published model


def interval(
    trained: Reader, own: Architecture, text: Mapping[str, Any], hf: Mapping[str, Any], where: str
) -> int:
    """Read off before which layers the gated blocks stand."""
    gate = re.compile(rf"^{re.escape(LANGUAGE + own.layers)}\.(\d+)\.{GATED}\.attn_gate$")
    found = sorted(int(m[1]) for key in trained.keys() if (m := gate.match(key)))  # noqa: SIM118
    every, layers = found[0] + 1, own.read(text).num_layers
    if found != list(range(every - 1, layers, every)):
        raise MMJaxError(
            f"{where}: its gated blocks stand before layers {_few(found)}, and a language model of "
            f"{layers} layers has them before {_few(range(every - 1, layers, every))}; it was "
            "trained on another language model, give that to --lm, or the file is incomplete"
        )
    stated = hf.get("cross_attn_every_n_layers", every)
    if stated != every:
        raise MMJaxError(
            f"{where}: config.json says cross_attn_every_n_layers {stated}, and the gated blocks "
            f"stand before layers {_few(found)}: every {every}; correct config.json"
        )
    return every


def sizes(
    trained: Reader,
    own: Architecture,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    hf: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    """Return the sizes of resampler and gated blocks, which only our config.json states."""
    keys = set(trained.keys())
    gate = min(key for key in keys if key.endswith(f".{GATED}.attn_gate"))
    block = gate.removesuffix("attn_gate")

    def shape(key: str) -> tuple[int, ...]:
        if key not in keys:
            raise MMJaxError(f"{where} lacks {key}; is the file complete?")
        return tuple(trained.shape(key))

    def table(key: str) -> int | None:
        return shape(key)[0] if key in keys else None

    latents, media = shape("perceiver.latents")
    inner, width = shape(f"{block}attn.to_q.weight")
    pairs = (
        ("language model", "--lm", width, own.read(text).d_model),
        ("vision tower", "--vision", media, vision["hidden_size"]),
    )
    for name, option, theirs, ours in pairs:
        if theirs != ours:
            raise MMJaxError(
                f"{where} was trained on a {name} of width {theirs}, and this one has {ours}; give "
                f"{option} the one it was trained on"
            )
    layers = {int(key.split(".")[2]) for key in keys if key.startswith("perceiver.layers.")}
    perceiver, cross = ({**(hf.get(f"{part}_config") or {})} for part in ("perceiver", "cross"))
    # Heads are not in the shapes.
    of_perceiver, of_cross = (x.get("head_dim", _HEAD_DIM) for x in (perceiver, cross))
    return {
        "max_num_frames": table("perceiver.frame_embs"),
        "perceiver_config": {
            **perceiver,
            "num_layers": len(layers),
            "num_heads": shape("perceiver.layers.0.0.to_q.weight")[0] // of_perceiver,
            "head_dim": of_perceiver,
            "num_latents": latents,
            "ff_mult": shape("perceiver.layers.0.1.1.weight")[0] // media,
            "max_media": table("perceiver.media_time_embs"),
        },
        "cross_config": {
            **cross,
            "num_heads": inner // of_cross,
            "head_dim": of_cross,
            "ff_mult": shape(f"{block}ff.1.weight")[0] // width,
        },
    }


def _few(numbers: Sequence[int]) -> str:
    shown = list(map(str, numbers))
    return ", ".join(shown if len(shown) < 5 else [*shown[:2], "...", shown[-1]])
