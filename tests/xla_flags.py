"""XLA's flags with which the tests compile: quickly, to programs that are slow.

Compiling takes most of the tests' time, and their models are too small to gain from it. The tests of
numerics/ run the program as users do, in a process of their own: see tests/repository/test_numerics.py.
"""

QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
