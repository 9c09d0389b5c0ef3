"""The peer's side of the suites of Fuyu-8B: transformers and PEFT, as fast as they go."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import cases, fuyu8b, torch_peer
from bench.cases import Case, Size

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # fmt: skip


def write_model(size: Size, folder: str) -> None:
    """Write the small model, and an adapter of it, both its halves at work, in ``lora``."""
    torch_peer.write_model(fuyu8b.small(size), folder)
    model = _adapted(torch_peer.load(folder), fuyu8b.COMPARED)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(os.path.join(folder, "lora"))


def make_train(case: Case, folder: str, impl: str) -> Train:
    """Return the subject of a case of train_8b."""
    return Train(case, folder, impl)


def _adapted(model: Any, modules: tuple[str, ...]) -> Any:
    """Return a model with fresh adapters on some of the modules of its layers."""
    from peft import LoraConfig, get_peft_model

    # Not the output map of the image patches, nor anything else outside the layers.
    named = "|".join(modules)
    config = LoraConfig(
        r=fuyu8b.RANK, lora_alpha=fuyu8b.ALPHA, target_modules=rf".*\.layers\.\d+\..*\.({named})"
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _drawn(case: Case, attention: str) -> Any:
    """Return the case's own model, drawn on the device in the case's dtype."""
    from transformers import FuyuForCausalLM

    dtype = getattr(torch, case.options["dtype"])
    with torch.device(_device(case)):
        model = FuyuForCausalLM._from_config(
            torch_peer.fuyu_config(case.size), dtype=dtype, attn_implementation=attention
        )
    with torch.no_grad():
        model.lm_head.weight[cases.EOS] = 0  # an end would cut an answer short
    return model


def _device(case: Case) -> str:
    return "cuda" if case.device.startswith("gpu") else "cpu"


def _wait(case: Case) -> None:
    if _device(case) == "cuda":
        torch.cuda.synchronize()


class Step(torch_peer.TrainStep):
    """Loss on the targets of a batch, adapters trained; impl as in ``fuyu8b``."""

    rate = fuyu8b.RATE

    def __init__(self, case: Case, folder: str, impl: str):
        # A packed row is the peer's batch of documents: it has no mask for such rows.
        batch, device = cases.train_batch(case), _device(case)
        self.case, self.folder, self.impl = case, folder, impl
        self.ids = torch.from_numpy(batch["tokens"]).long().to(device)
        patches = torch.from_numpy(cases.normalised(batch["patches"]))
        self.patches = patches.to(device, getattr(torch, case.options["dtype"]))
        first = int(batch["target_index"][0, 0])
        self.keep = torch.arange(first - 1, self.ids.shape[1] - 1, device=device)
        self.labels = self.ids.clone()
        self.labels[:, :first] = -100
        self.build("fused")

    def load(self) -> list[dict[str, Any]]:
        """Make the model; returns the groups of what is trained."""
        self.model = self.make().train()
        return [{"params": [p for p in self.model.parameters() if p.requires_grad],
                 "weight_decay": 0.0}]  # fmt: skip

    def make(self) -> Any:
        """Return the model with its adapters."""
        from peft import PeftModel

        model = torch_peer.load(self.folder).to(_device(self.case))
        return PeftModel.from_pretrained(
            model, os.path.join(self.folder, "lora"), is_trainable=True,
            autocast_adapter_dtype=False,
        )  # fmt: skip

    def loss(self) -> torch.Tensor:
        """Return the loss, from all logits, or with ``gathered`` those alone that it needs."""
        inputs = {"input_ids": self.ids, "use_cache": False}
        inputs = torch_peer.with_patches(inputs, self.patches)
        if "gathered" not in self.impl:
            return self.model(**inputs, labels=self.labels).loss
        first = sdpa_kernel(CUDNN_FIRST, set_priority=True)
        with first if "cuDNN" in self.impl else contextlib.nullcontext():
            logits = self.model(**inputs, logits_to_keep=self.keep).logits
        targets = self.ids[:, self.keep + 1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Do one optimizer step and wait for it."""
        found = super().step()
        _wait(self.case)
        return found


class Train(Step):
    """The same of the case's own model, whose weights are drawn on the device."""

    def __init__(self, case: Case, folder: str, impl: str):
        torch.backends.cuda.matmul.allow_tf32 = False
        self.found = Step(fuyu8b.compared(case), folder, impl.replace("cuDNN ", "")).outputs()
        super().__init__(case, folder, impl)

    def make(self) -> Any:
        """Return the model with its adapters."""
        eager = self.impl == fuyu8b.EAGER
        model = _drawn(self.case, "eager" if eager else "sdpa")
        if eager:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        adapted = _adapted(model, fuyu8b.MODULES)
        if "compiled" in self.impl:
            (layers,) = (
                m for n, m in model.named_modules()
                if n.endswith(".layers") and isinstance(m, torch.nn.ModuleList)
            )  # fmt: skip
            for layer in layers:
                layer.compile(dynamic=False)
        return adapted

    def tune(self) -> None:
        """Keep the fused AdamW: adapters are few, and the model is large to build again."""

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the small model's losses and gradient norms of the first four steps."""
        return self.found


class Decode:
    """``generate``, greedily; impl as in ``fuyu8b``."""

    compile_s = 0.0

    def __init__(self, case: Case, folder: str, impl: str):
        torch.backends.cuda.matmul.allow_tf32 = False
        small = fuyu8b.compared(case)
        self.take(torch_peer.load(folder), small, fuyu8b.DYNAMIC)
        first = self.inputs["input_ids"].shape[1]
        self.found = self.step()[:, first:].cpu().numpy()
        self.take(_drawn(case, "sdpa"), case, impl)

    def take(self, model: Any, case: Case, impl: str) -> None:
        """Take a model and the prompts of a case."""
        device = _device(case)
        self.case, self.model = case, model.eval().to(device)
        tokens, patches = cases.decode_prompts(case)
        pixels = torch.from_numpy(patches).to(device, getattr(torch, case.options["dtype"]))
        ids = torch.from_numpy(tokens).long().to(device)
        inputs = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "max_new_tokens": case.options["new"], "do_sample": False,
        }  # fmt: skip
        self.inputs = torch_peer.with_patches(inputs, pixels)
        if impl == fuyu8b.STATIC:
            self.inputs["cache_implementation"] = "static"  # which compiles the decoding step

    def step(self) -> torch.Tensor:
        """Generate all answers and wait for them."""
        with torch.inference_mode():
            found = self.model.generate(**self.inputs)
        _wait(self.case)
        return found

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the small model's new tokens [b, new]."""
        return {"tokens": self.found}
