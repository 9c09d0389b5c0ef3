"""A Flamingo's config: which language model, which tower, and what stands between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax.models.decoder import DecoderConfig
from mmjax.models.flamingo.cross_attention import CrossAttentionConfig
from mmjax.models.flamingo.perceiver import PerceiverConfig
from mmjax.models.image_settings import stated_colours
from mmjax.models.language.architecture import stated_token
from mmjax.models.language.architectures import ARCHITECTURES
from mmjax.models.normalisation import CLIP_MEAN, CLIP_STD
from mmjax.models.stated_sizes import check_sizes
from mmjax.models.vision_config import read_vision_config, write_vision_config
from mmjax.models.vit import ViTConfig
from mmjax.models.work import Work
from mmjax.types import MMJaxError, is_number

# Where the tokenizer of an architecture ends: <|endofchunk|> and <image> are the next two ids.
# These are the language models that a Flamingo was built on.
TOKENIZER_LENGTHS = {
    "llama": 32_000,
    "mpt": 50_277,
    "mosaic_gpt": 50_277,
    "gpt_neox": 50_277,
    "opt": 50_265,
}
_CLASSES = {one.class_name: name for name, one in ARCHITECTURES.items()} | {
    "MPTForCausalLM": "mpt",
    "MPTModel": "mpt",
}
_PERCEIVER_KEYS = ("num_layers", "num_heads", "head_dim", "num_latents", "ff_mult", "max_media")
_CROSS_KEYS = ("num_heads", "head_dim", "ff_mult", "gate_init")


@dataclasses.dataclass(frozen=True)
class FlamingoConfig:
    """An OpenFlamingo, Otter or Clever Flamingo.

    architecture: of the language model, a ``model_type`` of ``mmjax.models.language``. cross_every:
    a gated block stands before each so many-th decoder layer. image_mean, image_std: of RGB in 0 to
    1. media_token_id: ``<image>``; eoc_token_id: ``<|endofchunk|>``; answer_token_id: Otter's
    ``<answer>``, None without.
    """

    decoder: DecoderConfig
    architecture: str
    vision: ViTConfig
    perceiver: PerceiverConfig
    cross: CrossAttentionConfig
    cross_every: int
    media_token_id: int
    eoc_token_id: int
    answer_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int = 0
    pad_token_id: int | None = None
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if not 1 <= self.cross_every <= self.decoder.num_layers:
            raise MMJaxError(
                f"cross_attn_every_n_layers is {self.cross_every} and the language model has "
                f"{self.decoder.num_layers} layers; give 1 to {self.decoder.num_layers}"
            )

    @property
    def num_cross(self) -> int:
        """Gated blocks in the model."""
        return self.decoder.num_layers // self.cross_every

    @property
    def patch_dim(self) -> int:
        """Numbers of one row of the visual stream: a medium of one frame."""
        return self.vision.image_size**2 * self.vision.num_channels

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """<|endofchunk|> and the language model's own end: either ends an answer."""
        return tuple(dict.fromkeys((self.eoc_token_id, self.eos_token_id)))

    @property
    def vocab_size(self) -> int:
        """Token ids the model knows."""
        return self.decoder.vocab_size

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> FlamingoConfig:
        """Read the config.json of Otter's and Flamingo's Hugging Face folders, or one of ours.

        Those name neither token ids nor the resampler's sizes: the ids are then the first behind
        the architecture's tokenizer, the sizes OpenFlamingo's.
        """
        check_sizes(hf, "config.json of a Flamingo")
        text = dict(hf.get("text_config") or {})
        text |= {key: hf[key] for key in ("vocab_size",) if key in hf}
        name = architecture_of(text)
        decoder = ARCHITECTURES[name].decoder({**text, "model_type": name})
        vision = read_vision_config(hf.get("vision_config") or {})
        own, gated = (hf.get(key) or {} for key in ("perceiver_config", "cross_config"))
        check_sizes(own, "perceiver_config")
        check_sizes(gated, "cross_config")
        if gated.get("gate_init") is not None and not is_number(gated["gate_init"]):
            raise MMJaxError(f"cross_config says gate_init {gated['gate_init']!r}; give a number")
        perceiver = PerceiverConfig(
            d_model=vision.d_model,
            max_frames=hf.get("max_num_frames"),
            init_std=_torch_std(vision.d_model),
            **{key: own[key] for key in _PERCEIVER_KEYS if own.get(key) is not None},
        )
        cross = CrossAttentionConfig(
            d_model=decoder.d_model,
            d_media=vision.d_model,
            num_latents=perceiver.num_latents,
            init_std=_torch_std(decoder.d_model),
            only_immediate=hf.get("only_attend_immediate_media") in (None, True),
            **{key: gated[key] for key in _CROSS_KEYS if gated.get(key) is not None},
        )
        first = TOKENIZER_LENGTHS[name]

        def token(key: str, default: int | None) -> int | None:
            found = stated_token(hf.get(key, text.get(key)))
            return default if found is None else found

        return cls(
            decoder=decoder,
            architecture=name,
            vision=vision,
            perceiver=perceiver,
            cross=cross,
            cross_every=hf.get("cross_attn_every_n_layers") or 4,
            media_token_id=token("media_token_id", first + 1),
            eoc_token_id=token("eoc_token_id", first),
            answer_token_id=hf.get("answer_token_id"),
            bos_token_id=token("bos_token_id", None),
            eos_token_id=token("eos_token_id", 0),
            pad_token_id=token("pad_token_id", None),
            **stated_colours(hf),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json in the form of Otter's, with what that leaves out beside it."""
        own = ARCHITECTURES[self.architecture]
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        tokens = {key: getattr(self, key) for key in ids}
        return {
            "architectures": ["FlamingoForConditionalGeneration"],
            "model_type": "flamingo",
            "cross_attn_every_n_layers": self.cross_every,
            "only_attend_immediate_media": self.cross.only_immediate,
            "max_num_frames": self.perceiver.max_frames,
            "media_token_id": self.media_token_id,
            "eoc_token_id": self.eoc_token_id,
            "answer_token_id": self.answer_token_id,
            **tokens,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "tie_word_embeddings": self.decoder.tied,
            "text_config": {
                "architectures": [own.class_name],
                "model_type": own.model_type,
                **own.write(self.decoder),
                **tokens,
            },
            "vision_config": write_vision_config(self.vision),
            "perceiver_config": {key: getattr(self.perceiver, key) for key in _PERCEIVER_KEYS},
            "cross_config": {key: getattr(self.cross, key) for key in _CROSS_KEYS},
        }

    def work(
        self, tokens: int, *, asked: float = 1.0, visual: int = 0, width: int = 0
    ) -> tuple[Work, ...]:
        """Return the work of a row: tower, resampler, keys and values of media, text, head."""
        frames = width // self.patch_dim
        keys, gated = self.cross.work(self.num_cross, tokens, visual)
        embed, layers, head = self.decoder.work(tokens, asked=asked)
        return (
            self.vision.work(visual * frames),
            self.perceiver.work(visual, frames * self.vision.num_patches),
            keys,
            embed,
            layers.beside(gated),
            head,
        )


def _torch_std(d: int) -> float:
    """Return the standard deviation of torch's fresh Linear of d inputs, which the peer keeps."""
    return (3 * d) ** -0.5


def architecture_of(text: Mapping[str, Any]) -> str:
    """Tell the language model of a ``text_config``, by its model_type or its class."""
    named, classes = text.get("model_type"), text.get("architectures")
    own = classes[0] if isinstance(classes, list) and classes else None
    found = named if str(named) in ARCHITECTURES else _CLASSES.get(str(own))
    if found not in TOKENIZER_LENGTHS:
        raise MMJaxError(
            f"text_config says model_type {named!r} and architectures "
            f"{text.get('architectures')!r}, no language model of a Flamingo; one of "
            f"{', '.join(TOKENIZER_LENGTHS)}"
        )
    return found
