"""The one error that is the user's to mend."""


class UsageError(Exception):
    """Bad input, said in one line that names the option or file, what it holds and what would be accepted."""
