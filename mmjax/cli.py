"""The command line of the shells: recipe, overrides, flags; clear errors and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from mmjax import runtime
from mmjax.config import of_a_peer, resolve_recipe, split_recipe
from mmjax.home import in_home
from mmjax.types import MMJaxError, nearest, system_fault

FLAGS = flags.FLAGS
USER_ERROR = 2
INTERRUPTED = 130
_CONFIG_HELP = (
    "  --config: the recipe, configs/<name>.py[:arg]; --help behind it lists its settings, each of "
    "which\n    is overridden by --config.any.key=value"
)
READER_GONE = 141  # as a program has that SIGPIPE ends
_AGAIN_SECONDS = 0.05  # until an interruption that was swallowed comes again


def run_with_config(main: Callable[[Any], int | None], argv: Sequence[str] | None = None) -> None:
    """Parse the command line, call ``main(config)`` and exit; a shell's last line.

    ``--config=file.py[:arg]`` names the recipe and ``--config.any.key=value`` overrides it; every
    other flag is the shell's own (absl). An MMJaxError becomes ``error: ...`` on stderr and exit
    code 2, as does memory that is exhausted, and an interruption by the keyboard exit code 130; any
    other exception keeps its traceback.
    """
    # Only its tokenizers are used here: that PyTorch is missing would alarm without reason.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if argv is None:
        runtime.prepare()
    argv = list(map(with_home, sys.argv if argv is None else argv))
    sys.exit(run_guarded(lambda: _run(main, argv)))


def run_guarded(call: Callable[[], int | None]) -> int:
    """Call a function and turn what a user can mend into a message; return the exit code.

    What stdout's encoding does not have is printed as an escape: it must end no run. A full disk or
    missing rights are told like a user's mistake; where the reader of a pipe has gone, it is quiet.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _never_swallowed():
            code = call() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        with open(os.devnull, "wb") as nowhere:  # or Python tries, and complains, at its end again
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return READER_GONE
    except MMJaxError as e:
        print_error(str(e))
        return USER_ERROR
    except OSError as e:
        if (told := system_fault(e)) is None:
            raise
        print_error(told)
        return USER_ERROR
    except RuntimeError as e:  # XLA's are of this kind
        told = str(e).split("\n", 1)[0].rstrip(".")
        # A kernel may ask for more of a GPU's shared memory than there is: a mistake of ours.
        if "RESOURCE_EXHAUSTED" not in told or "hared memory" in told:
            raise
        print_error(
            f"{told}: this does not fit into the memory; lower the rows of a step or of an answer "
            "(data.batch_size, eval.batch_size), their length or max_new_tokens; train.py --plan "
            "tells what fits, see docs/memory.md"
        )
        return USER_ERROR
    except KeyboardInterrupt:
        print("\nstopped by the keyboard", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _never_swallowed() -> Iterator[None]:
    """Let an interruption by the keyboard come again where it fell into what cannot raise it.

    From a destructor, and from a callback of the garbage collector, which JAX has, Python reports
    it to ``sys.unraisablehook`` and goes on as if nothing had been pressed.
    """
    hook, timers = sys.unraisablehook, []
    main = threading.main_thread().ident

    def again(told: Any) -> None:
        if not issubclass(told.exc_type, KeyboardInterrupt):
            hook(told)
            return
        # Later, and by a real signal: the hook cannot raise either, and a wait has to be woken.
        timers.append(threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (main, signal.SIGINT)))
        timers[-1].daemon = True
        timers[-1].start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in timers:
            timer.cancel()


def print_error(message: str) -> None:
    """Print ``error: message`` to stderr, red where a person is reading."""
    tty = sys.stderr.isatty()
    start, end = ("\033[1;31m", "\033[0m") if tty else ("", "")
    print(f"{start}error:{end} {message}", file=sys.stderr)


def parse_args(argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Parse a command line into (config, positional arguments); absl's FLAGS holds the others."""
    if "config" not in FLAGS:
        flags.DEFINE_string("config", None, "the recipe: configs/<name>.py or <name>.py:argument")
    overrides, rest = split_overrides(argv[1:])
    try:
        positional = FLAGS([argv[0], *rest])
    except flags.UnrecognizedFlagError as e:
        raise MMJaxError(
            f"{e}; a setting of the recipe is written "
            f"--config.{of_a_peer(e.flagname) or e.flagname}=VALUE, and --help behind a "
            "--config lists all of them"
        ) from e
    except flags.Error as e:
        raise MMJaxError(str(e)) from e
    if FLAGS.config is None:
        found = ", ".join(sorted(glob.glob("configs/[!_]*.py"))) or "none in ./configs"
        meant = next((item for item in positional[1:] if ".py" in item), "configs/<name>.py")
        raise MMJaxError(
            f"no recipe: give one with --config={meant} (and :argument); here: {found}"
        )
    return resolve_recipe(FLAGS.config, overrides), positional[1:]


def with_home(argument: str) -> str:
    """Write out the home folder in ``--name=~/x`` and ``a.pt,~/b.pt``; see ``mmjax.home``."""
    name, mark, value = argument.partition("=")
    return f"{name}={in_home(value)}" if mark else in_home(argument)


class Parser(argparse.ArgumentParser):
    """The arguments of a command that has no recipe; a flag misspelt is told with the nearest one.

    prog: as ``python -m`` takes it. doc: of its module, the head of its help.
    """

    def __init__(self, prog: str, doc: str | None):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=doc, formatter_class=form)

    def read(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse arguments, by default the program's, with the home folder in them.

        Ends the program with exit code 2 where they cannot be.
        """
        parsed, unknown = self.parse_known_args(
            list(map(with_home, sys.argv[1:] if argv is None else argv))
        )
        if unknown:
            near = nearest(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return parsed


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide arguments into overrides ``--config.key=value`` and all others.

    The value may also be the next argument, unless that one starts with a dash.
    """
    overrides, rest = [], []
    queue = list(arguments)
    while queue:
        item = queue.pop(0)
        if not item.startswith(("--config.", "-config.")):
            rest.append(item)
            continue
        if "=" not in item and queue and not queue[0].startswith("-"):
            item += "=" + queue.pop(0)
        overrides.append(item.lstrip("-").removeprefix("config."))
    return overrides, rest


def _run(main: Callable[[Any], int | None], argv: list[str]) -> int | None:
    if any(a in ("--help", "-h", "-help") for a in argv[1:]):
        print(_help(argv))
        return 0
    config, positional = parse_args(argv)
    if positional:
        raise MMJaxError(f"unexpected argument {positional[0]!r}; flags are written --name=value")
    return main(config)


def _help(argv: list[str]) -> str:
    """Describe the shell's flags and, if a recipe is named, every key that can be overridden."""
    module = sys.modules.get("__main__")
    parts = [(getattr(module, "__doc__", None) or "").strip()]
    own = FLAGS.flags_by_module_dict().get(argv[0], [])
    lines = [f"  --{f.name}: {f.help} (default: {f.value})" for f in own if f.name != "config"]
    parts.append("\n".join(["Flags:", _CONFIG_HELP, *lines]))
    recipe = None
    for place, item in enumerate(argv):
        name, mark, value = item.partition("=")
        if name in ("--config", "-config"):
            recipe = value if mark else next(iter(argv[place + 1 : place + 2]), None)
    if recipe:
        keys = _flatten(resolve_recipe(recipe).to_dict())
        listing = "\n".join(f"  --config.{k}={v!r}" for k, v in keys.items())
        parts.append(f"Settings of {split_recipe(recipe)[0]}:\n{listing}")
    return "\n\n".join(p for p in parts if p)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a tree of dicts to dotted names."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
