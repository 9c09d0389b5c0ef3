"""Family-free modules, as flax NNX in tree mode: plain ``jax`` transforms act on split state."""

from flax import nnx

# Tree mode: a module is a pytree, Variables are its leaves. flax is moving its defaults there.
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
