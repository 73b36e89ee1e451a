"""Exceptions that the command line reports as one sentence, without a traceback."""


class UserError(Exception):
    """An invalid input: the message says what is wrong, where, and what to do.

    Attributes:
        status: the exit status of the command line.
    """

    status = 2


class Unavailable(UserError):  # noqa: N818 - the message describes the error
    """A remote service does not respond; running the command again later may succeed."""

    status = 75  # EX_TEMPFAIL of sysexits.h


class Diverged(UserError):  # noqa: N818 - the message describes the error
    """Training diverged: loss or outputs are not finite, or the loss is far too large."""


class Preempted(Exception):  # noqa: N818 - not an error
    """The run was told to stop and has saved its state. Exit status 143."""


def reason(error: Exception) -> str:
    """The message of another library's exception, on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
