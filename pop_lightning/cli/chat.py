"""``pop-generate chat``: the terminal around a conversation."""

import sys
from collections.abc import Callable
from contextlib import closing

from pop_lightning.core.errors import InputError, Spelling
from pop_lightning.data.images import RowImage
from pop_lightning.generation.chat import Chat, Turn

HELP = """/full        the plain model answers from here on
/pop         the pruned model answers from here on
/image PATH  show an image with the next message; repeatable
/new         begin a new conversation
/quit        end (or Ctrl-D); Ctrl-C stops an answer"""


def converse(chat: Chat, spelling: Spelling, read: Callable[[str], str] = input, *, allow_urls: bool = False) -> None:
    """Read what the user says and print answers until ``/quit`` or the end of the input.

    Args:
        spelling: of recipe keys in errors.
        read: a line of input, after a prompt.
        allow_urls: whether images may be URLs.
    """
    waiting: list[RowImage] = []  # images for the next message
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
        try:
            if text.partition(" ")[0] == "/image":
                path = text.removeprefix("/image").strip()
                waiting.append(_image(chat, path, allow_urls))
                print(f"image {len(waiting)} of the next message: {path}", file=sys.stderr)
            elif text.startswith("/"):
                if text == "/new":
                    waiting.clear()
                print(_obey(chat, text), file=sys.stderr)
            elif text and _answer(chat, text, waiting):
                waiting.clear()
        except InputError as error:
            print(error.render(spelling), file=sys.stderr)


def _obey(chat: Chat, command: str) -> str:
    """Do what a command says; returns what to tell the user."""
    if command in ("/full", "/pop"):
        chat.use(full=command == "/full")
        return "the plain model answers" if chat.full else f"the model answers with {chat.generator.plan}"
    if command == "/new":
        chat.clear()
        return "a new conversation"
    return HELP


def _image(chat: Chat, path: str, allow_urls: bool) -> RowImage:
    if not path:
        raise InputError("/image needs the path of an image, as in /image photo.png.")
    if path[0] == path[-1] and path[0] in "'\"":  # as terminals write a file that is dropped on them
        path = path[1:-1]
    return chat.open(path, "/image", allow_urls=allow_urls)


def _answer(chat: Chat, text: str, images: list[RowImage]) -> bool:
    """Print the answer and its cost; False if it was interrupted, so that its images can be shown again."""
    try:
        with closing(chat.ask(text, images)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print("\n(stopped; this turn is not part of the conversation)", file=sys.stderr)
        return False
    print()
    print(cost(chat.turn), file=sys.stderr)
    return True


def cost(turn: Turn) -> str:
    """What a turn cost, in one line."""
    read = f"{turn.tokens} tokens, {turn.cached} of them cached"
    if turn.ttft is None:
        return f"({read}; an empty answer)"
    ours, other = ("pruned", "plain") if turn.pruned else ("plain", "pruned")
    measured = f"{read}; TTFT {1000 * turn.ttft:.0f} ms {ours}"
    if turn.other is None:
        return f"({measured})"
    return f"({measured}, about {1000 * turn.other:.0f} ms {other}, estimated from counted operations)"
