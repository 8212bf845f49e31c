"""Locates the bytes of an image or a video of a row: a path, a URL, base64 text or the bytes themselves.

``images.py`` and ``videos.py`` decode them. Only bytes that were fetched or came as base64 text are kept in memory.
"""

import base64
import binascii
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse
from urllib.request import HTTPRedirectHandler, build_opener, url2pathname

from pop_lightning.core.errors import InputError, Key

# Limits on one download, so that a wrong URL cannot fill the memory or stall a run.
MOST_BYTES = 256 << 20
MOST_SECONDS = 60


@dataclass(frozen=True)
class Medium:
    """A kind of media that a row can have: images or videos.

    Attributes:
        name: the type of its parts in a message.
        keys: of such a part, as in Transformers; ``bytes`` as in ``datasets``. The first key that is present counts,
            ``bytes`` before all others.
        held: types that are accepted as they are.
        expected: what is valid, for messages.
    """

    name: str
    keys: tuple[str, ...]
    held: tuple[type, ...]
    expected: str

    def named(self, part: Mapping) -> bool:
        """Whether a part names its source itself, instead of leaving that to a list next to the text."""
        return any(part.get(key) is not None for key in self.keys)

    def source(self, given: Any, where: str, folder: Path | None = None, allow_urls: bool = False) -> Any:
        """From an entry of a row to a path, something of the types ``held``, or a callable that returns one of these.

        Args:
            given: a path, a URL, base64 text, something ``held``, a part, or ``datasets``' pair of ``bytes`` and
                ``path``.
            where: the row and the number in it, for messages.
            folder: what relative paths are relative to; the working directory unless given.
            allow_urls: whether ``http`` addresses may be fetched.

        Raises:
            InputError: not such a source, or a URL that is not allowed or cannot be fetched.
        """
        if isinstance(given, Mapping):
            # datasets' pair also names the file that its bytes came from, which may not exist here.
            found = sorted((key for key in given if key in self.keys and given[key] is not None), key=self.keys.index)
            key = "bytes" if "bytes" in found else next(iter(found), None)
            if key is None:
                raise InputError(f"{where} names no {self.name}: expected one of the keys {', '.join(self.keys)}.")
            if key == "base64":
                return _decoded(given[key], where)
            return self.source(given[key], where, folder, allow_urls)
        if callable(given):
            return partial(self._called, given, where, folder, allow_urls)
        if isinstance(given, self.held):
            return given
        if isinstance(given, Path) or (isinstance(given, str) and given.strip()):
            text = str(given)
            if text.startswith(("http://", "https://")):
                if not allow_urls:
                    raise InputError(
                        f"{where} is the URL {text!r}, and URLs are not fetched by default",
                        advice=("set ", Key("data.allow_urls", "true"), f" or give the {self.name} as a file"),
                    )
                return _fetched(text, where)
            if text.startswith(f"data:{self.name}/"):
                return _decoded(text, where)
            if text.startswith("file://"):
                text = url2pathname(urlparse(text).path)
            try:
                path = Path(text).expanduser()
            except RuntimeError as error:
                raise InputError(f"{where}: the path {text!r} names a home folder that does not exist.") from error
            return path if path.is_absolute() or folder is None else folder / path
        raise InputError(f"{where} is a {type(given).__name__}: expected {self.expected}.")

    def _called(self, given: Callable[[], Any], where: str, folder: Path | None, allow_urls: bool) -> Any:
        """Resolve a callable source once it is read."""
        return self.source(given(), where, folder, allow_urls)


def _decoded(text: Any, where: str) -> bytes:
    try:
        if not isinstance(text, str):
            raise ValueError
        head, comma, body = text.partition(",")
        return base64.b64decode(body if comma and head.startswith("data:") else text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise InputError(f"{where} is not base64 text.") from error


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, but not from another host into this machine or its private network."""

    def redirect_request(self, request, file, code, message, headers, address):
        host = urlparse(address).hostname
        if host != urlparse(request.full_url).hostname and not _is_public(host):
            raise URLError(f"it redirects to {host}, which is not a public address")
        return super().redirect_request(request, file, code, message, headers, address)


def _is_public(host: str | None) -> bool:
    found = {each[4][0] for each in socket.getaddrinfo(host, None)} if host else set()
    return bool(found) and all(ipaddress.ip_address(each.partition("%")[0]).is_global for each in found)


def _fetched(url: str, where: str) -> bytes:
    """What a URL holds: at most :data:`MOST_BYTES`, within :data:`MOST_SECONDS` in all."""
    found: list[bytes | Exception] = []

    def fetch() -> None:
        try:
            found.append(_downloaded(url))
        except (OSError, HTTPException, ValueError) as error:
            found.append(error)

    # A socket's timeout counts from every byte on, so a server that sends its headers slowly would never meet one.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(MOST_SECONDS)
    content = found[0] if found else ValueError(_late())
    if isinstance(content, Exception):
        raise InputError(f"{where}: {url!r} cannot be fetched ({reason(content)}).") from content
    return content


def _late() -> str:
    return f"it took longer than {MOST_SECONDS} seconds"


def _downloaded(url: str) -> bytes:
    end, found = time.monotonic() + MOST_SECONDS, bytearray()
    with build_opener(_Redirects).open(url, timeout=MOST_SECONDS) as answer:
        while part := answer.read1(1 << 20):
            found += part
            if len(found) > MOST_BYTES:
                raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
            if time.monotonic() > end:
                raise ValueError(_late())
        if answer.length:  # announced by the server and not sent
            raise IncompleteRead(bytes(found), answer.length)
    return bytes(found)


def reading(path: Path, where: str, read: Callable[[Path], Any]) -> Any:
    """``read(path)``; :class:`InputError` if the file does not exist or cannot be read."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe or a device may never end
            raise ValueError("it is not a regular file")
        return read(path)
    except FileNotFoundError as error:
        raise InputError(f"{where}: the file {str(path)!r} does not exist.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: the file {str(path)!r} cannot be read ({reason(error)}).") from error


def reason(error: Exception) -> str:
    """The first line of an exception's message, to be quoted in ours."""
    text = str(getattr(error, "strerror", None) or error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
