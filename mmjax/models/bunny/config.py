"""A Bunny's config: which language model, which tower, and the projector between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

from mmjax.models.bunny.processor_config import s2_scales, seen_by_tower
from mmjax.models.bunny.projector import ProjectorConfig
from mmjax.models.bunny.s2 import check_scales, num_tiles
from mmjax.models.decoder import DecoderConfig
from mmjax.models.language.architecture import stated_token
from mmjax.models.language.architectures import ARCHITECTURES
from mmjax.models.views import is_lora
from mmjax.models.vision_config import read_vision_config, write_vision_config
from mmjax.models.vit import ViTConfig
from mmjax.models.work import Work
from mmjax.types import MMJaxError, nearest

PREFIX = "bunny-"
_CLASS_NAMES = {
    "phi": "BunnyPhiForCausalLM",
    "stablelm": "BunnyStableLMForCausalLM",
    "qwen2": "BunnyQwen2ForCausalLM",
    "minicpm": "BunnyMiniCPMForCausalLM",
    "phi3": "BunnyPhi3ForCausalLM",
    "llama": "BunnyLlamaForCausalLM",
    "gemma": "BunnyGemmaForCausalLM",
}
MODEL_TYPES = tuple(PREFIX + name for name in _CLASS_NAMES)
_OLDER = {"bunny-qwen": "qwen2"}
# By the model_type of the tower: its name where it is published, as the peer asks for it.
_PUBLISHED = {
    "siglip_vision_model": "google/siglip-so400m-patch14-384",
    "clip_vision_model": "openai/clip-vit-large-patch14-336",
    "eva02_clip": "QuanSun/EVA-CLIP/EVA02_CLIP_L_336_psz14_s6B.pt",
}


@dataclasses.dataclass(frozen=True)
class BunnyConfig:
    """A Bunny.

    architecture: of the language model, a ``model_type`` of ``mmjax.models.language``. s2_scales:
    sides in pixels at which the tower looks at an image, cut into tiles of its own size (Shi et al.
    2024); None for its own size alone. image_aspect_ratio: how the processor makes an image square.
    image_mean, image_std: of RGB in 0 to 1. vision_tower: the path or hub name that the peer loads
    its tower from. unfreeze_vision_tower: it was trained since. max_length: tokens of a training
    sample, text and images.
    """

    decoder: DecoderConfig
    architecture: str
    vision: ViTConfig
    projector: ProjectorConfig
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    s2_scales: tuple[int, ...] | None = None
    image_aspect_ratio: Literal["pad", "square"] = "pad"
    # Two models that were trained alike differ in these at will.
    vision_tower: str = dataclasses.field(default="", compare=False)
    unfreeze_vision_tower: bool = dataclasses.field(default=False, compare=False)
    max_length: int = dataclasses.field(default=2048, compare=False)
    bos_token_id: int | None = None
    eos_token_id: int = 0
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Raise MMJaxError where tower, projector and language model do not fit."""
        width = self.vision.d_model * len(self.s2_scales or (1,))
        if self.projector.d_vision != width:
            named = f", {self.vision_tower}" if self.vision_tower else ""
            raise MMJaxError(
                f"the vision tower gives features of width {width}, and the projector "
                f"({self.projector.kind}) takes {self.projector.d_vision}; give the tower the "
                f"projector was trained with{named}, or train a new projector"
            )
        if self.projector.d_model != self.decoder.d_model:
            raise MMJaxError(
                f"the projector ({self.projector.kind}) gives width {self.projector.d_model}, and "
                f"the language model ({self.architecture}) takes {self.decoder.d_model}; give the "
                "language model the projector was trained with, or train a new projector"
            )
        if self.s2_scales:
            check_scales(self.s2_scales, self.vision.image_size)

    def after_training(self, names: Collection[str]) -> BunnyConfig:
        """Return the config of a model of which these parameters were trained."""
        tower = any(name.startswith("vision.") and not is_lora(name) for name in names)
        return dataclasses.replace(self, unfreeze_vision_tower=True) if tower else self

    @property
    def image_size(self) -> int:
        """Side in pixels of an image as the model takes it."""
        return max(self.s2_scales) if self.s2_scales else self.vision.image_size

    @property
    def image_tokens(self) -> int:
        """Tokens of the stream that an image takes."""
        return self.projector.num_tokens(self.vision.num_patches)

    @property
    def patch_dim(self) -> int:
        """Numbers of one row of the visual stream: an image."""
        return self.image_size**2 * self.vision.num_channels

    @property
    def vocab_size(self) -> int:
        """Token ids the model knows."""
        return self.decoder.vocab_size

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The token that ends an answer."""
        return (self.eos_token_id,)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> BunnyConfig:
        """Read a Bunny's config.json with its tower's ``vision_config`` in it.

        The peer's files name the tower by a path alone: ``assemble`` reads the tower and adds its
        config. The language model's head has no bias, whatever its own config says: the peer
        leaves it out (bunny_phi.py).
        """
        name = architecture_of(hf)
        decoder = ARCHITECTURES[name].decoder({**hf, "model_type": name})
        decoder = dataclasses.replace(decoder, head_bias=False)
        if not hf.get("vision_config"):
            raise MMJaxError(
                "config.json of a Bunny does not tell the sizes of its vision tower; give the "
                "tower's files with --vision FILE_OR_DIR (in Python vision=...)"
            )
        vision = read_vision_config(hf["vision_config"])
        scales = s2_scales(hf)
        width = vision.d_model * len(scales or (1,))
        projector = ProjectorConfig(
            kind=hf.get("mm_projector_type") or "linear",  # as the peer's builder
            d_vision=hf.get("mm_hidden_size") or width,
            d_model=decoder.d_model,
        )
        seen = seen_by_tower(hf)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        tokens = {key: stated_token(hf.get(key)) for key in ids}
        tokens["eos_token_id"] = tokens["eos_token_id"] or 0
        return cls(
            decoder=decoder,
            architecture=name,
            vision=vision,
            projector=projector,
            image_mean=seen["image_mean"],
            image_std=seen["image_std"],
            s2_scales=scales,
            image_aspect_ratio="pad" if hf.get("image_aspect_ratio") == "pad" else "square",
            vision_tower=hf.get("mm_vision_tower") or "",
            unfreeze_vision_tower=bool(hf.get("unfreeze_vision_tower")),
            max_length=hf.get("tokenizer_model_max_length") or 2048,
            **tokens,
        )

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that Bunny's code reads, with the tower's sizes beside it."""
        vision = write_vision_config(self.vision)
        return {
            "architectures": [_CLASS_NAMES[self.architecture]],
            **ARCHITECTURES[self.architecture].write(self.decoder),
            "model_type": PREFIX + self.architecture,
            "mm_vision_tower": self.vision_tower or _PUBLISHED[vision["model_type"]],
            "mm_hidden_size": self.projector.d_vision,
            "mm_projector_type": self.projector.kind,
            "use_mm_proj": True,
            "image_aspect_ratio": self.image_aspect_ratio,
            "tokenizer_padding_side": "right",
            "tokenizer_model_max_length": self.max_length,
            "tune_mm_mlp_adapter": False,
            "freeze_mm_mlp_adapter": False,
            "unfreeze_vision_tower": self.unfreeze_vision_tower,
            "use_s2": self.s2_scales is not None,
            **({"s2_scales": ",".join(map(str, self.s2_scales))} if self.s2_scales else {}),
            "image_tokens": self.image_tokens,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "vision_config": vision,
        }

    def work(
        self, tokens: int, *, asked: float = 1.0, visual: int = 0, width: int = 0
    ) -> tuple[Work, ...]:
        """Return the work of a row with so many images: tower, projector, language model."""
        size = self.vision.image_size
        tiles = num_tiles(self.s2_scales or (size,), size)
        connector = visual * self.projector.flops(self.vision.num_patches)
        return (
            self.vision.work(visual * tiles),
            Work({"projector.*": connector}),
            *self.decoder.work(tokens, asked=asked),
        )


def architecture_of(hf: Mapping[str, Any]) -> str:
    """Tell the language model of a Bunny's config.json by its model_type."""
    found = str(hf.get("model_type"))
    name = _OLDER.get(found, found.removeprefix(PREFIX))
    if name not in _CLASS_NAMES or not found.startswith(PREFIX):
        raise MMJaxError(
            f"config.json says model_type {found!r}, no Bunny; one of "
            f"{', '.join(MODEL_TYPES)}{nearest(found, MODEL_TYPES)}"
        )
    return name
