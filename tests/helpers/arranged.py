"""What a process of an arrangement does in a test: say what it sees, fail, or not end."""

import time

import jax

from cotnet_jax.tools import arrangements

if __name__ == "__main__":
    task = arrangements.this_process()
    assert task is not None
    if task["does"] == "fail" and jax.process_index() == jax.process_count() - 1:
        raise SystemExit("no memory left")
    if task["does"] != "say":
        time.sleep(60)
    arrangements.pass_on([jax.process_count(), jax.device_count(), jax.local_device_count()])
