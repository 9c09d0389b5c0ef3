"""mmjax: open large multimodal models in JAX.

Public names are loaded when first used, so that data workers, which import ``mmjax.data``, never
load jax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmjax.loading import LoadedModel, load
    from mmjax.types import BadSample, Message, MMJaxError, Record, Segment

__version__ = "0.1.0"

_HOME = {
    "load": "mmjax.loading",
    "LoadedModel": "mmjax.loading",
    "BadSample": "mmjax.types",
    "MMJaxError": "mmjax.types",
    "Message": "mmjax.types",
    "Record": "mmjax.types",
    "Segment": "mmjax.types",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mmjax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return [*globals(), *__all__]
