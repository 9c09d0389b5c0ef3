"""Our side of the suites of Fuyu-8B."""

from __future__ import annotations

import os
import time
import zlib
from typing import Any

import numpy as np

from bench import cases, fuyu8b, ours
from bench.cases import Case, Size


def write_model(size: Size, folder: str) -> None:
    """Write a small random model for a run without a peer; its rows have no parity."""
    ours.write_model(fuyu8b.small(size), folder)


def make_train(case: Case, folder: str, impl: str) -> Train:
    """Return the subject of a case of train_8b."""
    return (Adapters if case.options["trained"] == "lora" else Whole)(case, folder, impl)


class Small(ours.Train):
    """Adapters of the model that both sides read, trained in float32."""

    dtype = "float32"

    def optimizer(self) -> dict[str, Any]:
        """Return what differs from the defaults of ``OptimSettings``."""
        return {"lr": fuyu8b.RATE, "weight_decay": 0.0}

    def trained(self, names: list[str]) -> set[str]:
        """Return the parameters that are trained."""
        from mmjax.train.state import trainable_names

        return trainable_names(names, (), True)

    def make_batch(self, case: Case) -> dict[str, np.ndarray]:
        """Make the batch of every step."""
        return fuyu8b.train_batch(case)


class Train(ours.Train):
    """A train step of the case's own model, whose weights are drawn on the device."""

    def __init__(self, case: Case, folder: str, impl: str):
        self.case = case
        super().__init__(case, folder, impl)
        trained, frozen = (
            sum(x.size for x in self.jax.tree.leaves(tree))
            for tree in (self.state.params, self.frozen)
        )
        memory = self.compiled.memory_analysis()
        self.details = {
            "parameters": trained + frozen,
            "trained": trained,
            "argument_size_in_bytes": memory.argument_size_in_bytes,
            "temp_size_in_bytes": memory.temp_size_in_bytes,
        }

    def start(self, case: Case, folder: str, impl: str, tx: Any) -> Any:
        """Set ``state``, ``frozen`` and ``mesh``; returns the model's graph."""
        import jax
        from flax import nnx

        from mmjax.models import registry
        from mmjax.nn import paths
        from mmjax.nn.linear import DTypes
        from mmjax.parallel.mesh import make_mesh
        from mmjax.train import frozen, state

        self.mesh = make_mesh({}, jax.local_devices()[:1])
        family, config = registry.family("fuyu"), ours.fuyu_config(case.size)
        dtypes = DTypes("float32", case.options["dtype"])
        with self.use(self.mesh):

            def make() -> nnx.Module:
                return family.Model(config, rngs=nnx.Rngs(0), dtypes=dtypes, lora=self.lora())

            names = list(paths.flatten(nnx.state(nnx.eval_shape(make))))
            chosen = self.trained(names)
            graphdef, abstract, rest = state.abstract_state(make, chosen, tx, self.mesh)
            rest = frozen.cast_abstract(rest, case.options["dtype"])
            params, self.frozen = drawn(abstract.params), drawn(rest)
        self.state = self.make_state(params, tx)
        return graphdef

    def lora(self) -> Any:
        """Return the adapters, None for a model without."""
        return None

    def make_batch(self, case: Case) -> dict[str, np.ndarray]:
        """Make the batch of every step."""
        return fuyu8b.train_batch(case)


class Adapters(Train):
    """Adapters on every linear map of the layers, the model in the compute dtype."""

    def __init__(self, case: Case, folder: str, impl: str):
        import jax

        adapter, self.found = os.path.join(folder, "lora"), {}
        if os.path.isdir(adapter):  # without a peer there is none
            # The peer multiplies in true float32.
            with jax.default_matmul_precision("highest"):
                self.found = Small(fuyu8b.compared(case), adapter, "").outputs()
        super().__init__(case, folder, impl)

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the small model's losses and gradient norms of the first four steps."""
        return self.found

    optimizer = Small.optimizer
    trained = Small.trained

    def lora(self) -> Any:
        """Return the adapters."""
        from mmjax.nn.linear import LoRA

        maps = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
        return LoRA(fuyu8b.RANK, fuyu8b.ALPHA, maps)


class Whole(Train):
    """Every weight, float32 masters and Adafactor with its momentum in bfloat16."""

    def optimizer(self) -> dict[str, Any]:
        """Return what differs from the defaults of ``OptimSettings``."""
        return {"name": "adafactor", "lr": 1e-5}

    def outputs(self) -> dict[str, np.ndarray]:
        """Return nothing: there is no peer that would fit."""
        return {}


def drawn(abstract: Any) -> Any:
    """Return the arrays of an abstract tree, drawn one by one where they will lie.

    All at once, XLA would hold several of the largest in float32. Kernels and tables are small
    normal numbers, the rest ones: what a step costs does not depend on them.
    """
    import jax
    import jax.numpy as jnp

    from mmjax.nn.paths import map_named

    def draw(name: str, x: jax.ShapeDtypeStruct) -> jax.Array:
        def make(key: jax.Array) -> jax.Array:
            if name.endswith(("kernel", "embedding", "lora_a", "lora_b")) or "embed" in name:
                return 0.02 * jax.random.normal(key, x.shape, x.dtype)
            return jnp.ones(x.shape, x.dtype)

        key = jax.random.key(zlib.crc32(name.encode()), impl="rbg")
        return jax.jit(make, out_shardings=x.sharding)(key)

    return map_named(draw, abstract)


class Decode(ours.Decode):
    """``LoadedModel.generate_tokens``, greedily, of a model whose weights are drawn."""

    def __init__(self, case: Case, folder: str, impl: str):
        import jax

        import mmjax

        small = fuyu8b.compared(case)
        with jax.default_matmul_precision("highest"):
            self.model = mmjax.load(folder, dtype="float32")
            self.examples, self.new = self.make_examples(small), small.options["new"]
            self.found = super().outputs()
        self.model = self.full(case)
        self.examples, self.new = self.make_examples(case), case.options["new"]
        begun = time.perf_counter()
        self.step()
        self.compile_s = time.perf_counter() - begun

    def full(self, case: Case) -> Any:
        """Return the case's own model, with the processor of the small one."""
        import jax
        from flax import nnx

        from mmjax.loaded import LoadedModel
        from mmjax.models import registry
        from mmjax.nn import paths
        from mmjax.nn.linear import DTypes
        from mmjax.parallel.mesh import make_mesh, use
        from mmjax.parallel.sharding import parameter_shardings

        family, config = registry.family("fuyu"), ours.fuyu_config(case.size)
        mesh = make_mesh({}, jax.local_devices()[:1])
        dtypes = DTypes(case.options["dtype"], case.options["dtype"])
        with use(mesh):
            model = nnx.eval_shape(lambda: family.Model(config, rngs=nnx.Rngs(0), dtypes=dtypes))
            graphdef, abstract = nnx.split(model)
            places = paths.flatten(parameter_shardings(abstract, mesh))
            abstract = paths.map_named(
                lambda name, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name]),
                abstract,
            )
            model = nnx.merge(graphdef, drawn(abstract))
        # An end would cut an answer short.
        model.decoder.head.kernel[...] = model.decoder.head.kernel[...].at[:, cases.EOS].set(0)
        return LoadedModel(family.name, config, model, self.model.processor, mesh)

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the small model's new tokens [b, new]."""
        return self.found
