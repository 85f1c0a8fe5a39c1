"""JAX's compilation cache, on by default in the commands."""

import jax
from absl import logging

from cotnet_jax import files

FOLDER = "compiled"


def keep_compiled_programs() -> None:
    """Have JAX keep compiled programs, and Triton kernels with them, in the user's cache folder.

    A folder that the user gave JAX stays, and JAX_ENABLE_COMPILATION_CACHE=false turns it off. On
    CPUs it stays off: XLA compiles for the instructions that the very CPU has, and another host
    with the same home may lack some.

    It is for commands alone, since it changes JAX's settings for the whole process. Call it after
    the processes of a run were connected, because it starts JAX's backend.
    """
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not jax.config.values["jax_enable_compilation_cache"] or folder == "":
        return
    if folder is None:
        if jax.default_backend() == "cpu":
            return
        try:
            folder = files.cache_dir() / FOLDER
            # What lies in it is executed: nobody else may write to it.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # RuntimeError: the user has no home.
        except (OSError, RuntimeError) as error:
            logging.warning("Compiled programs are not kept: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    logging.info(
        "Compiled programs are kept in %s; JAX_ENABLE_COMPILATION_CACHE=false turns this off.",
        folder,
    )
