"""``pop-generate chat``: the terminal around a conversation."""

import sys
from collections.abc import Callable
from contextlib import closing

from pop_lightning.core.errors import InputError, Spelling
from pop_lightning.generation.chat import Chat, Turn

HELP = """/full  the plain model answers from here on
/pop   the pruned model answers from here on
/new   begin a new conversation
/quit  end (or Ctrl-D); Ctrl-C stops an answer"""


def converse(chat: Chat, spelling: Spelling, read: Callable[[str], str] = input) -> None:
    """Read what the user says and print answers until ``/quit`` or the end of the input.

    Args:
        spelling: of recipe keys in errors.
        read: a line of input, after a prompt.
    """
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print(HELP, file=sys.stderr)
    while True:
        try:
            text = read(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            break
        if text == "/quit":
            break
        if text.startswith("/"):
            print(_obey(chat, text), file=sys.stderr)
        elif text:
            _answer(chat, text, spelling)


def _obey(chat: Chat, command: str) -> str:
    """Do what a command says; returns what to tell the user."""
    if command in ("/full", "/pop"):
        chat.use(full=command == "/full")
        return "the plain model answers" if chat.full else f"the model answers with {chat.generator.plan}"
    if command == "/new":
        chat.clear()
        return "a new conversation"
    return HELP


def _answer(chat: Chat, text: str, spelling: Spelling) -> None:
    try:
        with closing(chat.ask(text)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print("\n(stopped; this turn is not part of the conversation)", file=sys.stderr)
        return
    except InputError as error:
        print(error.render(spelling), file=sys.stderr)
        return
    print()
    print(cost(chat.turn), file=sys.stderr)


def cost(turn: Turn) -> str:
    """What a turn cost, in one line."""
    read = f"{turn.tokens} tokens, {turn.cached} of them cached"
    if turn.ttft is None:
        return f"({read}; an empty answer)"
    ours, other = ("pruned", "plain") if turn.pruned else ("plain", "pruned")
    estimate = f"about {1000 * turn.other:.0f} ms {other}, estimated from counted operations"
    return f"({read}; TTFT {1000 * turn.ttft:.0f} ms {ours}, {estimate})"
