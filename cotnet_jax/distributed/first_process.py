"""What only process 0 does, on behalf of all, and all need to know the outcome of."""

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax

# There is no public name for it.
from jax._src.distributed import global_state

T = TypeVar("T")

# Every process counts alike.
_numbers = itertools.count()


class FirstProcessError(OSError):
    """Process 0 failed at something that it does for all; the message is its own."""


def run_on_first(action: Callable[[], T], timeout_seconds: float) -> T:
    """Run an action on process 0 alone, and return its result on all processes when it is done.

    Every process calls it, equally often. No devices are used, so that none of their exchanges
    runs out of time while process 0 takes long.

    Args:
      action: what process 0 does; its result is of what JSON can hold, or None.
      timeout_seconds: longest time that the others wait.

    Raises:
      Exception: what the action raised, on process 0.
      FirstProcessError: with the same message, on the others.
    """
    if jax.process_count() == 1:
        return action()
    assert global_state.client is not None
    key = f"cotnet_jax/first_process/{next(_numbers)}"
    if jax.process_index() == 0:
        outcome: dict[str, Any] = {"error": "the first process was interrupted"}
        try:
            result = action()
            outcome = {"result": result}
        except Exception as error:
            outcome = {"error": str(error)}
            raise
        finally:
            global_state.client.key_value_set(key, json.dumps(outcome))
        return result
    text = global_state.client.blocking_key_value_get(key, int(1000 * timeout_seconds))
    outcome = json.loads(text)
    if "error" in outcome:
        raise FirstProcessError(f"process 0: {outcome['error']}")
    return outcome["result"]
