"""Compiles what runs once: a network runs for a second here, and compiles for half a minute."""

import functools

import jax

# Half the time to compile; XLA's passes over the whole graph are run all the same.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
