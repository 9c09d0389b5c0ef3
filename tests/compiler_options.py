"""XLA's options of programs that tests measure: users' own, where conftest.py has others."""

_KINDS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "LIBRARY_FUSION_TYPE_REDUCE"
LIBRARY = {"xla_cpu_experimental_ynn_fusion_type": ",".join(_KINDS)}
"""A library computes matmuls and sums; without it some operands are copied first."""
