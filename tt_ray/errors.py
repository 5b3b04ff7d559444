"""The one exception that the command line turns into a single line and exit code 2."""


class UserError(Exception):
    """Something that the user can mend: says what is wrong, where, and what to do, in one line."""
