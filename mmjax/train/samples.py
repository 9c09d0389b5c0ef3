"""What the model says of a sample that it is about to train on: prompt, targets, its own choices.

Each target is predicted from the tokens before it, the right ones, as in training; nothing is
generated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.models.api import Processor
from mmjax.monitor.writers import MultiWriter
from mmjax.types import Batch

_MARKS = re.compile(r"(\|\w+\||<\|?\w+\|?>)\1{3,}")  # |SPEAKER||SPEAKER|..., <image><image>...
_ROWS = re.compile(r"(\|\w+\| x \d+\|\w+\|)\1+")  # and rows of them with an end each
LIMIT = 64
"""Targets of a sample that are looked at."""


class Samples:
    """Write the first sample of a batch into the workdir's ``samples.jsonl`` and tell of it.

    writer: also gets each of them, as ``samples``.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        processor: Processor,
        workdir: Path,
        mesh: jax.sharding.Mesh,
        writer: MultiWriter,
    ):
        self._writer, self._processor, self._file = writer, processor, workdir / "samples.jsonl"

        def predict(params, frozen, batch):
            model = nnx.merge(graphdef, params, frozen)
            index = batch["target_index"][:, :LIMIT]
            hidden = model(batch, jnp.maximum(index - 1, 0))
            return jnp.argmax(model.logits(hidden[:1]), axis=-1)[0]

        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._predict = jax.jit(predict, out_shardings=everywhere)

    def __call__(
        self,
        step: int,
        local: Batch,
        batch: Batch,
        params: nnx.State,
        frozen: nnx.State,
        records: Sequence[Sequence[tuple[str, str]]],
    ) -> str:
        """Return what is written: record, prompt, targets and the tokens that were likeliest.

        local: this process's rows, of which the first process's are the first; batch: the same on
        the devices. Every process calls this, and the first one writes.
        """
        likeliest = np.asarray(jax.device_get(self._predict(params, frozen, batch)))
        found = self._first(local, likeliest)
        found = {"record": _name(records[0][0]) if records[0] else "", **found}
        row = {"step": step, **found}
        if jax.process_index() == 0:
            try:
                with open(self._file, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except OSError as error:  # a full disk ends no run
                self._writer.warn(f"the sample of step {step} could not be written: {error}")
        self._writer.sample(step, "samples", found)
        return "\n".join(f"  {name}: {short(str(value))}" for name, value in row.items())

    def _first(self, local: Mapping[str, np.ndarray], likeliest: np.ndarray) -> dict[str, str]:
        """Decode the first sample of the first row: its tokens, targets and predictions."""
        tokens, mine = local["tokens"][0], local["segment_ids"][0] == 1
        index = local["target_index"][0, :LIMIT]
        places = (index > 0) & mine[np.maximum(index, 0)]
        return {
            "input": self._text(tokens[mine]),
            "labels": self._text(tokens[index[places]]),
            "predicted": self._text(likeliest[places]),
        }

    def _text(self, tokens: np.ndarray) -> str:
        size = len(self._processor.tokenizer)  # a table may have more rows than there are tokens
        ids = [int(token) if token < size else 0 for token in tokens]
        return self._processor.tokenizer.decode(ids, skip_special_tokens=False)


def short(text: str) -> str:
    """Write marks that stand many times in a row, as of an image, once with their number."""
    text = _MARKS.sub(lambda m: f"{m[1]} x {len(m[0]) // len(m[1])}", text)
    return _ROWS.sub(lambda m: f"({m[1]}) x {len(m[0]) // len(m[1])}", text)


def _name(record: tuple[str, str]) -> str:
    """Write a record as ``source/id``; half a surrogate pair in it becomes its escape."""
    return "/".join(record).encode("utf-8", "backslashreplace").decode()
