"""Write clever_data.json: what instruct_flamingo's own code makes of instruction data.

    PYTHONPATH=. .venv-flamingo/bin/python tests/golden/make_clever_data_golden.py \\
        --clever CHECKOUT --out tests/golden/clever_data.json

The environment is that of `make parity-flamingo`; CHECKOUT is told in clever_peer.py. Holds
  alone       for each of SAMPLES, template and tokenizer: tokens, and which are targets
  joined      for each of JOINS: the samples that were drawn, in their order (the last of them ended
              the sample, if it stands behind ``turns``), tokens, labels of the train step, and how
              many pictures the sample has
  legacy      tokens of the sample with an ``instruction``, read once and read again
  shares      draws of each dataset for each of SHARES
  padded      the squares of PICTURES, as nested lists, with their colour
  looks       version 1: for each of LOOKS the image that each token sees, -1 for none
"""

import argparse
import contextlib
import io
import json
import os
import random
import tempfile
from types import SimpleNamespace

import clever_peer as peer
import numpy as np
import torch
from PIL import Image

from tests.tiny_language_tokenizers import build_llama_tokenizer, build_neox_tokenizer

TOKENIZERS = {"neox": build_neox_tokenizer, "llama": build_llama_tokenizer}
TEMPLATES = ("guanaco", "guanaco-no-prompt")
A, B, C = (f"<img_path>{name}.png<img_path>" for name in "abc")
SAMPLES = [
    {"input": f"{A}What is it?", "output": "A small dog."},
    {"input": f"Look at {A}, then at {B}: which is blue?", "output": "The second picture."},
    {"input": f"{A}\nWhat colour is it?\n", "output": "blue\n\nand red"},
    {"input": f"What is it?\n{A}", "output": " Two cats on a sofa. "},
    {"input": f"{A} {B}\n{C}\n\nAre they  alike? ", "output": "\nNo."},
    {"input": "Where is the digit?", "output": "Near the top left corner."},
    {"input": "", "output": "A chat."},
    {"input": A, "output": "naïve 漢."},
    {"input": "What?", "output": "### Human: no", "instruction": f"{A}Be short. "},
]
LEGACY = len(SAMPLES) - 1
# max_img, turns, first sample, seed of the draws
JOINS = [(5, 3, 0, 1), (3, 8, 1, 2), (4, 6, 5, 3), (1, 4, 1, 4), (16, 12, 2, 5), (3, 6, 4, 6)]
LENGTH = 160  # tokens of a joined sample; some are cut
SIZES, RATIOS = (4, 16, 7), (3, 1.0, 2.5)
SHARES = [(mode, count) for mode in ("ratio", "sqrt") for count in (10, 101, 5000)]
PICTURES = [(7, 4), (4, 7), (6, 3), (3, 6), (5, 5), (8, 1)]
LOOKS = ["..i.i..i.", "i", "...", "ii.", ".i..."]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clever", required=True, metavar="CHECKOUT")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    data = peer.import_module(args.clever, "data")
    tune = peer.import_module(args.clever, "train_utils")
    with tempfile.TemporaryDirectory() as folder:
        for name in "abc":
            Image.new("RGB", (3, 3), "white").save(os.path.join(folder, f"{name}.png"))
        found = dict(
            samples=SAMPLES,
            alone=alone(data),
            joined=[joined(data, tune, folder, *one) for one in JOINS],
            legacy=legacy(data, folder),
            sizes=SIZES,
            ratios=RATIOS,
            shares=[[*one, shares(data, folder, *one)] for one in SHARES],
            padded=[padded(data, *size) for size in PICTURES],
            looks={marks: looks(args.clever, marks) for marks in LOOKS},
        )
    with open(args.out, "w") as file:
        json.dump(found, file, ensure_ascii=False, separators=(",", ":"))
        file.write("\n")
    print(f"{args.out}: {os.path.getsize(args.out) / 1e3:.0f} kB")


def dataset(data, tokenizer, samples, folder, **options):
    """Return the peer's dataset of samples (or of several datasets), all settings as they stand."""
    settings = dict(
        instruction_prompt_templete="guanaco-no-prompt",
        dataset_sampling_mode="ratio",
        epoch_num_samples=-1,
        multiturn_augmentation=0,
        max_img=5,
        skip_check_overlength=True,
        rank=1,  # which logs nothing
    )
    given = {k: options.pop(k) for k in list(options) if k in settings}
    several = samples if isinstance(samples[0], list) else [samples]
    config = []
    for i, rows in enumerate(several):
        path = os.path.join(folder, f"{i}.json")
        with open(path, "w") as file:
            json.dump(rows, file)
        row = dict(dataset_name=str(i), json_path=path, img_dir=folder, ratio=RATIOS[i])
        config.append(row)
    path = os.path.join(folder, "config.json")
    with open(path, "w") as file:
        json.dump(config, file)
    args = SimpleNamespace(**settings | given)
    defaults = dict(num_samples=-1, max_length=LENGTH)
    return data.InstructionDataset(
        path, image_processor, tokenizer, args=args, **defaults | options
    )


def image_processor(image):
    """Return something that is no zero for a white picture."""
    return torch.from_numpy(np.array(image)[:1, :1].astype(np.float32)).permute(2, 0, 1)


def alone(data):
    """Return the tokens and targets of every sample by itself."""
    found = []
    for kind, build in TOKENIZERS.items():
        tokenizer = peer.add_tokens(build())
        for template in TEMPLATES:
            own = SimpleNamespace(tokenizer=tokenizer, instruction_prompt_templete=template)
            for i, sample in enumerate(SAMPLES):
                text = sample.get("instruction", "") + sample["input"]
                text, _ = data.extract_path_and_convert_token(text, "")
                ids, mask = data.InstructionDataset.multi_instrucions_tokenization(
                    own, [text], [sample["output"]]
                )
                found.append([kind, template, i, ids, mask])
    return found


def joined(data, tune, folder, max_img, turns, first, seed):
    """Return what becomes of a sample with others behind it, up to the labels of the loss."""
    tokenizer = peer.add_tokens(build_neox_tokenizer())
    plain = SAMPLES[:LEGACY]
    options = dict(max_img=max_img, multiturn_augmentation=turns)
    random.seed(seed)
    np.random.seed(seed)
    found = dataset(data, tokenizer, plain, folder, **options)
    wanted = next(i for i, s in enumerate(found.samples) if s["input"] == plain[first]["input"])
    drawn, choice = [], random.choice

    def noted(samples):
        sample = choice(samples)
        drawn.append(next(i for i, s in enumerate(plain) if s["input"] == sample["input"]))
        return sample

    data.random.choice = noted
    with contextlib.redirect_stdout(io.StringIO()):
        images, text, mask, _ = found[wanted]
    data.random.choice = choice
    length = int(text["attention_mask"].sum())
    labels = labels_of(tune, tokenizer, (images, text, mask))
    return dict(
        max_img=max_img,
        turns=turns,
        first=first,
        drawn=drawn,
        tokens=text["input_ids"][0, :length].tolist(),
        labels=labels[0, :length].tolist(),
        images=int((images.flatten(1) != 0).any(1).sum()),
    )


class Noted(torch.nn.Module):
    """A model that notes what it is called with, for train_one_epoch."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, **given):
        self.given = given
        return self.one * 1, None


def labels_of(tune, tokenizer, sample):
    """Return the labels that the train step gives to its model."""
    images, text, mask = sample
    batch = images[None], {k: v[None] for k, v in text.items()}, mask[None], None
    model = Noted()
    tune.train_one_epoch(
        step_settings(),
        model,
        epoch=0,
        dataloader=OneBatch([batch]),
        tokenizer=tokenizer,
        optimizer=torch.optim.SGD(model.parameters(), 0.0),
        lr_scheduler=SimpleNamespace(step=lambda: None),
        device_id="cpu",
        logger=None,
        tensorboard_writer=None,
        wandb=None,
    )
    return model.given["labels"]


class OneBatch(list):
    """Batches, and how many there are."""

    num_batches = 1


def step_settings(**changes):
    """Return the settings of a step of one process; nothing is logged."""
    torch.distributed.all_reduce = lambda *_, **__: None
    usual = dict(num_epochs=1, precision="fp32", fsdp=False, rank=1, world_size=1, device="cpu")
    steps = dict(gradient_accumulation_steps=1, logging_steps=10**9, freeze_lm_embeddings=True)
    return SimpleNamespace(**usual | steps | changes)


def legacy(data, folder):
    """Return the tokens of one sample at its first reading and at its second."""
    found = dataset(data, peer.add_tokens(build_neox_tokenizer()), SAMPLES[LEGACY:], folder)
    texts = [found[0][1] for _ in range(2)]
    return [t["input_ids"][0, : int(t["attention_mask"].sum())].tolist() for t in texts]


def shares(data, folder, mode, count):
    """Return how many samples of each dataset an epoch has."""
    random.seed(count)
    rows = [[SAMPLES[0]] * size for size in SIZES]
    options = dict(num_samples=count, dataset_sampling_mode=mode)
    found = dataset(data, build_neox_tokenizer(), rows, folder, **options)
    return [sum(s["dataset_idx"] == i for s in found.samples) for i in range(len(SIZES))]


def padded(data, width, height):
    """Return a picture's size, the colour, and the square it becomes."""
    np.random.seed(width)
    colour = np.random.randint(0, 256, 3).tolist()
    pixels = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    np.random.seed(width)
    chance, data.random.random = data.random.random, lambda: 0.0
    square = data.pad_image_to_square(Image.fromarray(pixels), is_train=True)
    data.random.random = chance
    return [width, height, colour, np.asarray(square).tolist()]


def looks(checkout, marks):
    """Return the image that each token sees in version 1, told by moving one image at a time."""
    path = os.path.join(checkout, "open_flamingo", "src_v1", "helpers.py")
    torch.manual_seed(0)
    module = peer.from_file(path, "clever_helpers_v1")
    attention = module.MaskedCrossAttention(dim=8, dim_visual=6)
    count, text = max(1, marks.count("i")), torch.randn(1, len(marks), 8)
    media = torch.randn(1, count, 3, 6)
    where = torch.tensor([[mark == "i" for mark in marks]])
    call = dict(media_locations=where, attend_previous=False)  # as FlamingoLayer calls it
    seen = np.full(len(marks), -1)
    with torch.no_grad():
        plain = attention(text, media, **call)
        for image in range(count):
            moved = media.clone()
            moved[:, image] += 1.0 + torch.randn(3, 6)
            changed = (attention(text, moved, **call) != plain).any(-1)[0].numpy()
            assert (seen[changed] == -1).all()
            seen[changed] = image
    return seen.tolist()


if __name__ == "__main__":
    main()
