"""A causal language model alone: text in, text out. Other families build on its decoder."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from mmjax.models.causal import CausalModel
from mmjax.models.decoder import Decoder, DecoderConfig
from mmjax.models.language.architecture import stated_token
from mmjax.models.language.architectures import ARCHITECTURES, architecture
from mmjax.models.work import Work
from mmjax.nn.linear import DTypes, LoRA


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """A language model; the defaults are LLaMA-7B's tokens.

    architecture: the ``model_type`` of its config.json, a name in ``ARCHITECTURES``. eos_token_id:
    None where that states none (Phi-1.5): then the tokenizer's ends an answer.
    """

    decoder: DecoderConfig
    architecture: str = "llama"
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None

    @property
    def vocab_size(self) -> int:
        """Token ids the model knows."""
        return self.decoder.vocab_size

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The token that ends an answer, none where config.json states none."""
        return () if self.eos_token_id is None else (self.eos_token_id,)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> LanguageConfig:
        """Read a config.json of any architecture of ``ARCHITECTURES``."""
        found = architecture(hf)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: stated_token(hf.get(name)) for name in names}
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
