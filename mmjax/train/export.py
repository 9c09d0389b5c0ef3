"""What a run leaves for others: its model, as a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from mmjax.loaded import LoadedModel
from mmjax.models import converted, registry
from mmjax.models.companions import write_generation
from mmjax.models.views import MultipliedOut, is_lora
from mmjax.nn import paths
from mmjax.nn.linear import LoRA
from mmjax.train import frozen as frozen_part


def export_model(
    model: LoadedModel,
    destination: Path,
    lora: LoRA | None,
    trained: set[str],
    earlier: Sequence[str] = (),
    *,
    overwrite: bool = True,
) -> None:
    """Write a folder that ``mmjax.load`` and ``convert_weights.to_hf`` read.

    trained: names of what this run trained. earlier: patterns of what runs before it did, beside
    the adapters that it went on with.
    """
    state = nnx.state(model.model)
    whole = [name for name in paths.flatten(state) if not is_lora(name)]
    noted = dict.fromkeys([*earlier, *paths.patterns(trained, whole)])
    after = getattr(model.config, "after_training", None)
    with tempfile.TemporaryDirectory() as folder:
        model.processor.save_pretrained(folder)
        ends, said = model.end_tokens(), model.generation
        if said or set(ends) - set(model.config.end_token_ids):
            ids = {} if model.processor.tokenizer is None else model.processor.token_ids()
            write_generation(said, ends, ids, Path(folder))
        converted.save_model(
            destination,
            MultipliedOut(state, frozen_part.REST),
            family=registry.family(model.family),
            config=model.config if after is None else after(trained),
            lora=lora,
            trained=tuple(noted),
            template=model.template,
            folders=(Path(folder),),
            overwrite=overwrite,
        )
