"""Which tests of ``ops`` a version of jax has: that of the Mosaic kernels begins where they do."""

import jax

from mmjax.ops.flash_mosaic import MIN_JAX

# What an older jax gets instead, a message, is tested everywhere in test_flash_mosaic.py.
collect_ignore = ["test_flash_mosaic_kernels.py"] if jax.__version_info__ < MIN_JAX else []
