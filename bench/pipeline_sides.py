"""The two sides of bench.pipeline, each in a process of its own: ours and the peer's.

    python -m bench.pipeline_sides ours SPECIFICATION ANSWER

SPECIFICATION is a JSON file that ``bench.pipeline`` writes, ANSWER the file the figures go to. With
``parity`` in it a few records are drawn first, untimed, and what came out is kept beside ANSWER.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import environment, processes, records

_SAMPLES = 50  # looks at the memory while a turn lasts


def drain(steps: Iterable[dict[str, int]], images: int) -> dict[str, Any]:
    """Take every step, or those of the first so many images; returns what it took.

    steps: each tells ``images``, and any other counts, which are summed. ``cpu_s`` is the processor
    time of this process and its children since the call, ``first_cpu_s`` of it up to the first
    step, ``other_cores`` what other programs kept busy meanwhile.
    """
    pid, look, memory, start = os.getpid(), 0.0, [], {}
    busy, cpu = environment.busy_seconds(), processes.cpu_seconds(pid)
    begun = time.perf_counter()
    found = {"images": 0}
    for step in steps:
        start = start or {
            "first_s": round(time.perf_counter() - begun, 2),
            "first_cpu_s": round(processes.cpu_seconds(pid) - cpu, 2),
            "first_images": int(step["images"]),
        }
        for name, count in step.items():
            found[name] = found.get(name, 0) + int(count)
        if found["images"] >= look or found["images"] >= images:
            share = round(found["images"] / images, 3)
            memory.append({"share": share, **processes.memory(pid)})
            look = found["images"] + images / _SAMPLES
        if found["images"] >= images:
            break
    seconds = time.perf_counter() - begun
    cpu = processes.cpu_seconds(pid) - cpu
    other = (environment.busy_seconds() - busy - cpu) / seconds
    return found | {
        **start,
        "seconds": round(seconds, 2),
        "cpu_s": round(cpu, 2),
        "images_per_s": round(found["images"] / seconds, 2),
        "images_per_core_s": round(found["images"] / cpu, 2),
        "other_cores": round(max(0.0, other), 2),
        "peak_mb": processes.peak_mb(pid),
        "memory": memory,
    }


class Ours:
    """``make_train_iterator`` as a training run makes it: template, processor, packing, workers."""

    def __init__(self, spec: dict[str, Any]):
        from mmjax.data.tokenizers_small import build_word_tokenizer
        from mmjax.models.fuyu.processor import FuyuProcessor

        self.spec, self.shape = spec, spec["shape"]
        self.processor = FuyuProcessor(tokenizer=build_word_tokenizer(records.WORDS))

    def _iterator(self, file: str):
        from mmjax.data.pipeline import make_train_iterator
        from mmjax.data.sources import JsonSource

        source = JsonSource(Path(self.spec["folder"]) / file)
        return make_train_iterator(
            source,
            "fuyu_chat",
            self.processor,
            **self.shape,
            seed=self.spec["seed"],
            epochs=1,
            num_workers=self.spec["workers"],
        )

    def measure(self) -> dict[str, Any]:
        """Draw all records, or the first ``images``."""
        batches = self._iterator("records.json")
        found = drain(self._steps(batches), self.spec["images"])
        batches.close()
        row_tokens = self.shape["seq_len"] * self.shape["batch_size"]
        return found | {
            "padding": round(1 - found["tokens"] / (row_tokens * found["batches"]), 4),
            "tokens_per_s": round(found["tokens"] / found["seconds"]),
            "skipped": batches.skips.bad,
        }

    def _steps(self, batches) -> Iterator[dict[str, int]]:
        for batch in batches:
            yield {
                "images": batches.images,
                "records": sum(map(len, batches.records)),
                "tokens": np.count_nonzero(batch["segment_ids"]),
                "batches": 1,
            }

    def outputs(self) -> dict[str, np.ndarray]:
        """Take the records of ``parity.json`` out of their batches: tokens and patches by id."""
        found = {}
        batches = self._iterator("parity.json")
        for batch in batches:
            for row, names in enumerate(batches.records):
                for place, (_, name) in enumerate(names):
                    mine = batch["segment_ids"][row] == place + 1
                    visual = batch["visual_index"][row][mine]
                    # The peer ends with <answer> where a trainer puts the end mark.
                    found[f"{name}.tokens"] = np.array(batch["tokens"][row][mine][:-1])
                    found[f"{name}.levels"] = batch["patches"][row][visual[visual >= 0]]
        batches.close()
        return found


class Peer:
    """transformers' FuyuProcessor in the data set of a torch DataLoader, a sample at a time."""

    def __init__(self, spec: dict[str, Any]):
        from transformers import FuyuProcessor

        from bench import torch_peer
        from mmjax.data.tokenizers_small import build_word_tokenizer

        torch_peer.set_threads(1)  # as in each of its workers
        self.spec = spec
        tokenizer = build_word_tokenizer(records.WORDS)
        self.processor = FuyuProcessor(torch_peer.pillow_processor(), tokenizer)

    def _loader(self, file: str):
        from torch.utils.data import DataLoader

        data = _Pictures(Path(self.spec["folder"]), file, self.processor)
        # batch_size None: what the data set returns goes through as it is.
        return DataLoader(
            data, batch_size=None, num_workers=self.spec["workers"], collate_fn=_as_is
        )

    def measure(self) -> dict[str, Any]:
        """Draw every record of ``peer.json``."""
        steps = (
            {"images": 1, "records": 1, "tokens": sample["input_ids"].shape[1]}
            for _, sample in self._loader("peer.json")
        )
        return drain(steps, self.spec["images"])

    def outputs(self) -> dict[str, np.ndarray]:
        """Return tokens and grey levels of the records of ``parity.json`` by id."""
        found = {}
        for name, sample in self._loader("parity.json"):
            patches = sample["pixel_values"].numpy()
            found[f"{name}.tokens"] = sample["input_ids"][0, :-1].numpy()
            found[f"{name}.levels"] = (patches.reshape(-1, patches.shape[-1]) * 0.5 + 0.5) * 255
        return found


class _Pictures:
    """The data set that a user of the peer writes: open the picture, call the processor."""

    def __init__(self, folder: Path, file: str, processor: Any):
        self.folder, self.processor = folder, processor
        self.records = json.loads((folder / file).read_text())

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[str, dict[str, Any]]:
        from PIL import Image

        record = self.records[index]
        asked, answer = (turn["value"] for turn in record["conversations"])
        question = asked.removeprefix("<image>\n")
        image = Image.open(self.folder / record["image"]).convert("RGB")
        # The text as OtterHD gives it to this processor for training.
        text = f"User:{question} Assistant:\x04 {answer}"
        sample = self.processor(images=image, text=text, return_legacy_image_output=False)
        return record["id"], dict(sample)


def _as_is(sample: Any) -> Any:
    return sample


def main() -> int:
    """Do what the specification asks of one side."""
    side, spec, answer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    subject = {"ours": Ours, "peer": Peer}[side](spec)
    if spec["parity"]:
        np.savez(answer.with_suffix(".npz"), **subject.outputs())
    answer.write_text(json.dumps(subject.measure()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
