"""Ask a model in the terminal: one question, or a conversation.

python -m mmjax.ask MODEL "What is this?" --image a.jpg [--template bunny_prompt]
python -m mmjax.ask MODEL                    # a conversation, which ends with Ctrl-D

MODEL is what mmjax.load takes: a folder of train.py or of convert_weights.to_jax, or a PyTorch
checkpoint. What train.py has written is asked in the words it was trained in; of others --template
tells them. Without either, one question is asked as it stands, and there is no conversation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mmjax import runtime
from mmjax.cli import Parser, print_error, run_guarded
from mmjax.data.images import load_rgb
from mmjax.data.templates import TEMPLATES
from mmjax.data.turns import IMAGE_MARK
from mmjax.home import in_home
from mmjax.models.parts import Parts
from mmjax.prompts import asking_template
from mmjax.types import Message, MMJaxError

if TYPE_CHECKING:
    from mmjax.loaded import LoadedModel

_PARTS = tuple(field.name for field in dataclasses.fields(Parts))
_COMMANDS = "/image FILE shows a picture with the next question, /new begins anew, Ctrl-D ends"


class Conversation:
    """What was said and shown so far; every question is asked behind all of it."""

    def __init__(self, model: LoadedModel, template: str, options: dict[str, Any]):
        self._model, self._template, self._options = model, template, options
        self.messages: list[Message] = []
        self.images: list[str] = []

    def ask(self, question: str, images: list[str]) -> str:
        """Return the answer to a question that comes with images; nothing is kept of a failure."""
        if IMAGE_MARK not in question:
            question = IMAGE_MARK * len(images) + question
        messages, shown = [*self.messages, Message("user", question)], [*self.images, *images]
        (answer,) = self._model.generate(
            [messages], [shown], template=self._template, **self._options
        )
        if answer.strip():  # which no turn can be without
            self.messages, self.images = [*messages, Message("assistant", answer)], shown
        return answer


def main(argv: list[str] | None = None) -> None:
    """Answer the question, or questions until the input ends."""
    args = _arguments().read(argv)
    if args.template is not None:
        asking_template(args.template)
    for image in args.image:
        _readable(image)
    if argv is None:
        runtime.prepare()
    # Only its tokenizers are used here: that PyTorch is missing would alarm without reason.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    runtime.enable_compilation_cache()

    from mmjax.generate.beam import Beams
    from mmjax.generate.loop import check_settings
    from mmjax.generate.sampling import Sampling
    from mmjax.loading import load
    from mmjax.models.opening import open_pretrained

    check_settings(
        Sampling(args.temperature, top_p=args.top_p),
        Beams(args.num_beams),
        max_new_tokens=args.max_new_tokens,
    )
    where = {name: getattr(args, name) for name in ("base", *_PARTS)}
    template = args.template or open_pretrained(args.model, **where).template
    if args.question is None and template is None:
        known = ", ".join(name for name in TEMPLATES if name.endswith("_prompt"))
        raise MMJaxError(
            f"{args.model} does not tell in which words it was trained, and a conversation needs "
            f"them: give --template, one of {known}; or one question, which is asked as it stands"
        )
    model = load(args.model, args.dtype, weights=args.weights, progress=True, **where)
    options = {
        name: getattr(args, name)
        for name in ("max_new_tokens", "temperature", "top_p", "num_beams", "seed")
    }
    if args.question is not None:
        if template is None and sys.stderr.isatty():
            print("asked as it stands; --template lays a question out", file=sys.stderr)
        with _busy():
            answer = model.generate([args.question], [args.image], template=template, **options)
        print(*answer)
        return
    _converse(model, Conversation(model, template, options), args.image, template)


def _converse(
    model: LoadedModel, conversation: Conversation, images: list[str], template: str
) -> None:
    """Read questions and commands line by line; a mistake is told and ends nothing."""
    person = sys.stdin.isatty()
    if person:
        print(f"{model.family}, asked in {template}. {_COMMANDS}.", file=sys.stderr)
    for line in _lines(person):
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/new":
                conversation.messages, conversation.images, images = [], [], []
            elif command == "/image":
                images = [*images, _readable(in_home(rest.strip()))]
            elif command.startswith("/") and not rest and len(command) > 1:
                print_error(f"there is no {command}: {_COMMANDS}")
            elif line.strip():
                with _busy():
                    answer = conversation.ask(line.strip(), images)
                print(answer, flush=True)
                images = []
        except MMJaxError as error:
            print_error(str(error))


def _busy() -> contextlib.AbstractContextManager:
    """Show a person that an answer is being made: the first one is compiled before."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    from rich.console import Console

    return Console(stderr=True).status("answering")


def _lines(person: bool) -> Iterator[str]:
    if not person:
        yield from sys.stdin
        return
    import readline  # noqa: F401  # lines can be edited, and called back

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _readable(image: str) -> str:
    """Return the path of a picture that was read; raises MMJaxError for what is none."""
    load_rgb(image, max_pixels=None)  # its processor has a limit of its own
    return image


def _arguments() -> argparse.ArgumentParser:
    parser = Parser("mmjax.ask", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder or file; files a.pt,b.pt: the last counts")
    add("question", metavar="QUESTION", nargs="?", help="asked once; without it, a conversation")
    add(
        "--image", metavar="FILE", action="append", default=[],
        help="a picture of the first question; once for each. They stand before it, or where it "
        f"says {IMAGE_MARK}",
    )  # fmt: skip
    add("--template", metavar="NAME", help="the words it is asked in: see docs/data_formats.md")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="256 unless told")
    add("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    add("--top-p", type=float, default=1.0, metavar="X", help="of the likeliest tokens; 1: all")
    add("--num-beams", type=int, default=1, metavar="N", help="beam search with so many")
    add("--seed", type=int, default=0, metavar="N", help="of what a temperature draws")
    add("--dtype", help="float32, bfloat16 or float16; bfloat16 on accelerators unless told")
    add("--weights", metavar="KIND", help="int8 or nf4: what is kept of the weights")
    add("--base", metavar="DIR", help="the model folder of an adapter")
    for name in _PARTS:
        add(f"--{name.replace('_', '-')}", metavar="PATH", help="where MODEL leaves it out")
    return parser


if __name__ == "__main__":
    sys.exit(run_guarded(main))
