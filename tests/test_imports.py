"""Who may import whom: the layers of docs/design.md, read off the source without importing it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "mmjax").rglob("*.py"))

# What a layer may import of mmjax. A folder that is not listed is free to import any.
ALLOWED = {
    "types": set(),
    "schema": {"types"},
    "partial": {"types"},
    "parallel": {"types"},
    "ops": {"types", "parallel"},
    "nn": {"types", "parallel", "ops"},
    "data": {"types", "schema", "user_cache", "home", "partial"},
    "weights": {"types", "partial"},
    "monitor": {"types"},
    "models": {"types", "parallel", "ops", "nn", "data", "weights"},
    "generate": {"types", "parallel", "ops", "nn", "models"},
}
# Commands stand above all layers, wherever their file lies.
COMMANDS = (
    "data/check.py", "data/regroup_parquet.py", "data/to_array_record.py",
    "data/mmc4_to_webdataset.py", "data/emoji.py",
)  # fmt: skip
# Files that know families only through mmjax.models.registry.
FAMILY_FREE = (
    "train", "data/pipeline.py", "data/examples.py", "generate", "parallel", "weights", "nn", "ops",
    "monitor", "loading.py", "loaded.py", "prompts.py", "ask.py", "checkpoint.py",
    "checkpoint_steps.py", "checkpoint_failures.py", "config.py", "schema.py", "cli.py",
    "models/decoder.py", "models/causal.py", "models/api.py", "models/processor.py",
    "models/pretrained.py", "models/opening.py", "models/converted.py", "models/averages.py",
)  # fmt: skip
FAMILIES = {p.name for p in (ROOT / "mmjax/models").iterdir() if (p / "model.py").exists()}
# These import on a bare accelerator machine.
BARE = (
    "ops", "nn", "parallel", "generate", "models", "weights", "train/step.py", "loading.py",
    "loaded.py",
)  # fmt: skip
BARE_PACKAGES = {
    "jax", "jaxlib", "flax", "optax", "orbax", "numpy",
    "ml_dtypes", "tensorstore",  # what those bring along
}  # fmt: skip
WITHIN_FUNCTIONS_ONLY = {
    "processor.py", "image_plan.py", "coordinates.py", "processor_config.py", "media.py",
    "special_tokens.py", "square_images.py", "stream.py", "token_stream.py", "images.py",
}  # fmt: skip


def imports(file, *, top_only=False):
    """Every module a file imports, ``from a import b`` as both ``a`` and ``a.b``."""
    tree = ast.parse(file.read_text())
    nodes = _top_level(tree.body) if top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _top_level(body):
    """The statements that run on import; ``if TYPE_CHECKING`` never does."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            if "TYPE_CHECKING" not in ast.dump(getattr(node, "test", ast.Pass())):
                yield from _top_level([*node.body, *node.orelse])
        else:
            yield node


def layer(module):
    """The folder or file of mmjax a dotted module name belongs to, or None."""
    parts = module.split(".")
    return parts[1] if parts[0] == "mmjax" and len(parts) > 1 else None


def inside(file, names):
    relative = file.relative_to(ROOT / "mmjax").as_posix()
    return any(relative == name or relative.startswith(name + "/") for name in names)


def test_text_is_utf_8_whatever_the_locale_says():
    found = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            said = [ast.unparse(x) for x in (*node.args, *(k.value for k in node.keywords))]
            text = name in ("read_text", "write_text")
            if isinstance(node.func, ast.Name) and name == "open":
                text = not any("b" in mode for mode in said[1:2])
            if text and not any("utf-8" in one for one in said):
                found.append(f"{file.name}: {ast.unparse(node)}")
    assert not found


@pytest.mark.parametrize("name", ALLOWED)
def test_a_layer_imports_only_those_below_it(name):
    wrong = {}
    for file in FILES:
        relative = file.relative_to(ROOT / "mmjax").with_suffix("")
        if relative.parts[0] != name or inside(file, COMMANDS):
            continue
        used = {layer(m) for m in imports(file)} - {None, "__version__", name}
        if used - ALLOWED[name]:
            wrong[str(relative)] = sorted(used - ALLOWED[name])
    assert not wrong


@pytest.mark.parametrize(
    "name, forbidden",
    [
        ("data", {"jax", "flax", "optax", "orbax", "torch"}),
        ("types.py", {"jax", "flax", "PIL", "grain"}),
        ("weights", {"torch", "transformers", "safetensors"}),
        ("monitor/meter.py", {"jax"}),
    ],
)
def test_a_folder_never_imports_these(name, forbidden):
    for file in FILES:
        if inside(file, (name,)):
            assert not {m.split(".")[0] for m in imports(file)} & forbidden, file


def test_processors_need_neither_jax_nor_models_with_jax():
    for file in FILES:
        if file.name in WITHIN_FUNCTIONS_ONLY:
            used = imports(file)
            assert not {m.split(".")[0] for m in used} & {"jax", "flax", "torch"}, file
            assert not any(m.endswith(".model") or layer(m) in ("nn", "ops") for m in used), file


def test_only_a_family_knows_its_name():
    assert FAMILIES
    for file in FILES:
        if inside(file, FAMILY_FREE):
            known = {m for m in imports(file) for f in FAMILIES if f"models.{f}" in m}
            assert not known, f"{file}: {known}"


def test_nothing_imports_recipes_tests_or_torch():
    for file in [*FILES, *(ROOT / "convert_weights").glob("*.py"), ROOT / "train.py"]:
        used = {m.split(".")[0] for m in imports(file)}
        assert not used & {"configs", "tests", "bench", "torch", "tensorflow"}, file


def test_only_config_sees_a_configdict():
    users = [f.name for f in FILES if any(m.startswith("ml_collections") for m in imports(f))]
    assert users == ["config.py"]


def test_files_have_names_that_say_something_and_fit_on_a_desk():
    for file in FILES:
        assert file.stem not in ("utils", "common", "helpers", "misc"), file
        assert len(file.read_text().splitlines()) <= 500, file


def test_modules_of_a_bare_machine_import_at_their_top_only_what_it_has():
    for file in FILES:
        if not inside(file, BARE) or file.name in WITHIN_FUNCTIONS_ONLY:
            continue
        outside = {m.split(".")[0] for m in imports(file, top_only=True)}
        outside -= set(sys.stdlib_module_names) | BARE_PACKAGES | {"mmjax"}
        assert not outside, f"{file}: {outside}"


def run(code):
    """Run code in a fresh interpreter; returns its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        # Only what mmjax itself asks for: orbax and flax bring packages of their own.
        if name.split('.')[0] in NAMES and sys._getframe(1):
            frame = sys._getframe(1)
            while frame and 'importlib' in frame.f_code.co_filename:
                frame = frame.f_back
            if frame and '/mmjax/' in frame.f_code.co_filename:
                raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Block())
NAMES = {'grain', 'ml_collections', 'transformers', 'tokenizers', 'PIL', 'rich', 'tensorboardX',
         'torch', 'safetensors', 'sklearn', 'einops', 'absl', 'tensorflow_datasets'}
"""


def test_a_bare_machine_imports_models_steps_and_generation():
    modules = [
        "mmjax.ops.attention", "mmjax.ops.xent", "mmjax.nn.stack", "mmjax.models.decoder",
        "mmjax.models.fuyu.model", "mmjax.parallel.mesh", "mmjax.train.step", "mmjax.train.optim",
        "mmjax.generate.loop", "mmjax.loading", "mmjax.models.opening",
    ]  # fmt: skip
    code, out = run(BLOCK + "".join(f"import {m}\n" for m in modules) + "print('fine')")
    assert code == 0 and "fine" in out, out
    code, out = run(BLOCK + "import mmjax.monitor.terminal")
    assert code == 1 and "blocked: rich" in out  # the block blocks


def test_mmjax_and_its_data_load_no_jax():
    modules = ["mmjax", "mmjax.types", "mmjax.config", "mmjax.data.sources", "mmjax.data.packing"]
    modules += ["mmjax.data.templates", "mmjax.models.fuyu.processor", "mmjax.data.magnifier"]
    modules += ["mmjax.models.flamingo.processor"]
    code, out = run(
        "import sys\n"
        + "".join(f"import {m}\n" for m in modules)
        + "print(sorted({'jax', 'flax', 'torch', 'grain'} & set(sys.modules)))"
    )
    assert code == 0 and out.strip().endswith("[]"), out
