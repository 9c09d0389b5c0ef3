"""Read what Bunny's own code made (tests/golden/make_bunny_goldens.py says how), and write its
weights as the files people have of such a model."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from tests.parity.flamingo_golden import relative_error

COMMITTED = Path(__file__).parents[1] / "golden"
TOWERS = ("siglip", "clip", "eva", "s2")  # the last is a SigLIP at several scales
TOWER = "model.vision_tower.vision_tower."  # of every tensor of a tower in a merged checkpoint
IMAGE_TOKENS = 4
NOTHING = 1e-6  # a gradient below is nothing but rounding: the bias of keys without rotation


@dataclass(frozen=True, repr=False)
class Case:
    """A batch through the peer. Axes: b rows, S ids, right-padded, n images, T places of a row with
    its images in it, v vocabulary."""

    name: str
    config: dict  # config.json with what this case changes in it
    ids: np.ndarray  # int[b,S], an image at -200
    attention_mask: np.ndarray  # bool[b,S]
    labels: np.ndarray  # int[b,S], -100 where no loss is
    # f32[n,3,28,28], with S2 84 x 84: one for each image and one for each row without
    pixel_values: np.ndarray
    logits: np.ndarray  # f32[b,T,v]
    loss: float
    features: np.ndarray | None = None  # f32[n,4,32], behind the projector
    prompt_lengths: np.ndarray | None = None  # int[b], ids of a row before its answer
    greedy: np.ndarray | None = None  # int[b,12], what follows each prompt
    greedy_margin: float | None = None  # least distance between its two best logits

    def row_mask(self):
        """Return bool[b,T]: the places of the peer's rows that hold a token or an image."""
        tokens = self.attention_mask.sum(1) + (IMAGE_TOKENS - 1) * (self.ids == -200).sum(1)
        tokens = np.minimum(tokens, self.config["tokenizer_model_max_length"])
        mask = np.arange(self.logits.shape[1]) < tokens[:, None]
        return mask[:, ::-1] if self.config["tokenizer_padding_side"] == "left" else mask

    def image_slots(self):
        """Return for each row the rows of ``pixel_values`` that are its images."""
        counts = (self.ids == -200).sum(1)
        ends = np.cumsum(
            [max(n, 1) for n in counts]
        )  # a row without an image takes one all the same
        return [list(range(end - n, end)) for n, end in zip(counts, ends, strict=True)]


@dataclass(frozen=True, repr=False)
class Golden:
    """One model of the peer. ``gradients`` are of the first case's loss, for what has one."""

    name: str
    language: str
    tower: str  # one of TOWERS
    config: dict  # config.json
    tower_config: dict  # what lies beside the tower's weights: transformers' or open_clip's
    weights: dict  # float32 by name in a merged checkpoint
    gradients: dict
    cases: dict  # by name

    @property
    def first(self):
        """The case whose gradients there are: rows of every kind, nothing cut."""
        return next(iter(self.cases.values()))

    def gradient_errors(self, gradients):
        """Return {name: largest error over largest magnitude}; gradients by name in a checkpoint.

        Where the peer's is nothing but rounding, ours over that bound.
        """
        errors = {}
        for name, theirs in self.gradients.items():
            ours = np.asarray(gradients[name])
            if np.abs(theirs).max() < NOTHING:
                errors[name] = float(np.abs(ours).max())
            else:
                errors[name] = relative_error(ours, theirs)
        return errors


def load(path):
    """Return the Golden in a .npz file."""
    groups = {}
    with np.load(path) as file:
        for key in file.files:
            group, _, name = key.rpartition("/") if "/" in key else ("", "", key)
            groups.setdefault(group, {})[name] = file[key]
    texts = {name: json.loads(value.item()) for name, value in groups[""].items()}
    _, language, tower = Path(path).stem.split("_")
    return Golden(
        name=Path(path).stem,
        language=language,
        tower=tower,
        config=texts["config"],
        tower_config=texts["tower_config"],
        weights=groups["sd"],
        gradients=groups["g"],
        cases={
            name: Case(name, texts["config"] | changed, **_numbers(groups[name]))
            for name, changed in texts["cases"].items()
        },
    )


def _numbers(arrays):
    return {name: float(v) if v.ndim == 0 else v for name, v in arrays.items()}


def paths():
    """Return the committed files."""
    found = sorted(p for tower in TOWERS for p in COMMITTED.glob(f"bunny_*_{tower}.npz"))
    if not found:
        raise FileNotFoundError(f"no goldens in {COMMITTED}; make_bunny_goldens.py makes them")
    return found


def write_checkpoint(golden, folder, *, tower="inside", prefix=True):
    """Write a model as the peer saves it, and return its folder, ``folder/model``.

    tower: "inside", as in a merged checkpoint; "beside", in files of its own (``write_tower``),
        which config.json then names.
    """
    folder = Path(folder) / "model"
    folder.mkdir(parents=True)
    weights, config = golden.weights, golden.config
    if tower == "beside":
        weights = {k: v for k, v in weights.items() if not k.startswith(TOWER)}
        where = str(write_tower(golden, folder.parent, prefix=prefix))
        config = config | {"mm_vision_tower": where, "unfreeze_vision_tower": False}
    _save(weights, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tower(golden, folder, *, prefix=True):
    """Write the tower's own files into ``folder``, and return their path.

    A folder of transformers' SiglipVisionModel or CLIPVisionModel, whose names begin with
    ``vision_model.`` or, as newer versions save them, do not (``prefix``); or EVA-CLIP's one file.
    """
    path = Path(folder) / golden.config["mm_vision_tower"]
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k.removeprefix(TOWER): v for k, v in golden.weights.items() if k.startswith(TOWER)}
    if golden.tower == "eva":
        visual = {"visual." + k.removeprefix("model."): v for k, v in state.items()}
        torch.save({k: torch.from_numpy(v) for k, v in visual.items()}, path)
        return path
    path.mkdir()
    _save(state if prefix else {k.removeprefix("vision_model."): v for k, v in state.items()}, path)
    (path / "config.json").write_text(json.dumps(golden.tower_config))
    return path


def _save(weights, folder):
    contiguous = {k: np.ascontiguousarray(v) for k, v in weights.items()}
    save_file(contiguous, folder / "model.safetensors")
