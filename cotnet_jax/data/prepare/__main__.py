"""``python -m cotnet_jax.data.prepare``, which is ``cotnet-prepare``."""

import sys

if __name__ == "__main__":
    from cotnet_jax.commands.prepare import main

    sys.exit(main())
