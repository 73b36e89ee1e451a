"""The one exception that a user's mistake may raise."""


class UserError(Exception):
    """A wrong input: its message is one sentence that says what, where, and what to do.

    The command line prints the message and exits with status 2; nothing is half-written.
    """
