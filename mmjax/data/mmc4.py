"""The documents of MMC4 in WebDataset shards, and the ChatGPT sequences beside them.

Shards are those of OpenFlamingo's convert_mmc4_to_wds.py: one ``json`` a sample, the pictures in it
as base64.
"""

from __future__ import annotations

import json
import os
from typing import Any

from mmjax.data.interleaved import TEMPLATE, Interleave
from mmjax.data.skips import listed_as
from mmjax.data.webdataset import Sample, ShardPaths, Shards
from mmjax.schema import to_dataclass
from mmjax.types import BadSample, Record


class Mmc4Source:
    """The documents of MMC4 shards, filtered as OpenFlamingo filters them.

    path, damaged, index_dir: see ``Shards``. options: see ``Interleave``.
    """

    TEMPLATE = TEMPLATE

    def __init__(
        self,
        path: ShardPaths,
        *,
        damaged: str = "error",
        index_dir: str | os.PathLike | None = None,
        **options: Any,
    ):
        self._interleave = to_dataclass(Interleave, options, "source")
        self._shards = Shards(path, damaged, index_dir)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> Record:
        sample = self._shards[index]
        with listed_as(sample.meta):
            return self._interleave.record(_document(sample), sample.where, sample.meta)


def _document(sample: Sample) -> dict[str, Any]:
    """Read the ``json`` of a sample."""
    if "json" not in sample.files:
        raise BadSample(
            "bad_record",
            f"{sample.where}: there is no json (found {', '.join(sample.files)})",
        )
    try:
        info = json.loads(sample.files["json"])
    except (ValueError, RecursionError) as e:
        raise BadSample("bad_json", f"{sample.where}: cannot be read as JSON: {e}") from e
    if not isinstance(info, dict):
        raise BadSample(
            "bad_json", f"{sample.where}: expected an object, got {type(info).__name__}"
        )
    return info
