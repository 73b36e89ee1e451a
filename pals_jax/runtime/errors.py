"""What the command line reports as one sentence, without a traceback."""


class UserError(Exception):
    """A wrong input: its message says what is wrong, where, and what to do.

    Attributes:
        status: with which the command line ends.
    """

    status = 2


class Unavailable(UserError):  # noqa: N818 - the sentence says what
    """What is elsewhere does not answer, and may later: who starts runs may try again."""

    status = 75  # EX_TEMPFAIL of sysexits.h


class Diverged(UserError):  # noqa: N818 - the sentence says what
    """A training whose loss or outputs are not finite, or far too large."""


class Preempted(Exception):  # noqa: N818 - nothing went wrong
    """A run that was told to stop and has saved where it stands. Exit status 143."""


def reason(error: Exception) -> str:
    """What another library says in its exception, fit for a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__
