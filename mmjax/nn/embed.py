"""Token embedding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mmjax.nn.linear import DTypes
from mmjax.parallel.sharding import constrain, gather


class Embed(nnx.Module):
    """Look tokens up in a table [v, d]."""

    def __init__(self, v: int, d: int, *, dtypes: DTypes, init_std: float, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal(init_std)
        table = normal(rngs.params(), (v, d), jnp.dtype(dtypes.param))
        self.dtype = dtypes.compute
        self.embedding = nnx.Param(table, out_sharding=("vocab", "embed"))

    def __call__(self, tokens: Array) -> Array:
        """Return [b, t, d] for int32[b, t]."""
        return _look_up(self.embedding[...], tokens, self.dtype)

    def attend(self, x: Array) -> Array:
        """Return [..., v], the product of [..., d] with every row: a head tied to the table."""
        table = self.embedding[...].astype(self.dtype)
        return jax.lax.dot_general(x.astype(self.dtype), table, (((x.ndim - 1,), (1,)), ((), ())))

    def gather(self) -> None:
        """Make the table whole over fsdp, in the compute dtype; see ``Linear.gather``."""
        gather(self.embedding, self.dtype)


class PositionEmbed(nnx.Module):
    """Look positions up in a table [rows, d] (OPT); positions beyond it take its last row."""

    def __init__(self, rows: int, d: int, *, dtypes: DTypes, init_std: float, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal(init_std)
        table = normal(rngs.params(), (rows, d), jnp.dtype(dtypes.param))
        self.dtype = dtypes.compute
        self.embedding = nnx.Param(table, out_sharding=(None, "embed"))

    def __call__(self, positions: Array) -> Array:
        """Return [b, t, d] for int32[b, t]."""
        return _look_up(self.embedding[...], positions, self.dtype)


def _look_up(table: Array, rows: Array, dtype: str) -> Array:
    """Return [b, t, d] for int32[b, t], of a table [v, d].

    Where fsdp cuts the table on d, every device looks the tokens of all up in its columns, and the
    columns of its own tokens travel: neither the table nor its gradient does, which are larger.
    """
    rows = constrain(rows, "replica", "length")
    found = constrain(table[rows].astype(dtype), "replica", "length", "columns")
    return constrain(found, "batch", "length", "embed")
