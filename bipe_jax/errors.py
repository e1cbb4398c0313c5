"""The one exception for what a user can put right."""


class UserError(Exception):
    """A wrong input. Its text is one line that names the file, key or value and what to do.

    The command-line programs print that line and exit with status 1, without a traceback.
    """
