"""What Otter's classes ask of config.json beyond what describes the model."""

from __future__ import annotations

from typing import Any

from mmjax.weights.rules import Tensor


def completed(config: Any, dtype: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Return no further tensors, and what the config.json of an export says for Otter's classes.

    Otter brings MPT and MosaicGPT of its own (src/otter_ai/models/mpt, mpt_redpajama): told by the
    class name, with an attention of Triton unless told otherwise, while the gated blocks ask for
    the width under LLaMA's name. Otter's class adds <answer> to the tokenizer, Flamingo's does not.
    """
    hf = config.to_hf()
    text, width = hf["text_config"], config.decoder.d_model
    if config.architecture == "mpt":
        attention = {**text["attn_config"], "attn_impl": "torch"}
        text |= {"architectures": ["MPTForCausalLM"], "attn_config": attention}
        text |= {"hidden_size": width}
    elif config.architecture == "mosaic_gpt":
        text |= {"attn_impl": "torch", "hidden_size": width}
    says = {"text_config": text}
    if config.answer_token_id is not None:
        says |= {"model_type": "otter", "architectures": ["OtterForConditionalGeneration"]}
    return [], says
