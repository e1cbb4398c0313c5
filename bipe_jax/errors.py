"""Errors that a user can put right, and the exit codes that supervisors act on."""

DONE = 0  # all steps are done and evaluated
USER_ERROR = (
    1  # a UserError, which another start would meet again; Python's code of a traceback too
)
PREEMPTED = 42  # stopped from outside, after saving: to be started again
LOST = 43  # another process of the run died or was lost: to be started again


class UserError(Exception):
    """A wrong input. Its text is one line that names the file, key or value and what to do.

    The commands print that line and exit with status 1, without a traceback.
    """


class Transient(UserError):
    """A failure that another start may not meet again, such as a disk that is full."""
