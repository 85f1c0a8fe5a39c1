"""Convert PyTorch weights for JAX, and back: cotnet-convert, without installing."""

from cotnet_jax.commands.convert import main

if __name__ == "__main__":
    main()
