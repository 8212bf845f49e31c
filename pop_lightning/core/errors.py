"""The one exception that stands for bad input, and its words; the command line turns it into exit code 2."""


class InputError(ValueError):
    """What the user gave does not fit.

    The message is one sentence for the user: what was found, what was expected, and which flag or key to change.
    """


def on_process(problem: str, number: int) -> str:
    """The sentence ``problem`` with the process that met it; the first one goes without saying."""
    return f"{problem.rstrip('.')} (on process {number})." if number else problem


def first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."
