"""mmjax: open large multimodal models in JAX.

Public names are loaded when first used, so that data workers, which import ``mmjax.data``, never
load jax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmjax.loaded import LoadedModel as LoadedModel
    from mmjax.loading import load as load
    from mmjax.types import BadSample as BadSample
    from mmjax.types import Message as Message
    from mmjax.types import MMJaxError as MMJaxError
    from mmjax.types import Record as Record
    from mmjax.types import Segment as Segment

__version__ = "0.1.0"

_HOME = {
    "load": "mmjax.loading",
    "LoadedModel": "mmjax.loaded",
    "BadSample": "mmjax.types",
    "MMJaxError": "mmjax.types",
    "Message": "mmjax.types",
    "Record": "mmjax.types",
    "Segment": "mmjax.types",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mmjax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return [*globals(), *__all__]
