"""Our side of each suite: what a user of mmjax runs, nothing prepared for the clock."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench import cases, environment
from bench.cases import Case, Size
from mmjax.types import MMJaxError

LEARNING_RATE = 1e-4


def fuyu_config(size: Size):
    """Return the configuration of a Fuyu of this size."""
    from mmjax.models.decoder import DecoderConfig
    from mmjax.models.fuyu.model import FuyuConfig

    decoder = DecoderConfig(
        vocab_size=size.vocab,
        d_model=size.d,
        num_layers=size.layers,
        num_heads=size.heads,
        num_kv_heads=size.heads,
        head_dim=size.d // size.heads,
        d_mlp=size.mlp,
    )
    return FuyuConfig(
        decoder=decoder,
        patch_size=size.patch,
        image_token_id=cases.IMAGE,
        eos_token_id=cases.EOS,
    )


def write_model(size: Size, folder: str) -> None:
    """Write a random model for a run without a peer; its rows have no parity and do not count."""
    import jax
    from flax import nnx

    from mmjax.models import converted, registry
    from mmjax.nn import paths
    from mmjax.parallel.mesh import use

    family = registry.family("fuyu")
    config = fuyu_config(size)
    with use():
        state = nnx.state(family.Model(config, rngs=nnx.Rngs(0)))
    params = {name: np.array(jax.device_get(x)) for name, x in paths.flatten(state).items()}
    params["decoder.head.kernel"][:, cases.EOS] = 0  # a greedy answer never ends early
    converted.save_model(folder, params, family=family, config=config)


class Train:
    """``mmjax.train.step`` as the training loop compiles it: AdamW, clipping, donation.

    impl: ``cases.UNROLLED`` compiles all layers as one iteration of the scan, a setting that
    recipes have at 1.
    """

    dtype: str | None = None  # of weights and computation; None for what mmjax.load takes

    def __init__(self, case: Case, folder: str, impl: str):
        import jax

        from mmjax.train import optim, step

        self.jax = jax
        settings = optim.OptimSettings(schedule="constant", warmup=0, **self.optimizer())
        tx = optim.make_optimizer(settings, 100)
        graphdef = self.start(case, folder, impl, tx)
        with self.use(self.mesh):
            schedule = optim.schedule(settings, 100)
            train_step = step.make_train_step(graphdef, tx, schedule, rows=self.rows(case))
            self.batch = jax.device_put(self.make_batch(case))
            begun = time.perf_counter()
            compiled = step.compile_step(train_step, self.state)
            self.compiled = compiled.lower(self.state, self.frozen, self.batch).compile()
            self.compile_s = time.perf_counter() - begun

    def start(self, case: Case, folder: str, impl: str, tx: Any) -> Any:
        """Set ``state``, ``frozen`` and ``mesh`` from the files; returns the model's graph."""
        from flax import nnx

        import mmjax
        from mmjax.nn import paths
        from mmjax.train import state

        loaded = mmjax.load(folder, dtype=self.dtype)
        if impl == cases.UNROLLED:
            loaded.model.decoder.scan_unroll = case.size.layers
        self.mesh = loaded.mesh
        names = self.trained(list(paths.flatten(nnx.state(loaded.model))))
        with self.use(self.mesh):
            graphdef, params, self.frozen = state.split(loaded.model, names)
        self.state = self.make_state(params, tx)
        return graphdef

    def make_state(self, params: Any, tx: Any) -> Any:
        """Return the state before the first step."""
        import jax.numpy as jnp

        from mmjax.train.state import TrainState

        jax = self.jax
        replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        with self.use(self.mesh):
            opt = jax.jit(tx.init)(params)
        opt = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, replicated), opt)
        return TrainState(jax.device_put(jnp.int32(0), replicated), params, opt)

    @staticmethod
    def use(mesh: Any) -> Any:
        """Return the context in which a mesh is used."""
        from mmjax.parallel.mesh import use

        return use(mesh)

    def optimizer(self) -> dict[str, Any]:
        """Return what differs from the defaults of ``OptimSettings``."""
        return {"lr": LEARNING_RATE}

    def trained(self, names: list[str]) -> set[str]:
        """Return the parameters that are trained."""
        return set(names)

    def rows(self, case: Case) -> dict[str, Any]:
        """Return the tables of which some rows alone are trained."""
        return {}

    def make_batch(self, case: Case) -> dict[str, np.ndarray]:
        """Make the batch of every step."""
        return cases.train_batch(case)

    def step(self) -> Any:
        """Do one optimizer step and wait for it."""
        with self.use(self.mesh):
            self.state, metrics = self.compiled(self.state, self.frozen, self.batch)
        self.jax.block_until_ready((self.state, metrics))
        return metrics

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the losses and gradient norms of the first four steps."""
        metrics = [self.step() for _ in range(4)]
        return {
            name: np.array([float(m[name]) for m in metrics], np.float64)
            for name in ("loss", "grad_norm")
        }


class Decode:
    """``LoadedModel.generate_tokens``, greedily, prompts of token ids with ready patches."""

    def __init__(self, case: Case, folder: str, impl: str):
        import mmjax

        self.model = mmjax.load(folder)
        self.examples = self.make_examples(case)
        self.new = case.options["new"]
        begun = time.perf_counter()
        self.step()
        self.compile_s = time.perf_counter() - begun

    def make_examples(self, case: Case) -> list[dict[str, np.ndarray]]:
        """Make the encoded prompts."""
        return [
            self.model.encode(tokens.tolist(), [patches])
            for tokens, patches in zip(*cases.decode_prompts(case), strict=True)
        ]

    def step(self) -> list[np.ndarray]:
        """Generate all answers."""
        return self.model.generate_tokens(self.examples, max_new_tokens=self.new)

    def outputs(self) -> dict[str, np.ndarray]:
        """Return the new tokens [b, new]."""
        return {"tokens": np.stack(self.step())}


class Input:
    """``FuyuProcessor.encode_prompt`` of one picture and one question.

    impl ``uint8 patches`` is what training and generation use, the model normalises; ``float
    patches`` also does the peer's normalisation, so that both return the same numbers.
    """

    def __init__(self, case: Case, folder: str, impl: str):
        from PIL import Image

        from mmjax.data.tokenizers_small import build_word_tokenizer
        from mmjax.models.fuyu.processor import FuyuProcessor

        self.processor = FuyuProcessor(tokenizer=build_word_tokenizer([cases.PROMPT]))
        self.image = Image.fromarray(cases.picture(case))
        self.floats = impl == "float patches"
        self.compile_s = 0.0

    def step(self) -> dict[str, np.ndarray]:
        """Encode the picture."""
        example = self.processor.encode_prompt(cases.PROMPT, [self.image])
        if self.floats:
            example["patches"] = self.processor.config.normalise(example["patches"])
        return example

    def outputs(self) -> dict[str, np.ndarray]:
        """Return tokens, and patches in grey levels."""
        example = self.step()
        patches = example["patches"].astype(np.float32)
        levels = (patches * 0.5 + 0.5) * 255 if self.floats else patches
        return {"tokens": example["tokens"], "levels": levels}


def check_gpu() -> None:
    """Raise MMJaxError when JAX has no CUDA GPU."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # some versions only assert
        raise MMJaxError(
            f"jax {jax.__version__} finds no CUDA GPU ({error or 'no platform'}); install "
            "jax[cuda13], or give --device cpu"
        ) from error


def versions() -> dict[str, str]:
    """Return the versions that matter on this side."""
    return environment.versions("jax", "jaxlib", "flax", "optax", "numpy", "pillow")
