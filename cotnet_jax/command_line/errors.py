"""Messages of errors, as parts of other messages."""

# So many characters of another error's message are shown.
_MOST_CHARACTERS = 200


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's message, or its type's name where it has none.

    JAX's services and libraries append lines that only their developers can read.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:_MOST_CHARACTERS] if lines else type(error).__name__
