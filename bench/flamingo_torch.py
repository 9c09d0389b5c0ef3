"""The peer's side of the flamingo suite: OpenFlamingo's own code, in an environment of its own."""

from __future__ import annotations

import json
import os

import numpy as np
import torch

from bench import flamingo, torch_peer
from bench.cases import Case, FlamingoSize
from tests.golden import flamingo_peer

FACTORY = flamingo_peer.import_peer()  # before transformers, which would stumble over torchvision
TWICE = (".old_decoder_blocks.", ".gated_cross_attn_layers.")
"""Parts of names of tensors that stand in the layers too."""


def write_model(size: FlamingoSize, folder: str) -> None:
    """Write the whole state dict of a random model, and the language model that it is built on.

    Every tensor is at work, gates too. The rows of <|endofchunk|> and <image> are short, and they
    are those of the head as well: a greedy answer has neither, so it never ends early, and every
    run generates the same number of tokens.
    """
    from safetensors.torch import save_file

    os.makedirs(os.path.join(folder, "lm"))
    _write_language_model(size, os.path.join(folder, "lm"))
    model = _create(size, folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("gate"):
                p.fill_(0.7 if "attn" in name else -0.4)
            elif "wte" in name:
                p.copy_(0.1 * noise)
                p[[size.eoc, size.media]] *= 0.25
            elif p.ndim > 1:
                p.copy_(noise * (p.numel() / p.shape[0]) ** -0.5)
            elif name.endswith("weight"):
                # Of both signs in the last norm: its table is the head too, and the likeliest next
                # token would always be the last one again.
                p.copy_(noise if "norm_f" in name else 1 + 0.2 * noise)
            else:
                p.copy_(0.1 * noise)
    state = {k: v.clone() for k, v in model.state_dict().items() if not _twice(k)}
    save_file(state, os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(flamingo.config_json(size), file)


def _twice(name: str) -> bool:
    return any(part in name for part in TWICE)


def _write_language_model(size: FlamingoSize, folder: str) -> None:
    """Write a random MPT and a tokenizer; the factory adds three tokens to both."""
    from tokenizers import Tokenizer, models
    from transformers import MptConfig, MptForCausalLM, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(size.eoc)}
    core = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", eos_token="w1")
    tokenizer.save_pretrained(folder)
    text = flamingo.config_json(size)["text_config"] | {"vocab_size": size.eoc, "eos_token_id": 1}
    del text["model_type"]
    MptForCausalLM(MptConfig(**text)).save_pretrained(folder)


def _create(size: FlamingoSize, folder: str):
    """Return the peer's model as its factory makes it."""
    import open_clip

    name = f"ViT-{size.image}-{size.tower_d}"
    tower = {
        "image_size": size.image,
        "patch_size": size.patch,
        "width": size.tower_d,
        "layers": size.tower_layers,
        "head_width": size.tower_d // size.tower_heads,
    }
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": tower, "text_cfg": text}
    with open(os.path.join(folder, f"{name}.json"), "w") as file:
        json.dump(config, file)
    open_clip.add_model_config(os.path.join(folder, f"{name}.json"))
    lm = os.path.join(folder, "lm")
    model, _, tokenizer = FACTORY.create_model_and_transforms(
        clip_vision_encoder_path=name,
        clip_vision_encoder_pretrained=None,
        lang_encoder_path=lm,
        tokenizer_path=lm,
        cross_attn_every_n_layers=size.every,
        use_local_files=True,
    )
    ids = (model.eoc_token_id, model.media_token_id, tokenizer.pad_token_id)
    if ids != (size.eoc, size.media, size.pad):
        raise ValueError(f"the factory's token ids are {ids}, not the last of {size.vocab}")
    model.vision_encoder.final_ln_after_pool = True  # as in open_clip when the models were made
    model.lang_encoder.generation_config.pad_token_id = size.pad
    return model


def _load(size: FlamingoSize, folder: str):
    from safetensors.torch import load_file

    model = _create(size, folder)
    found = model.load_state_dict(
        load_file(os.path.join(folder, "model.safetensors")), strict=False
    )
    missing = [name for name in found.missing_keys if not _twice(name)]
    if missing or found.unexpected_keys:
        raise ValueError(f"missing {missing}, unexpected {found.unexpected_keys}")
    return model


def _pixels(levels: np.ndarray, size: FlamingoSize) -> torch.Tensor:
    """Turn grey levels [..., H*W*3] into the peer's normalised pixels [..., 1, 3, H, W]."""
    import open_clip

    images = levels.reshape(*levels.shape[:-1], size.image, size.image, 3).astype(np.float32)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    normalised = (images / 255.0 - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(np.moveaxis(normalised, -1, -3)[..., None, :, :, :].copy())


def make(case: Case, folder: str, impl: str) -> Train | Decode:
    """Return the subject of a case."""
    return (Train if case.options["kind"] == "train" else Decode)(case, folder, impl)


class Train(torch_peer.TrainStep):
    """A step of its training loop on one batch: forward with labels, backward, the mask of the
    embedding's gradient, clipping, AdamW."""

    rate = flamingo.LEARNING_RATE

    def __init__(self, case: Case, folder: str, impl: str):
        batch, self.size, self.folder = flamingo.train_batch(case), case.size, folder
        self.ids = torch.from_numpy(batch["tokens"]).long()
        self.vision = _pixels(batch["patches"], case.size)
        self.labels = torch.full_like(self.ids, -100)
        for row, index in enumerate(batch["target_index"]):
            some = torch.from_numpy(index[index > 0]).long()
            self.labels[row, some] = self.ids[row, some]
        self.build("plain")

    def load(self) -> list[dict]:
        """Make the model; returns the groups of what is trained."""
        self.model = _load(self.size, self.folder).train()
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        return [
            {"params": [p for n, p in named if ("gated_cross_attn" in n) == gated],
             "weight_decay": flamingo.WEIGHT_DECAY * gated}
            for gated in (True, False)
        ]  # fmt: skip

    def loss(self) -> torch.Tensor:
        """Return the loss as the peer computes it."""
        return self.model(
            vision_x=self.vision,
            lang_x=self.ids,
            attention_mask=torch.ones_like(self.ids),
            labels=self.labels,
        )[0]

    def edit(self) -> None:
        """Keep the gradients of two rows of the embedding."""
        table = self.model.lang_encoder.get_input_embeddings().weight
        mask = torch.zeros_like(table.grad)
        mask[self.size.media] = 1
        mask[self.size.eoc] = 1
        table.grad = table.grad * mask


class Decode:
    """``Flamingo.generate``, greedily, of left-padded prompts."""

    def __init__(self, case: Case, folder: str, impl: str):
        size, examples = case.size, flamingo.prompts(case)
        self.model = _load(size, folder).eval()
        b, t = len(examples), max(len(e["tokens"]) for e in examples)
        self.ids = torch.full((b, t), size.pad)
        self.vision = torch.zeros(b, case.options["images"], 1, 3, size.image, size.image)
        for row, e in enumerate(examples):
            self.ids[row, t - len(e["tokens"]) :] = torch.from_numpy(e["tokens"])
            self.vision[row, : len(e["patches"])] = _pixels(e["patches"], size)
        self.options = {"max_new_tokens": case.options["new"], "do_sample": False}
        if impl == flamingo.CACHE:
            self.options["use_cache"] = True
        elif self.model.lang_encoder.generation_config.use_cache is not False:
            raise ValueError("this MPT uses its cache unless told not to; the row would be wrong")
        self.compile_s = 0.0

    def step(self) -> torch.Tensor:
        """Generate all answers."""
        mask = (self.ids != self.model.lang_encoder.generation_config.pad_token_id).long()
        with torch.inference_mode():
            return self.model.generate(self.vision, self.ids, attention_mask=mask, **self.options)

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the new tokens [b, new]."""
        return {"tokens": self.step()[:, self.ids.shape[1] :].numpy()}
