"""The one exception type that a user's mistake may raise."""


class UserError(Exception):
    """Something the user can mend.

    The message names the file, line or flag that is wrong and says what to do; the command line prints it
    without a traceback and exits with status 2. Anything else that escapes is our bug and keeps its traceback.
    """
