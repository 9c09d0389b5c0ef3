"""Read what OpenFlamingo's own code made (tests/golden/make_flamingo_goldens.py says how)."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LANGUAGE_MODELS = ("mpt", "mosaic1b", "neox", "llama", "opt")
COMMITTED = Path(__file__).parents[1] / "golden"
W8_STEP = 1 / 64  # what one code of an int8 weight is worth
SAMPLES = 256  # about as many numbers of a large gradient are kept


@dataclass(frozen=True, repr=False)
class Golden:
    """One run of the peer. Axes: b rows, m media, S tokens of the left-padded prompts, v vocab."""

    name: str
    lm: str
    every: int
    config: dict  # lm, every, ids, tower, language, prompts, missing
    weights: dict  # float32 by published name
    gradients: dict  # float32 by published name: the small ones, or all of a full file
    gradient_norms: dict  # of the others
    gradient_samples: dict  # of the others: what `sample` takes of them
    arrays: dict  # everything else by its name: input_ids, vision_x, logits, greedy, ...

    def __getattr__(self, name):
        if name.startswith("__") or name not in self.arrays:
            raise AttributeError(name)
        return self.arrays[name]

    @property
    def trained(self):
        """Names of what the peer trains."""
        return sorted({*self.gradients, *self.gradient_norms})

    def gradient_errors(self, gradients):
        """Return {name: largest error over largest magnitude}; gradients by published name."""
        return {name: self._error(name, np.asarray(gradients[name])) for name in self.trained}

    def _error(self, name, ours):
        if name in self.gradients:
            theirs = self.gradients[name]
            return relative_error(ours, theirs)
        theirs = self.gradient_norms[name]
        norm = abs(np.linalg.norm(ours.astype(np.float64)) - theirs) / theirs
        return max(norm, relative_error(sample(ours), self.gradient_samples[name]))


def relative_error(ours, theirs):
    """Return max|ours - theirs| / max|theirs|; the shapes must agree."""
    if ours.shape != theirs.shape:
        raise ValueError(f"shape {ours.shape} is not the peer's {theirs.shape}")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-12))


def sample(gradient):
    """Return the numbers that a compact file keeps of a gradient, flat."""
    stride = (gradient.size // SAMPLES) | 1
    return gradient.reshape(-1)[::stride]


def load(path):
    """Return the Golden in a .npz file, compact or full."""
    groups = {"w": {}, "w8": {}, "g": {}, "gn": {}, "gs": {}, "": {}}
    with np.load(path) as file:
        for key in file.files:
            group, slash, name = key.partition("/")
            groups[group if slash else ""][name if slash else key] = file[key]
    arrays = groups[""]
    config = json.loads(arrays.pop("config").item())
    from_codes = {k: v.astype(np.float32) * W8_STEP for k, v in groups["w8"].items()}
    return Golden(
        name=Path(path).stem,
        lm=config["lm"],
        every=config["every"],
        config=config,
        weights=groups["w"] | from_codes,
        gradients=groups["g"],
        gradient_norms={k: float(v) for k, v in groups["gn"].items()},
        gradient_samples=groups["gs"],
        arrays=arrays,
    )


def paths():
    """Return the files to compare with: those in FLAMINGO_GOLDENS, or the committed ones."""
    folder = Path(os.environ.get("FLAMINGO_GOLDENS", COMMITTED))
    found = sorted(p for lm in LANGUAGE_MODELS for p in folder.glob(f"flamingo_{lm}*.npz"))
    if not found:
        raise FileNotFoundError(f"no goldens in {folder}; `make parity-flamingo` makes them")
    return found
