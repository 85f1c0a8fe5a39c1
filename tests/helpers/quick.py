"""XLA options for tests: a network runs for a second, and would compile for half a minute.

Tests of what users compile ask for USERS_OPTIONS, which are XLA's defaults.
"""

from importlib import metadata

# At level 0, passes over the whole graph still run.
OPTIONS = {"xla_backend_optimization_level": 0}
USERS_OPTIONS = {"xla_backend_optimization_level": 3}
# JAX 0.10 can emit fused loops in an older way, which compiles three times faster.
if metadata.version("jaxlib").startswith("0.10."):
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
    USERS_OPTIONS["xla_cpu_use_fusion_emitters"] = True
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
