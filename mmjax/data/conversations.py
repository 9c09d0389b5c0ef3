"""The turns of a JSON record, as LLaVA and as chat models write them."""

from __future__ import annotations

from typing import Any

from mmjax.data.turns import IMAGE_MARK
from mmjax.types import BadSample, Message

_ROLES = {
    "from": {"system": "system", "human": "user", "gpt": "assistant"},
    "role": {"system": "system", "user": "user", "assistant": "assistant"},
}
_TEXT = {"from": "value", "role": "content"}
_USUAL = {"conversations": "from", "messages": "role"}
_NEXT = {
    None: ("system", "user", "assistant"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user",),
}


def read_turns(turns: Any, form: str, where: str) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Read a list of turns: a system message at most first, then user and assistant in turn.

    form: ``conversations`` or ``messages``. Turns have ``from`` and ``value``, or ``role`` and
    ``content``, under either name: MiniCPM-V calls chat turns conversations. where: names the place
    in a message. Returns the turns, and the files of pictures that parts of their content name.
    An answer before the first question is left out, as LLaVA's loaders do: pieces of long
    conversations begin with one. Raises BadSample ``bad_record`` naming the field.
    """
    if not isinstance(turns, list) or not turns:
        raise bad_record(where, f"{form!r} is {shown(turns)}; expected a list of at least one turn")
    first, who = turns[0], _USUAL[form]
    if isinstance(first, dict) and who not in first:
        who = next((other for other in _ROLES if other in first), who)
    what, roles = _TEXT[who], _ROLES[who]
    messages: list[Message] = []
    named: list[str] = []
    unnamed = 0
    for i, turn in enumerate(turns):
        field = f"{form}[{i}]"
        if not isinstance(turn, dict):
            raise bad_record(where, f"{field!r} is {shown(turn)}; expected an object")
        if who == "role" and isinstance(turn.get(what), list):
            text, files = _joined_parts(turn[what], f"{where}: field '{field}.{what}'")
            turn, unnamed = {**turn, what: text}, unnamed + files.count(None)
            named += filter(None, files)
        for key in (who, what):
            if not isinstance(turn.get(key), str):
                seen = f"is {shown(turn[key])}, not a string" if key in turn else "is missing"
                raise bad_record(where, f"field '{field}.{key}' {seen}")
        if turn[who] not in roles:
            raise bad_record(
                where, f"field '{field}.{who}' is {turn[who]!r}; expected one of {list(roles)}"
            )
        messages.append(Message(roles[turn[who]], turn[what]))
        wanted = _NEXT[messages[-2].role if i else None]
        if messages[-1].role not in wanted:
            names = [k for k, v in roles.items() if v in wanted]
            raise bad_record(
                where,
                f"field '{field}.{who}' is {turn[who]!r} where {' or '.join(map(repr, names))} "
                "must stand: turns alternate",
            )
    if named and unnamed:
        raise bad_record(
            where,
            f"{form!r} names the files of {len(named)} pictures and leaves out those of {unnamed}; "
            "name all of them, or none",
        )
    at = int(messages[0].role == "system")
    if len(messages) > at and messages[at].role == "assistant":
        del messages[at]
        if len(messages) == at:
            raise bad_record(where, f"{form!r} holds an answer and no question")
    return tuple(messages), tuple(named)


def _joined_parts(parts: list[Any], where: str) -> tuple[str, list[str | None]]:
    """Join content given as parts into marked text; returns it and the file of each picture.

    {type: text, text: ...}; {type: image}, with the file in ``image`` or ``path`` as Qwen's and
    transformers' chats have it; {type: image_url, image_url: {url: file}}.
    """
    texts: list[str] = []
    files: list[str | None] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append(IMAGE_MARK)
            files.append(_file_of(part, where))
        else:
            raise bad_record(
                where, f"a part is {shown(part)}; expected type 'text', 'image' or 'image_url'"
            )
    return "".join(texts), files


def _file_of(part: dict[str, Any], where: str) -> str | None:
    """Return the file that a part names, None for none; raises BadSample for what is no file."""
    url = part.get("image_url")
    given = (part.get("image"), part.get("path"), part.get("url"))
    given = [x for x in (*given, url.get("url") if isinstance(url, dict) else url) if x is not None]
    if not given and part["type"] == "image":
        return None
    file = given[0] if len(given) == 1 else given
    if not isinstance(file, str) or not file or file.startswith(("http:", "https:", "data:")):
        raise bad_record(
            where, f"a picture is {shown(file)}; expected the name of one file, which is here"
        )
    return file.removeprefix("file://")


def bad_record(where: str, message: str) -> BadSample:
    """Return the error of a record that cannot be read."""
    return BadSample("bad_record", f"{where}: {message}")


def shown(value: Any) -> str:
    """Return a value for a message, short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
