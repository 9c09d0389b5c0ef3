"""XLA's options of programs that tests measure: as users have them, where conftest.py has others."""

MATMULS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
"""A library makes a program of each matmul; without it some operands are copied first."""
