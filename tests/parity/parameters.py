"""Every parameter of a checkpoint, to compare with another's."""

import numpy as np

from mmjax.models import checkpoints, opening
from mmjax.models.views import Canonical
from mmjax.parallel.mesh import use


def read_all(path, **parts):
    """Return a checkpoint, opened, and all its parameters by our names, adapters unmerged."""
    ckpt = opening.open_checkpoint(path, **parts)
    with use():
        abstract = checkpoints.abstract_params(ckpt.family, ckpt.config, lora=ckpt.lora)
    shapes = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    checkpoints.R.check(ckpt.rules, shapes, ckpt.reader, ckpt.ignore)
    view = Canonical(ckpt.reader, ckpt.rules, shapes)
    return ckpt, {name: view.read(name) for name in shapes}


def assert_same(got, want):
    """Fail unless two sets of arrays have the same names and the same numbers."""
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def options(parts):
    """Return the keywords that name parts as a command's options."""
    return [x for k, v in parts.items() for x in ("--" + k.replace("_", "-"), str(v))]
