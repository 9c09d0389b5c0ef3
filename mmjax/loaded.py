"""A model that is loaded: prompts and images in every form, answers and logits."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from mmjax.data.tokenize import token_id
from mmjax.data.turns import Template
from mmjax.generate.beam import Beams
from mmjax.generate.constraints import Constraints
from mmjax.generate.likelihood import Continuations, log_likelihoods
from mmjax.generate.loop import Generator, check_cache_dtype, check_settings, pad_batch
from mmjax.generate.sampling import Sampling
from mmjax.models.api import Config, Processor
from mmjax.parallel.mesh import use
from mmjax.prompts import (
    Images,
    Prompt,
    as_record,
    asking_template,
    image_list,
    is_conversation,
    pair,
)
from mmjax.types import Example, ImageSource, MMJaxError


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its weights and its processor.

    family: name of its family. config: its sizes. model: the NNX module; call it inside
    ``mmjax.parallel.mesh.use(mesh)``. processor: text and images to tokens and back. ends: tokens
    that end an answer beside those of the config, as generation_config.json states them. beside:
    bytes that stay on each device beside the model, as an optimizer's state while a run trains
    or a second model.
    generation: generation_config.json, which an export takes along; of it ``ends`` alone count
    here. template: the name of the template that its run asked its tasks in, as far as it is known.
    """

    family: str
    config: Config
    model: nnx.Module
    processor: Processor
    mesh: jax.sharding.Mesh
    ends: tuple[int, ...] = ()
    beside: int = 0
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    template: str | None = None

    @cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(self.model)

    def encode(
        self, prompt: Prompt, images: Images = None, *, template: str | Template | None = None
    ) -> Example:
        """Encode one prompt: a string, or token ids that are used as they are.

        images: one image or a list: paths, bytes, PIL images, uint8 arrays, or processed float
            arrays. template: see ``generate``. Raises MMJaxError for token ids outside the
            vocabulary.
        """
        example = self._encoded(prompt, image_list(images), template)
        size = self.config.vocab_size
        if not len(example["tokens"]):
            raise MMJaxError("the prompt is empty: give it at least one token")
        low, high = example["tokens"].min(), example["tokens"].max()
        worst = low if low < 0 else high
        if not 0 <= worst < size:
            raise MMJaxError(
                f"the prompt holds token id {worst}, outside the model's vocabulary of {size}; "
                "its tokenizer belongs to another model"
            )
        return example

    def _encoded(
        self, prompt: Prompt, images: list[ImageSource], template: str | Template | None
    ) -> Example:
        if template is None:
            if is_conversation(prompt):
                raise MMJaxError(
                    "the prompt is a conversation: give the template that lays it out, the one "
                    f"this model was trained in{f', {self.template}' if self.template else ''}"
                )
            return self.processor.encode_prompt(prompt, images)
        lay_out = asking_template(template)
        if (check := getattr(self.processor, "check_template", None)) is not None:
            check(lay_out)
        record = as_record(prompt, images)
        return self.processor.encode(lay_out(record), record.images)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        images: Any = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        num_return_sequences: int = 1,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        min_new_tokens: int = 0,
        stop: int | str | Sequence[int | str] = (),
        cache_dtype: str | None = None,
        template: str | Template | None = None,
    ) -> list[str] | list[list[str]]:
        """Answer prompts, greedily at temperature 0; returns one text a prompt.

        prompts: one prompt or a list of them; ``images`` then holds one entry a prompt: an image,
            a list of images, or None. Prompts of any lengths make one batch, and each gets the
            answer it would get alone. A model folder without a tokenizer answers with the new
            token ids, separated by spaces.
        num_beams: above 1, beam search, which goes with temperature 0 only; ``length_penalty``,
            ``early_stopping`` and ``num_return_sequences`` are explained at ``Beams``. With more
            than one sequence a prompt, returns a list of texts a prompt, the best first.
        repetition_penalty, no_repeat_ngram_size, min_new_tokens: see ``Constraints``.
        stop: tokens that end an answer beside the end token: ids, or tokens of the vocabulary.
        cache_dtype: "int8" keeps the keys and values of earlier tokens in about half of bfloat16's
            memory, and may choose otherwise between tokens that are nearly as likely; "float32",
            "bfloat16", "float16", or None for the dtype of the computation. See docs/memory.md.
        template: a name in ``mmjax.data.templates.TEMPLATES``, or a function like them. A prompt is
            then a question, or a list of ``mmjax.Message`` that ends with one, and is asked in the
            template's words; ``<image>`` marks say where images stand. A template that trains,
            ``*_chat``, asks as its ``*_prompt``. None: prompts stand as they are.
        """
        how = dict(
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            sampling=Sampling(temperature, top_k, top_p),
            beams=Beams(num_beams, length_penalty, early_stopping, num_return_sequences),
            cache_dtype=cache_dtype,
        )
        check_settings(**how)  # before pictures are read
        constraints = Constraints(repetition_penalty, no_repeat_ngram_size, min_new_tokens)
        prompts, images = pair(prompts, images)
        tokens = self.generate_tokens(
            [self.encode(p, i, template=template) for p, i in zip(prompts, images, strict=True)],
            seed=seed,
            constraints=constraints,
            stop=stop,
            **how,
        )

        def text(row: np.ndarray, images: Images) -> str:
            if self.processor.tokenizer is None:
                return " ".join(map(str, row.tolist()))
            return self.processor.decode(row, self.coordinate_scale(image_list(images)))

        if num_return_sequences > 1:
            return [[text(x, i) for x in row] for row, i in zip(tokens, images, strict=True)]
        return [text(row, i) for row, i in zip(tokens, images, strict=True)]

    def generate_tokens(
        self,
        examples: Sequence[Example],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = Sampling(),  # noqa: B008
        seed: int = 0,
        batch_size: int = 8,
        beams: Beams = Beams(),  # noqa: B008
        constraints: Constraints = Constraints(),  # noqa: B008
        stop: int | str | Sequence[int | str] = (),
        cache_dtype: str | None = None,
    ) -> list[np.ndarray] | list[list[np.ndarray]]:
        """Return the new tokens of encoded prompts, int32[<= max_new_tokens], in their order.

        Prompts are batched by length, so that little is padding. With a temperature, each draws by
        (seed, its place in ``examples``), whatever batch it falls into. With num_return_sequences
        above 1, each prompt has a list of so many.
        """
        counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        check_settings(sampling, beams, cache_dtype=cache_dtype, **counts)
        self._check_positions(examples, max_new_tokens)
        beams.check_vocabulary(self.config.vocab_size)
        graphdef, params = self._split
        generator = Generator(
            graphdef, self.end_tokens(stop), sampling, cache_dtype, beams, constraints, self.beside
        )
        out: list[np.ndarray] = [None] * len(examples)
        rows = min(batch_size, len(examples))
        with use(self.mesh):
            for some in batches(examples, batch_size):
                got = generator(
                    params,
                    [examples[i] for i in some],
                    max_new_tokens,
                    seed=seed,
                    rows=rows,
                    places=some,
                )
                for i, tokens in zip(some, got, strict=True):
                    out[i] = tokens
        return out

    def log_likelihoods(
        self,
        asked: Sequence[Continuations],
        *,
        batch_size: int = 8,
        cache_dtype: str | None = None,
    ) -> list[np.ndarray]:
        """Return how likely answers are behind their prompts, float64[answers] a prompt.

        asked: see ``mmjax.generate.likelihood.continuations``. The sum over an answer's tokens of
        their log-probabilities; ``Continuations.counts`` tells how many they are. A prompt runs
        once for all its answers. cache_dtype: as in ``generate``.
        """
        check_cache_dtype(cache_dtype)
        if not asked:
            return []
        for one in asked:
            self._check_positions([one.prompt], one.longest)
        graphdef, params = self._split
        out: list[np.ndarray] = [None] * len(asked)
        rows = min(batch_size, sum(len(one.tokens) for one in asked))
        with use(self.mesh):
            for some in batches([one.prompt for one in asked], rows):
                chosen = [asked[i] for i in some]
                got = log_likelihoods(graphdef, params, chosen, rows=rows, cache_dtype=cache_dtype)
                for i, values in zip(some, got, strict=True):
                    out[i] = values
        return out

    def end_tokens(self, stop: int | str | Sequence[int | str] = ()) -> tuple[int, ...]:
        """Return the ids that end an answer: the model's end tokens and those of ``stop``.

        Also the one that the family's training ends an answer with, where its processor tells it:
        the first config.json of Fuyu-8B states another.

        Where neither config.json nor generation_config.json states one, the tokenizer's.
        Raises MMJaxError for an id outside the vocabulary and a text that is no single token.
        """
        ids = [*self.config.end_token_ids, *self.ends]
        taught = getattr(self.processor, "eos_token_id", None)
        if taught is not None and taught < self.config.vocab_size:
            ids.append(taught)
        own = getattr(self.processor.tokenizer, "eos_token_id", None)
        if not ids and own is not None and own < self.config.vocab_size:
            ids = [own]
        for token in [stop] if isinstance(stop, str | int | np.integer) else stop:
            number = token
            if isinstance(token, str):
                tokenizer = self.processor.tokenizer
                number = None if tokenizer is None else token_id(tokenizer, token)
            if number is None or not 0 <= number < self.config.vocab_size:
                raise MMJaxError(
                    f"stop holds {token!r}, which is no token of this model's vocabulary of "
                    f"{self.config.vocab_size}; give an id below that, or a token as its tokenizer "
                    "spells it"
                )
            ids.append(int(number))
        return tuple(dict.fromkeys(ids))

    def logits(
        self, prompt: Prompt, images: Images = None, *, template: str | Template | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens int32[t], logits float32[t, v]) of one prompt; see ``generate``."""
        example = self.encode(prompt, images, template=template)
        self._check_positions([example], 1)
        graphdef, params = self._split
        batch, lengths = pad_batch([example])
        with use(self.mesh):
            logits = _logits(graphdef, params, batch)
        return example["tokens"], np.asarray(logits)[0, : lengths[0]]

    def longest_prompt(self, new: int) -> int | None:
        """Return the most tokens of a prompt beside ``new`` ones; None where there is no limit.

        Positions that are rows of a table set it. The last new token is not read again.
        """
        limit = self.config.decoder.longest
        return None if limit is None else limit - new + 1

    def _check_positions(self, examples: Sequence[Example], new: int) -> None:
        """Raise MMJaxError where a row would need more positions than the model's table has."""
        room = self.longest_prompt(new)
        longest = max((len(e["tokens"]) for e in examples), default=0)
        if room is not None and longest > room:
            raise MMJaxError(
                f"a prompt of {longest} tokens and {new} new ones need {longest + new - 1} "
                f"positions, and the model's table has {self.config.decoder.longest}; shorten the "
                "prompt, or lower max_new_tokens"
            )

    def coordinate_scale(self, images: Sequence[ImageSource]) -> float:
        """Return the factor from pixels of a picture to the coordinates the model speaks in.

        images: of one prompt. Of several the last one counts, as in a text that stands behind them.
        """
        scale = getattr(self.processor, "image_scale", None)  # of a family that speaks in them
        with contextlib.suppress(MMJaxError):  # numbers that are processed already have no size
            return scale(images[-1]) if scale is not None and images else 1.0
        return 1.0


@partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, batch):
    model = nnx.merge(graphdef, params)
    return model.logits(model(batch))


def batches(examples: Sequence[Example], size: int) -> list[list[int]]:
    """Return indices in batches of similar lengths, grey levels and normalised images apart."""
    floats = [len(e["patches"]) > 0 and e["patches"].dtype != np.uint8 for e in examples]
    out = []
    for kind in (False, True):
        some = [i for i in range(len(examples)) if floats[i] == kind]
        some.sort(key=lambda i: len(examples[i]["tokens"]))
        out += [some[start : start + size] for start in range(0, len(some), size)]
    return out
