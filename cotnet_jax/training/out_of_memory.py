"""Errors of a device whose memory does not suffice."""

import ml_collections

from cotnet_jax.command_line import first_line


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of JAX's runtime says that a device has too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def explain(config: ml_collections.ConfigDict, error: BaseException) -> str:
    """Return what to change in a run where a device has too little memory, for people."""
    return (
        f"the memory of a device does not suffice ({first_line(error)}).\n"
        f"While training, the same batch takes about half with --config.accumulate_steps="
        f"{2 * config.accumulate_steps}, or use a smaller --config.batch_size (now "
        f"{config.batch_size}); while evaluating, a smaller --config.eval.batch_size (now "
        f"{config.eval.batch_size})."
    )
