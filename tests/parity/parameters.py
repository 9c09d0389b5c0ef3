"""Every parameter of a checkpoint, to compare with another's."""

import numpy as np

from mmjax.models import opening, pretrained
from mmjax.models.views import Canonical
from mmjax.parallel.mesh import use


def read_all(path, **parts):
    """Return an opened model and all its parameters by our names, adapters unmerged."""
    opened = opening.open_pretrained(path, **parts)
    with use():
        abstract = pretrained.abstract_params(opened.family, opened.config, lora=opened.lora)
    shapes = {name: tuple(leaf.shape) for name, leaf in abstract.items()}
    pretrained.R.check(opened.rules, shapes, opened.reader, opened.ignore)
    view = Canonical(opened.reader, opened.rules, shapes)
    return opened, {name: view.read(name) for name in shapes}


def assert_same(got, want):
    """Fail unless two sets of arrays have the same names and the same numbers."""
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def options(parts):
    """Return the keywords that name parts as a command's options."""
    return [x for k, v in parts.items() for x in ("--" + k.replace("_", "-"), str(v))]
