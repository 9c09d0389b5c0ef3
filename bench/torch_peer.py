"""The peer's side of each suite: transformers' Fuyu in PyTorch, in its faster settings."""

from __future__ import annotations

import inspect
import time
import warnings
from typing import Any

import numpy as np
import torch

from bench import cases, environment
from bench.cases import Case, Size
from bench.ours import LEARNING_RATE
from mmjax.types import MMJaxError

ADAMW = {"plain": {}, "fused": {"fused": True}, "foreach": {"foreach": True}}


def fuyu_config(size: Size) -> Any:
    """Return the peer's configuration of a Fuyu of this size."""
    from transformers import FuyuConfig

    rope = {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5}
    text = dict(
        model_type="persimmon",
        vocab_size=size.vocab,
        hidden_size=size.d,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=cases.EOS,
        pad_token_id=0,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rope_parameters=rope,
    )
    # The width at the top too: 5.17 makes the patch projection as wide as that says.
    return FuyuConfig(
        text_config=text, hidden_size=size.d, patch_size=size.patch, image_token_id=cases.IMAGE
    )


def write_model(size: Size, folder: str) -> None:
    """Write a random model with the peer's own save_pretrained.

    Every parameter is random, biases and norms too. The head's row of the end token is zero: a
    greedy answer never ends early, so every run generates the same number of tokens.
    """
    from transformers import FuyuForCausalLM

    torch.manual_seed(0)
    model = FuyuForCausalLM(fuyu_config(size))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
        model.lm_head.weight[cases.EOS] = 0
    model.save_pretrained(folder)


def with_patches(inputs: dict[str, Any], patches: torch.Tensor) -> dict[str, Any]:
    """Return a model's inputs with the patches under the name that its forward has for them."""
    from transformers import FuyuForCausalLM

    # An older one, image_patches; under another name they would be left out without a word.
    known = inspect.signature(FuyuForCausalLM.forward).parameters
    return inputs | {"pixel_values" if "pixel_values" in known else "image_patches": patches}


def load(folder: str) -> Any:
    """Load a model that ``write_model`` wrote, in float32."""
    from transformers import FuyuForCausalLM

    return FuyuForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)


class TrainStep:
    """Loss, backward, clip_grad_norm_, AdamW in whichever of torch's forms is fastest.

    A subclass has ``load``, which makes its model and returns the optimizer's groups, ``loss`` and
    ``rate``, and ends its __init__ with ``build``; ``edit`` may change the gradients.
    """

    rate, compile_s = LEARNING_RATE, 0.0

    def build(self, adamw: str) -> None:
        """Start again from the files, with one of ``ADAMW``."""
        self.adamw, groups = adamw, self.load()
        self.clipped = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, **ADAMW[adamw])

    def load(self) -> list[dict[str, Any]]:
        """Make the model; returns the groups of what is trained."""
        raise NotImplementedError

    def loss(self) -> torch.Tensor:
        """Return the loss of the batch."""
        raise NotImplementedError

    def edit(self) -> None:
        """Change gradients before they are clipped."""

    def tune(self) -> None:
        """Choose the fastest AdamW."""
        seconds = {}
        for adamw in ADAMW:
            self.build(adamw)
            times = []
            for _ in range(4):
                begun = time.perf_counter()
                self.step()
                times.append(time.perf_counter() - begun)
            seconds[adamw] = min(times[1:])
        self.build(min(seconds, key=seconds.get))

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Do one optimizer step; returns (loss, gradient norm)."""
        loss = self.loss()
        loss.backward()
        self.edit()
        norm = torch.nn.utils.clip_grad_norm_(self.clipped, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the losses and gradient norms of the first four steps."""
        pairs = [self.step() for _ in range(4)]
        return {
            name: np.array([float(pair[i]) for pair in pairs])
            for i, name in enumerate(("loss", "grad_norm"))
        }

    @property
    def note(self) -> str:
        return f"AdamW {self.adamw}"


class Train(TrainStep):
    """A train step of transformers' Fuyu."""

    def __init__(self, case: Case, folder: str, impl: str):
        batch = cases.train_batch(case)
        self.folder, self.gathered = folder, "gathered" in impl
        self.ids = torch.from_numpy(batch["tokens"]).long()
        self.patches = torch.from_numpy(cases.normalised(batch["patches"]))
        first = int(batch["target_index"][0, 0])
        self.keep = torch.arange(first - 1, self.ids.shape[1] - 1)
        self.labels = self.ids.clone()
        self.labels[:, :first] = -100
        self.build("fused")

    def load(self) -> list[dict[str, Any]]:
        """Make the model; returns the groups of what is trained."""
        self.model = load(self.folder).train()
        named = list(self.model.named_parameters())
        decayed = [p for n, p in named if p.ndim > 1 and "embed_tokens" not in n]
        others = [p for n, p in named if p.ndim < 2 or "embed_tokens" in n]
        return [
            {"params": decayed, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0.0},
        ]

    def loss(self) -> torch.Tensor:
        """Return the loss, from all logits or those alone that it needs."""
        inputs = with_patches({"input_ids": self.ids, "use_cache": False}, self.patches)
        if not self.gathered:
            return self.model(**inputs, labels=self.labels).loss
        logits = self.model(**inputs, logits_to_keep=self.keep).logits
        targets = self.ids[:, self.keep + 1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Decode:
    """``generate``, greedily, with its default cache."""

    def __init__(self, case: Case, folder: str, impl: str):
        self.model = load(folder).eval()
        tokens, patches = cases.decode_prompts(case)
        inputs = {
            "input_ids": torch.from_numpy(tokens).long(),
            "attention_mask": torch.ones(tokens.shape, dtype=torch.long),
        }
        self.inputs = with_patches(inputs, torch.from_numpy(patches))
        self.new, self.compile_s = case.options["new"], 0.0

    def step(self) -> torch.Tensor:
        """Generate all answers."""
        with torch.inference_mode():
            return self.model.generate(**self.inputs, max_new_tokens=self.new, do_sample=False)

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the new tokens [b, new]."""
        return {"tokens": self.step()[:, self.inputs["input_ids"].shape[1] :].numpy()}


class Input:
    """``FuyuProcessor`` of one picture and one question.

    impl ``Pillow`` is the image processor without torchvision, ``torchvision`` the default one.
    """

    def __init__(self, case: Case, folder: str, impl: str):
        from PIL import Image
        from transformers import FuyuProcessor

        from mmjax.data.tokenizers_small import build_word_tokenizer

        make = pillow_processor if impl == "Pillow" else _torchvision_processor
        self.processor = FuyuProcessor(make(), build_word_tokenizer([cases.PROMPT]))
        self.image = Image.fromarray(cases.picture(case))
        self.compile_s = 0.0

    def step(self) -> Any:
        """Encode the picture."""
        return self.processor(
            images=self.image, text=cases.PROMPT, return_legacy_image_output=False
        )

    def outputs(self) -> dict[str, np.ndarray]:
        """Return tokens, and patches in grey levels."""
        out = self.step()
        patches = out["pixel_values"].numpy()
        levels = (patches.reshape(-1, patches.shape[-1]) * 0.5 + 0.5) * 255
        return {"tokens": out["input_ids"][0].numpy(), "levels": levels}


def pillow_processor():
    """Return the peer's image processor without torchvision."""
    from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

    class Bridged(FuyuImageProcessorPil):
        """Its patchify takes numpy, and FuyuProcessor hands it tensors."""

        def patchify_image(self, image, patch_size=None):
            return torch.from_numpy(super().patchify_image(image.numpy(), patch_size))

    return Bridged()


def _torchvision_processor():
    import torchvision  # noqa: F401  # a clear error where it is not there
    from transformers import FuyuImageProcessor

    return FuyuImageProcessor()


def check_gpu() -> None:
    """Raise MMJaxError when torch has no CUDA GPU."""
    if not torch.cuda.is_available():
        raise MMJaxError(
            f"torch {torch.__version__} finds no CUDA GPU; install one built for CUDA, or give "
            "--device cpu"
        )


def versions() -> dict[str, str]:
    """Return the versions that matter on this side."""
    found = environment.versions(
        "torch", "transformers", "peft", "torchvision", "pillow", "open-flamingo", "open_clip_torch"
    )
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def set_threads(count: int) -> None:
    """Use this many threads inside operators."""
    torch.set_num_threads(count)
    warnings.filterwarnings("ignore", module="transformers")
