"""The one exception that stands for a mistake in what the user gave."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Bad input. The message names the file or flag, what was found, and the mend.

    Commands print it without a traceback and exit with status 2.
    """
