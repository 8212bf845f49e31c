"""The one exception that stands for bad input; the command line turns it into a sentence and exit code 2."""


class InputError(ValueError):
    """What the user gave does not fit.

    The message is one sentence for the user: what was found, what was expected, and which flag or key to change.
    """
