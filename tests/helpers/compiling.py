"""Compilation for tests: programs that run once, on small arrays, need no optimised code."""

# jax.jit(f, compiler_options=QUICK) takes half the time to compile.
QUICK = {"xla_backend_optimization_level": 0}
