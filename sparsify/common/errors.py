"""The error of this package."""


class SparsifyError(ValueError):
    """Input that a user can mend; the message states the value, the rule and the fix.

    The command line prints the message alone.
    """
