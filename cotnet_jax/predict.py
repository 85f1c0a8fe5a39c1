"""``python -m cotnet_jax.predict``, which is ``cotnet-predict``."""

if __name__ == "__main__":
    from cotnet_jax.commands.predict import main

    main()
