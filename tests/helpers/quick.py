"""How XLA compiles in tests: quickly, since a network runs for a second and compiles for half a
minute. Tests of what users compile ask for XLA's own choices.
"""

from importlib import metadata

# Its passes over the whole graph are run all the same.
OPTIONS = {"xla_backend_optimization_level": 0}
USERS_OPTIONS = {"xla_backend_optimization_level": 3}
# JAX 0.10 can emit fused loops in an older way, which compiles three times faster.
if metadata.version("jaxlib").startswith("0.10."):
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
    USERS_OPTIONS["xla_cpu_use_fusion_emitters"] = True
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
