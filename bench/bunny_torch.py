"""The peer's side of the bunny suite: the classes of transformers that Bunny's own are made of.

Bunny's code does not run with today's transformers. It derives from PhiForCausalLM, takes features
from a SiglipVisionModel, maps them with a torch Sequential, and hands the joined stream to the
language model as inputs_embeds; the same is done here.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import nn

from bench import bunny, cases, torch_peer
from bench.bunny import PROJECTOR, TOWER
from bench.cases import BunnySize, Case

write_model = bunny.write_model


class Parts(nn.Module):
    """A merged model's language model, tower and projector."""

    def __init__(self, size: BunnySize, folder: str):
        from safetensors.torch import load_file
        from transformers import (
            PhiConfig,
            PhiForCausalLM,
            SiglipVisionConfig,
            SiglipVisionModel,
        )

        super().__init__()
        sdpa = {"attn_implementation": "sdpa"}
        self.llm = PhiForCausalLM(PhiConfig(**bunny.phi_config(size), **sdpa))
        self.llm.lm_head.bias = None  # Bunny's has none
        self.tower = SiglipVisionModel(SiglipVisionConfig(**bunny.siglip_config(size), **sdpa))
        self.projector = nn.Sequential(
            nn.Linear(size.tower_d, size.d), nn.GELU(), nn.Linear(size.d, size.d)
        )
        state = load_file(os.path.join(folder, "model.safetensors"))
        for part, root in ((self.tower, f"{TOWER}vision_model."), (self.projector, PROJECTOR)):
            part.load_state_dict(
                {k.removeprefix(root): state.pop(k) for k in list(state) if k.startswith(root)}
            )
        self.llm.load_state_dict(state)
        # hidden_states[-2] is asked for. As in Bunny's first release, what is behind it is not
        # computed.
        self.tower.encoder.layers = self.tower.encoder.layers[:-1]
        self.tower.post_layernorm = nn.Identity()
        self.tower.requires_grad_(False)

    def embed(self, ids: torch.Tensor, shown: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Return the stream [b, t, d]: projected features where ``shown`` is, else text."""
        with torch.no_grad():
            features = self.tower(pixels).last_hidden_state
        text = self.llm.get_input_embeddings()(ids)
        return text.masked_scatter(shown[..., None], self.projector(features))


def _pixels(levels: np.ndarray, size: BunnySize) -> torch.Tensor:
    """Turn grey levels [b, H*W*3] into normalised pixels [b, 3, H, W], with a mean of 0.5."""
    images = cases.normalised(levels).reshape(-1, size.image, size.image, 3)
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


def make(case: Case, folder: str, impl: str) -> Train | Decode:
    """Return the subject of a case."""
    return (Train if case.options["kind"] == "train" else Decode)(case, folder, impl)


class Train(torch_peer.TrainStep):
    """Bunny's second stage on one batch.

    impl ``sdpa`` is what Bunny does: the padding's mask, and logits of all tokens. ``gathered
    logits`` computes those alone that the loss needs, and no mask: causality hides what is padded
    on the right. ``compiled layers`` compiles each layer besides.
    """

    def __init__(self, case: Case, folder: str, impl: str):
        batch, self.size, self.folder = bunny.train_batch(case), case.size, folder
        self.impl, self.trained = impl, case.options["trained"]
        self.rate = bunny.TRAINED[self.trained]["lr"]
        self.ids = torch.from_numpy(batch["tokens"]).long()
        self.shown = torch.from_numpy(batch["visual_index"] >= 0)
        self.mask = torch.from_numpy(batch["segment_ids"]).long()
        self.pixels = _pixels(batch["patches"][:, 0], case.size)
        index = torch.from_numpy(batch["target_index"]).long()
        self.rows, place = torch.where(index >= 0)
        self.before = index[self.rows, place] - 1
        self.labels = torch.full_like(self.ids, -100)
        self.labels[self.rows, self.before + 1] = self.ids[self.rows, self.before + 1]
        self.build("fused")

    def load(self) -> list[dict]:
        """Make the model; returns the groups of what is trained."""
        self.model = Parts(self.size, self.folder).train()
        if self.trained == "lora":
            from peft import PeftModel

            # Adapters are put into the model's own modules.
            adapter = os.path.join(self.folder, "lora")
            PeftModel.from_pretrained(self.model.llm, adapter, is_trainable=True)
        if self.impl == bunny.COMPILED:
            for layer in (*self.model.llm.model.layers, *self.model.tower.encoder.layers):
                layer.compile(dynamic=False)
        llm = [p for p in self.model.llm.parameters() if p.requires_grad]
        rate = bunny.TRAINED[self.trained]["projector_lr"]
        return [
            {"params": llm, "weight_decay": 0.0},
            {"params": list(self.model.projector.parameters()), "lr": rate, "weight_decay": 0.0},
        ]

    def loss(self) -> torch.Tensor:
        """Return the mean loss over all targets."""
        llm = self.model.llm
        stream = self.model.embed(self.ids, self.shown, self.pixels)
        if self.impl == bunny.SDPA:
            return llm(
                inputs_embeds=stream, attention_mask=self.mask, labels=self.labels, use_cache=False
            ).loss
        hidden = llm.model(inputs_embeds=stream, use_cache=False).last_hidden_state
        logits = llm.lm_head(hidden[self.rows, self.before])
        return nn.functional.cross_entropy(logits, self.ids[self.rows, self.before + 1])


class Decode:
    """``generate``, greedily, of left-padded prompts, with its default cache."""

    def __init__(self, case: Case, folder: str, impl: str):
        size, examples = case.size, bunny.prompts(case)
        self.model = Parts(size, folder).eval()
        b, t = len(examples), max(len(e["tokens"]) for e in examples)
        self.ids = torch.zeros(b, t, dtype=torch.long)
        self.mask, self.shown = torch.zeros_like(self.ids), torch.zeros(b, t, dtype=torch.bool)
        for row, e in enumerate(examples):
            first = t - len(e["tokens"])
            self.ids[row, first:] = torch.from_numpy(e["tokens"])
            self.shown[row, first:] = torch.from_numpy(e["visual_index"] >= 0)
            self.mask[row, first:] = 1
        self.pixels = _pixels(np.concatenate([e["patches"] for e in examples]), size)
        self.options = {
            "max_new_tokens": case.options["new"],
            "do_sample": False,
            "pad_token_id": cases.EOS,
        }
        self.compile_s = 0.0

    def step(self) -> torch.Tensor:
        """Generate all answers, the images encoded anew."""
        with torch.inference_mode():
            stream = self.model.embed(self.ids, self.shown, self.pixels)
            return self.model.llm.generate(
                inputs_embeds=stream, attention_mask=self.mask, **self.options
            )

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the new tokens [b, new]."""
        return {"tokens": self.step().numpy()}
