"""Errors a user can act on: one line that names what is wrong and where."""


class InputError(ValueError):
    """Bad input; the message names the file, layer, iteration or value at fault, in one line.

    The command lines print the message without a traceback and exit with status 2.
    """
