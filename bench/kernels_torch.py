"""The peer's side of the attention and loss suites: PyTorch's own operators."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import kernels
from bench.cases import Case

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def _place(case: Case, array: np.ndarray) -> torch.Tensor:
    device = "cuda" if case.device == "gpu" else "cpu"
    found = torch.from_numpy(array).to(device)
    return found.to(getattr(torch, case.options["dtype"])) if found.is_floating_point() else found


def _wait(case: Case) -> None:
    if case.device == "gpu":
        torch.cuda.synchronize()


class Attention:
    """``scaled_dot_product_attention`` on contiguous [b, n, t, h], its own layout.

    impl: ``sdpa`` leaves the choice of a backend to torch, ``flash`` and ``cudnn`` make it; packed
    rows run under a ``block-diagonal mask`` or as ``a call for each document``.
    """

    compile_s = 0.0

    def __init__(self, case: Case, folder: str, impl: str):
        self.case = case
        inputs = kernels.attention_inputs(case)
        segments = _place(case, inputs.pop("segment_ids"))
        *qkv, self.cotangent = (
            _place(case, x).transpose(1, 2).contiguous() for x in inputs.values()
        )
        backward = case.options["backward"]
        self.qkv = [x.requires_grad_(backward) for x in qkv]
        self.mask, self.documents = None, [case.options["t"]]
        if impl == "block-diagonal mask":
            same = segments[:, None, :, None] == segments[:, None, None, :]
            self.mask = same.tril()
        elif impl == "a call for each document":
            self.documents = case.options["documents"]
        chosen = BACKENDS.get(impl)
        self.backend = lambda: sdpa_kernel([chosen]) if chosen else contextlib.nullcontext()

    def _forward(self) -> torch.Tensor:
        if self.mask is not None:
            return functional.scaled_dot_product_attention(*self.qkv, attn_mask=self.mask)
        parts = zip(*(x.split(self.documents, 2) for x in self.qkv), strict=True)
        outs = [functional.scaled_dot_product_attention(*p, is_causal=True) for p in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _once(self) -> tuple[torch.Tensor, ...]:
        if not self.case.options["backward"]:
            with torch.no_grad():
                return (self._forward(),)
        out = self._forward()
        return out.detach(), *torch.autograd.grad(out, self.qkv, self.cotangent)

    def step(self) -> tuple[torch.Tensor, ...]:
        """Call it ``calls`` times and wait for the last."""
        with self.backend():
            for _ in range(self.case.options["calls"]):
                found = self._once()
        _wait(self.case)
        return found

    @property
    def calls(self) -> int:
        return self.case.options["calls"]

    def outputs(self) -> dict[str, np.ndarray]:
        """Return samples of the output and of the gradients of q, k and v."""
        return {
            name: kernels.attention_sample(x.transpose(1, 2)).float().cpu().numpy()
            for name, x in zip(("out", "dq", "dk", "dv"), self.step(), strict=False)
        }


class Loss:
    """``cross_entropy`` in float32 on ``linear``.

    impl ``all logits`` computes those of every token, with labels -100 where there is no target;
    ``gathered logits`` takes the supervised rows first.
    """

    compile_s = 0.0

    def __init__(self, case: Case, folder: str, impl: str):
        self.case = case
        arrays = kernels.loss_inputs(case)
        self.hidden = _place(case, arrays["hidden"]).requires_grad_()
        self.weight = _place(case, arrays["head"]).T.contiguous().requires_grad_()
        self.index = _place(case, arrays["index"]).long()
        self.labels = _place(case, arrays["labels"]).long()
        self.gathered = impl == "gathered logits"
        if not self.gathered:
            every = torch.full((case.options["tokens"],), -100, device=self.labels.device)
            every[self.index] = self.labels
            self.labels = every

    def step(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the loss and the gradients of hidden states and weight."""
        rows = self.hidden[self.index] if self.gathered else self.hidden
        logits = functional.linear(rows, self.weight).float()
        loss = functional.cross_entropy(logits, self.labels)
        gradients = torch.autograd.grad(loss, (self.hidden, self.weight))
        _wait(self.case)
        return loss.detach(), *gradients

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the loss, the gradient of the hidden states and a sample of the weight's."""
        loss, hidden, weight = self.step()
        return {
            "loss": loss.float().cpu().numpy(),
            "hidden": hidden.float().cpu().numpy(),
            "head": kernels.loss_sample(weight.T).float().cpu().numpy(),
        }
