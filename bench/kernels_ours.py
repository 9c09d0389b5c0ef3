"""Our side of the attention and loss suites."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench import kernels
from bench.cases import Case


class _Compiled:
    """A program that is compiled once and called with the same arrays."""

    calls = 1

    def _compile(self, function, arguments: tuple) -> None:
        import jax

        self.jax, self.arguments = jax, arguments
        begun = time.perf_counter()
        self.compiled = jax.jit(function).lower(*arguments).compile()
        self.compile_s = time.perf_counter() - begun
        memory = self.compiled.memory_analysis()
        self.details = {"temp_size_in_bytes": memory.temp_size_in_bytes}

    def step(self) -> Any:
        """Call it ``calls`` times and wait for the last; a device runs them one after another."""
        for _ in range(self.calls):
            found = self.compiled(*self.arguments)
        return self.jax.block_until_ready(found)


class Attention(_Compiled):
    """``mmjax.ops.attention.attention``; impl is its implementation."""

    def __init__(self, case: Case, folder: str, impl: str):
        import jax
        import jax.numpy as jnp

        from mmjax.ops import ranges
        from mmjax.ops.attention import attention

        self.calls = case.options["calls"]
        inputs = kernels.attention_inputs(case)
        segments = jnp.asarray(inputs.pop("segment_ids"))
        *qkv, cotangent = (jnp.asarray(x, case.options["dtype"]) for x in inputs.values())
        # As a model does: ranges once a batch, and none where rows hold one document.
        found = ranges.from_segments(segments) if case.options["documents"] else (None, None)

        def forward(q, k, v, start, end):
            return attention(q, k, v, k_start=start, k_end=end, implementation=impl)

        def both(q, k, v, start, end, cotangent):
            out, pull = jax.vjp(lambda *a: forward(*a, start, end), q, k, v)
            return out, *pull(cotangent)

        if case.options["backward"]:
            self._compile(both, (*qkv, *found, cotangent))
        else:
            self._compile(lambda *a: (forward(*a),), (*qkv, *found))

    def outputs(self) -> dict[str, np.ndarray]:
        """Return samples of the output and of the gradients of q, k and v."""
        return {
            name: np.asarray(kernels.attention_sample(x).astype("float32"))
            for name, x in zip(("out", "dq", "dk", "dv"), self.step(), strict=False)
        }


class Loss(_Compiled):
    """``chunked_nll`` of the supervised rows alone, as ``mmjax.train.loss`` calls it."""

    def __init__(self, case: Case, folder: str, impl: str):
        import jax
        import jax.numpy as jnp

        from mmjax.ops import xent

        inputs = kernels.loss_inputs(case)
        hidden, head = (jnp.asarray(inputs[k], case.options["dtype"]) for k in ("hidden", "head"))
        index, labels = jnp.asarray(inputs["index"]), jnp.asarray(inputs["labels"])
        weights = jnp.ones(labels.shape, jnp.float32)
        chunk = xent.chunk_rows(head.shape[-1])

        def mean(hidden, head, index, labels, weights):
            def logits(rows):
                return (rows @ head).astype(jnp.float32)

            return (
                xent.chunked_nll(logits, hidden[index], labels, weights, chunk=chunk)
                / weights.sum()
            )

        gradient = jax.value_and_grad(mean, argnums=(0, 1))
        self._compile(gradient, (hidden, head, index, labels, weights))

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the loss, the gradient of the hidden states and a sample of the head's."""
        loss, (hidden, head) = self.step()
        return {
            "loss": np.asarray(loss),
            "hidden": np.asarray(hidden.astype("float32")),
            "head": np.asarray(kernels.loss_sample(head).astype("float32")),
        }
