"""The one error that people who use tavlad can mend themselves; it imports nothing, and every room may import it."""


class UserError(ValueError):
    """What the user can mend: the message names the file, key or field, and the remedy.

    The command line prints it as one sentence, without a traceback, and exits with code 2. Everything else that is
    raised is a mistake of ours or of a library: it keeps its traceback.
    """
