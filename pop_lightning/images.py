"""Images of rows: where their bytes are, what they hash to, and the processor that turns them into tensors.

``rows.py`` gives every row its images, and batches ask for their tensors. Bytes are read and decoded when a
tensor is wanted, so that no decoded image is held for a row that waits.
"""

import base64
import binascii
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname, urlopen

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from pop_lightning.errors import InputError

KEYS = ("image", "path", "url", "base64", "bytes")  # of an image part, as in Transformers; bytes as `datasets` has them
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class RowImage:
    """One image of a row; equal where the content is.

    Attributes:
        digest: SHA-256 of the encoded bytes (of a PIL image: of its pixels).
        source: a path, encoded bytes, a PIL image, or a call that gives one of these.
        where: the row and the image's place in it, for messages.
    """

    digest: str
    source: Any = field(compare=False, repr=False)
    where: str = field(compare=False)

    @classmethod
    def of(cls, given: Any, where: str, *, folder: Path | None = None, allow_urls: bool = False) -> "RowImage":
        """From what stands in a row: a path, bytes, base64 text, a PIL image, a part or ``datasets``' pair of
        ``bytes`` and ``path``.

        Args:
            folder: what relative paths are relative to; the working directory unless given.
            allow_urls: whether ``http`` addresses may be fetched; what was fetched is held, not decoded.

        Raises:
            InputError: nothing of the kind, a URL that is not allowed, or a file that is not there.
        """
        source = _source(given, where, folder, allow_urls)
        return cls(_digest(_content(source, where), where), source, where)

    def open(self) -> Image.Image:
        """The decoded image, RGB, turned as its EXIF tag says.

        Raises:
            InputError: it is no image, is cut short, or holds something else than when the row was read.
        """
        content = _content(self.source, self.where)
        if _digest(content, self.where) != self.digest:
            raise InputError(f"{self.where} has changed since its row was read: start the run again.")
        try:
            image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
            return load_image(image)
        except UnidentifiedImageError as error:
            raise InputError(f"{self.where} is damaged or no image: its format is unknown.") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.where} is damaged or no image ({_reason(error)}).") from error


def _source(given: Any, where: str, folder: Path | None, allow_urls: bool) -> Any:
    if isinstance(given, Mapping):
        # datasets' pair names the file its bytes came from, which need not lie here.
        found = sorted((key for key in given if key in KEYS and given[key] is not None), key=KEYS.index)
        key = "bytes" if "bytes" in found else next(iter(found), None)
        if key is None:
            raise InputError(f"{where} names no image: expected one of the keys {', '.join(KEYS)}.")
        if key == "base64":
            return _decoded(given[key], where)
        return _source(given[key], where, folder, allow_urls)
    if callable(given):
        return partial(_called, given, where, folder, allow_urls)
    if isinstance(given, (bytes, bytearray, Image.Image)):
        return given
    if isinstance(given, Path) or (isinstance(given, str) and given.strip()):
        text = str(given)
        if text.startswith(("http://", "https://")):
            if not allow_urls:
                raise InputError(
                    f"{where} is the URL {text!r}, and nothing is fetched unless data.allow_urls: true says so; or "
                    "give the image as a file."
                )
            return _fetched(text, where)
        if text.startswith("data:image/"):
            return _decoded(text, where)
        if text.startswith("file://"):
            text = url2pathname(urlparse(text).path)
        try:
            path = Path(text).expanduser()
        except RuntimeError as error:
            raise InputError(f"{where}: the path {text!r} names a home folder that is not there.") from error
        return path if path.is_absolute() or folder is None else folder / path
    raise InputError(f"{where} is a {type(given).__name__}: expected a path, bytes, base64 text or a PIL image.")


def _called(given: Callable[[], Any], where: str, folder: Path | None, allow_urls: bool) -> Any:
    """What a source that is read when it is wanted turns out to be."""
    return _source(given(), where, folder, allow_urls)


def _decoded(text: Any, where: str) -> bytes:
    try:
        if not isinstance(text, str):
            raise ValueError
        head, comma, body = text.partition(",")
        return base64.b64decode(body if comma and head.startswith("data:") else text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise InputError(f"{where} is no base64 text.") from error


def _fetched(url: str, where: str) -> bytes:
    try:
        with urlopen(url, timeout=60) as answer:
            return answer.read()
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {url!r} cannot be fetched ({_reason(error)}).") from error


def _content(source: Any, where: str) -> bytes | Image.Image:
    """The encoded bytes behind a source; a PIL image stays one."""
    if callable(source):
        source = source()
    if not isinstance(source, Path):
        return bytes(source) if isinstance(source, bytearray) else source
    try:
        return source.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{where}: the file {str(source)!r} does not exist.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: the file {str(source)!r} cannot be read ({_reason(error)}).") from error


def _digest(content: bytes | Image.Image, where: str) -> str:
    if isinstance(content, Image.Image):
        try:
            content = f"{content.mode} {content.size} ".encode() + content.tobytes()
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{where} is damaged or no image ({_reason(error)}).") from error
    return hashlib.sha256(content).hexdigest()


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


class VisionProcessor:
    """The base's processor, loaded when the first image comes: text alone needs none.

    Args:
        load: gives the processor, or raises :class:`InputError` with the reason why there is none.
        tokens: the tokens that stand for one feature each: of an image and, where the model reads them, of a video.
    """

    def __init__(self, load: Callable[[], ProcessorMixin], tokens: Sequence[int]):
        self._load, self.tokens = load, tuple(tokens)

    @cached_property
    def processor(self) -> ProcessorMixin:
        return self._load()

    @property
    def chat_template(self) -> str | None:
        return getattr(self.processor, "chat_template", None) or self.processor.tokenizer.chat_template

    def encode(self, text: str, images: Sequence[RowImage], where: str, *, special: bool) -> list[int]:
        """Token ids of a text in which every placeholder is expanded to as many tokens as its image has features.

        Args:
            special: whether the tokenizer adds its own bos and the like.

        Raises:
            InputError: an image is damaged, or placeholders and images do not match; the message names ``where``.
        """
        placeholder, tokenizer = self.processor.image_token, self.processor.tokenizer
        bare = tokenizer(text.replace(placeholder, ""), add_special_tokens=False, verbose=False)["input_ids"]
        strays = sum(map(bare.count, self.tokens))
        if text.count(placeholder) != len(images) or strays:
            raise InputError(
                f"{where} has {len(images)} images, and its prompt holds {placeholder!r} {text.count(placeholder)} "
                f"times and {strays} image tokens besides: expected {placeholder!r} once for each image and no other "
                "image token."
            )
        opened = [image.open() for image in images]
        try:
            ids = self.processor(text=[text], images=[opened], add_special_tokens=special)["input_ids"][0]
        except (ValueError, TypeError) as error:  # an image that the processor will not take, such as a thin line
            raise InputError(f"{where} has an image that the processor refuses: {_reason(error)}.") from error
        return [int(token) for token in ids]

    def ask(self, text: str, images: Sequence[RowImage], where: str) -> list[int]:
        """Token ids of a user's turn that shows some images and asks something, up to where the answer starts.

        Raises:
            InputError: an image is damaged, or the base has no chat template.
        """
        if not self.chat_template:
            raise InputError(f"{where} goes through a chat template, and the base has none: give --data with prompts.")
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        rendered = self.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        return self.encode(rendered, images, where, special=False)

    def tensors(self, rows: Sequence[Sequence[RowImage]]) -> dict[str, Tensor]:
        """What the model's forward wants of the images of some rows, in order; empty where there are none.

        Raises:
            InputError: an image can no longer be read.
        """
        rows = [images for images in rows if images]
        if not rows:
            return {}
        texts = [self.processor.image_token * len(images) for images in rows]
        found: BatchFeature = self.processor(
            text=texts, images=[[image.open() for image in images] for images in rows], padding=True,
            return_tensors="pt",
        )  # fmt: skip
        unused = {*_TEXT, *getattr(self.processor, "unused_input_names", ())}
        return {name: torch.as_tensor(tensor) for name, tensor in found.items() if name not in unused}
