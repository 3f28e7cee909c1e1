"""`UsageError`: a mistake of the user, shown as one sentence."""


class UsageError(ValueError):
    """Something on the command line is wrong; the command prints the message on one rank and exits with code 2."""
