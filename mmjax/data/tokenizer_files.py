"""A tokenizer's files, in words that every version of transformers reads.

transformers 5 writes its own: a class that transformers 4 does not know, a list of special tokens
where 4 expects a dict, and merges as pairs, which tokenizers before 0.20 cannot read. The PyTorch
code of the models here is pinned to transformers 4.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_CONFIG, _TOKENIZER, _CHAT = "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"
_ONLY_5 = ("backend", "is_local", "local_files_only")  # keys that tell how 5 has loaded it
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # of tokenizer.json as it stands


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike) -> None:
    """Write a tokenizer into a folder, for transformers 4 and 5."""
    tokenizer.save_pretrained(os.fspath(folder))
    make_readable(folder)


def make_readable(folder: str | os.PathLike) -> None:
    """Rewrite tokenizer files that transformers 5 has written, so that 4 reads them too.

    Files of another writer, and what is no JSON, stay as they are.
    """
    folder = Path(folder)
    config = _read(folder / _CONFIG)
    if config is None or "backend" not in config:
        return
    config = {key: value for key, value in config.items() if key not in _ONLY_5}
    name = config.get("tokenizer_class")
    config["tokenizer_class"] = _CLASSES.get(name, name)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if (folder / _CHAT).is_file():  # 4.43 and before look for it here alone
        config.setdefault("chat_template", (folder / _CHAT).read_text("utf-8"))
    _write(folder / _CONFIG, config)
    tokenizer = _read(folder / _TOKENIZER)
    if tokenizer is not None:
        _write(folder / _TOKENIZER, _older(tokenizer))


def _older(node: Any) -> Any:
    """Return a part of tokenizer.json in the words of tokenizers before 0.20, where it has them."""
    if isinstance(node, list):
        return [_older(one) for one in node] if any(isinstance(x, dict) for x in node) else node
    if not isinstance(node, dict):
        return node
    node = {key: value if key == "vocab" else _older(value) for key, value in node.items()}
    merges = node.get("merges")
    if isinstance(merges, list) and all(map(_is_plain_pair, merges)):
        node["merges"] = [" ".join(pair) for pair in merges]
    if node.get("type") == "Metaspace" and "prepend_scheme" in node:
        node.setdefault("add_prefix_space", node["prepend_scheme"] != "never")
    return node


def _is_plain_pair(merge: Any) -> bool:
    """Tell whether a merge can be one string: its parts have no space."""
    return isinstance(merge, list) and not any(" " in part for part in merge)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
