"""Images of rows: their hashes and their pixels.

``rows.py`` gives every row its images, and ``processor.py`` opens them batch by batch. Bytes are read and decoded only
when a tensor is needed, so that no decoded image is kept for a row that waits.
"""

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from transformers.image_utils import load_image

from pop_lightning.core.errors import InputError
from pop_lightning.data.media import Medium, reading, reason

IMAGE = Medium(
    name="image",
    keys=("image", "path", "url", "base64", "bytes"),
    held=(bytes, bytearray, Image.Image),
    expected="a path, bytes, base64 text or a PIL image",
)


@dataclass(frozen=True)
class RowImage:
    """One image of a row; equal if the content is.

    Attributes:
        digest: SHA-256 of the encoded bytes (of a PIL image: of its pixels).
        source: a path, encoded bytes, a PIL image, or a callable that returns one of these.
        where: the row and the image's number in it, for messages.
    """

    digest: str
    source: Any = field(compare=False, repr=False)
    where: str = field(compare=False)

    @classmethod
    def of(cls, given: Any, where: str, *, folder: Path | None = None, allow_urls: bool = False) -> "RowImage":
        """From anything that :meth:`Medium.source` accepts; fetched bytes are kept, not decoded.

        Raises:
            InputError: not an image source, a URL that is not allowed, or a file that does not exist.
        """
        source = IMAGE.source(given, where, folder, allow_urls)
        return cls(_digest(_content(source, where), where), source, where)

    def open(self) -> Image.Image:
        """The decoded image, RGB, turned as its EXIF tag says.

        Raises:
            InputError: it is not an image, is truncated, or has changed since the row was read.
        """
        content = _content(self.source, self.where)
        if _digest(content, self.where) != self.digest:
            raise InputError(f"{self.where} has changed since its row was read: start the run again.")
        try:
            image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
            return load_image(image)
        except UnidentifiedImageError as error:
            raise InputError(f"{self.where} is damaged or not an image: its format is unknown.") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.where} is damaged or not an image ({reason(error)}).") from error


def _content(source: Any, where: str) -> bytes | Image.Image:
    """The encoded bytes of a source; a PIL image is returned as it is."""
    if callable(source):
        source = source()
    if isinstance(source, Path):
        return reading(source, where, Path.read_bytes)
    return bytes(source) if isinstance(source, bytearray) else source


def _digest(content: bytes | Image.Image, where: str) -> str:
    if isinstance(content, Image.Image):
        try:
            content = f"{content.mode} {content.size} ".encode() + content.tobytes()
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{where} is damaged or not an image ({reason(error)}).") from error
    return hashlib.sha256(content).hexdigest()
