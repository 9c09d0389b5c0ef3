"""A causal language model alone: text in, text out. Other families build on its decoder."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from mmjax.models.causal import CausalModel
from mmjax.models.decoder import Decoder, DecoderConfig
from mmjax.models.language.architectures import ARCHITECTURES, architecture
from mmjax.models.work import Work
from mmjax.nn.linear import DTypes, LoRA


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """A language model; the defaults are LLaMA-7B's tokens.

    architecture: the ``model_type`` of its config.json, a name in ``ARCHITECTURES``.
    """

    decoder: DecoderConfig
    architecture: str = "llama"
    bos_token_id: int | None = 1
    eos_token_id: int = 2
    pad_token_id: int | None = None

    @property
    def vocab_size(self) -> int:
        """Token ids the model knows."""
        return self.decoder.vocab_size

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The token that ends an answer."""
        return (self.eos_token_id,)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> LanguageConfig:
        """Read a config.json of any architecture of ``ARCHITECTURES``."""
        found = architecture(hf)
        ids = {key: _one(hf.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        ids["eos_token_id"] = 0 if ids["eos_token_id"] is None else ids["eos_token_id"]
        return cls(found.decoder(hf), found.model_type, **ids)

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json that transformers reads."""
        own = ARCHITECTURES[self.architecture]
        return {
            "architectures": [own.class_name],
            "model_type": own.model_type,
            **own.write(self.decoder),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }

    def work(
        self, tokens: int, *, asked: float = 1.0, visual: int = 0, width: int = 0
    ) -> tuple[Work, ...]:
        """Return the work of a row; it has no visual stream."""
        return self.decoder.work(tokens, asked=asked)


def _one(token: int | list[int] | None) -> int | None:
    """Return a token id; some files list several ends, the first of which is the model's own."""
    return token[0] if isinstance(token, list) else token


class Language(CausalModel):
    """A decoder over its own token embeddings."""

    def __init__(
        self,
        config: LanguageConfig,
        *,
        rngs: nnx.Rngs,
        dtypes: DTypes = DTypes(),  # noqa: B008
        lora: LoRA | None = None,
        remat: str = "names",
        scan_unroll: int = 1,
        attention: str = "auto",
    ):
        self.config = config
        run = dict(remat=remat, scan_unroll=scan_unroll, attention=attention)
        self.decoder = Decoder(config.decoder, dtypes=dtypes, rngs=rngs, lora=lora, **run)
