"""Python's garbage collector, out of the way of what makes many objects and little garbage."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collector() -> Iterator[None]:
    """Keep Python from looking again and again through all objects, until the block ends."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
