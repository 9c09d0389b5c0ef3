"""Files of published models at full size: headers without numbers, which take no space."""

import json
import math


def write(file, shapes):
    """Write a safetensors file of these shapes whose numbers are a hole."""
    at, header = 0, {}
    for key, shape in shapes.items():
        end = at + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
    return file


def norm(name, width, bias=True):
    """Return the tensors of a norm."""
    return {f"{name}.{x}": (width,) for x in ("weight", "bias")[: 1 + bias]}


def linear(name, out, width, bias=True):
    """Return the tensors of a linear map."""
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})
