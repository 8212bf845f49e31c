"""Videos of rows, which are files or lists of images: their hashes, and their frames with timestamps.

``rows.py`` gives every row its videos, and ``processor.py`` opens them batch by batch, as it does images. A list of
frames needs no decoder; a file is read by Transformers' ``load_video`` with whichever decoder is installed.
"""

import hashlib
import importlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata, load_video

from pop_lightning.core.errors import InputError
from pop_lightning.data.images import RowImage
from pop_lightning.data.media import Medium, reading, reason

VIDEO = Medium(
    name="video",
    keys=("video", "path", "url", "base64", "bytes"),
    held=(bytes, bytearray, list, tuple),
    expected="a path, bytes, base64 text or a list of frames",
)
TIMING = ("fps", "video_metadata")  # further keys of a part
# Transformers' names of its decoders, the preferred one first, and the package of each. Its torchvision decoder
# is left out: it needs a torchvision older than the oldest PyTorch supported here.
_DECODERS = {"torchcodec": "torchcodec.decoders", "pyav": "av", "decord": "decord", "opencv": "cv2"}


@dataclass(frozen=True)
class RowVideo:
    """One video of a row; equal if the content and the frames that are shown are.

    Attributes:
        digest: SHA-256 of the encoded bytes or of the frames' digests, and of ``fps`` and ``metadata`` where given.
        source: a path, encoded bytes, the frames' images, or a callable that returns one of these.
        where: the row and the video's number in it, for messages.
        fps: frames per second: how many are sampled from a file, or how many a list of frames has; None means the
            processor's settings for a file and its default, 24, for a list.
        metadata: of given frames, fields of Transformers' ``VideoMetadata``.
    """

    digest: str
    source: Any = field(compare=False, repr=False)
    where: str = field(compare=False)
    fps: float | None = field(default=None, compare=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, given: Any, where: str, *, folder: Path | None = None, allow_urls: bool = False) -> "RowVideo":
        """From anything that :meth:`Medium.source` accepts, or a list of what it accepts for images: the frames.

        A part may give ``fps`` and, of frames, ``video_metadata``, as Transformers' processors call them.

        Raises:
            InputError: not a video source, a URL that is not allowed, or a file that does not exist.
        """
        source = VIDEO.source(given, where, folder, allow_urls)
        opened = partial(_opened, where=where, folder=folder, allow_urls=allow_urls)
        source = partial(_called, source, opened) if callable(source) else opened(source)
        part = given if isinstance(given, Mapping) else {}
        # A callable source has to be called to see whether it returns frames.
        shown = source() if callable(source) and part.get("video_metadata") else source
        fps, metadata = _timing(part, shown, where)
        return cls(_digest(shown, where, fps, metadata), source, where, fps, metadata)

    def open(self, sampling: Callable[[float | None], Callable | None]) -> tuple[np.ndarray, VideoMetadata]:
        """The frames that are shown, uint8 ``[frames, height, width, 3]``, and their times.

        Args:
            sampling: from :attr:`fps` to what picks a file's frames, as ``load_video`` calls it; None for all of them.

        Raises:
            InputError: it is not a video, is truncated, has changed since the row was read, or no decoder is installed.
        """
        source = self.source() if callable(self.source) else self.source
        if _digest(source, self.where, self.fps, self.metadata) != self.digest:
            raise InputError(f"{self.where} has changed since its row was read: start the run again.")
        if isinstance(source, tuple):
            return self._given(source)
        if isinstance(source, Path):
            return self._decoded(source, sampling(self.fps))
        with tempfile.NamedTemporaryFile() as file:  # not every decoder reads from memory
            file.write(source)
            file.flush()
            return self._decoded(Path(file.name), sampling(self.fps))

    def _given(self, images: tuple[RowImage, ...]) -> tuple[np.ndarray, VideoMetadata]:
        frames = [np.asarray(image.open()) for image in images]
        sizes = sorted({frame.shape[1::-1] for frame in frames})
        if len(sizes) > 1:
            raise InputError(
                f"{self.where} has frames of {sizes[0][0]}x{sizes[0][1]} and {sizes[1][0]}x{sizes[1][1]} pixels: "
                "expected frames of one size."
            )
        (width, height), count = sizes[0], len(frames)
        known = {"total_num_frames": count, "fps": self.fps, "width": width, "height": height}
        return np.stack(frames), VideoMetadata(**{**known, "frames_indices": list(range(count)), **self.metadata})

    def _decoded(self, path: Path, sample: Callable | None) -> tuple[np.ndarray, VideoMetadata]:
        decoder = _decoder()
        if decoder is None:
            raise InputError(
                f"{self.where} is a file, and no package that decodes videos is installed: pip install av (or "
                "torchcodec), or give the video as a list of frames."
            )
        try:
            frames, metadata = load_video(str(path), backend=decoder, sample_indices_fn=sample)
            if not len(frames) or len(frames) != len(metadata.frames_indices):
                raise ValueError(f"{len(frames)} of {len(metadata.frames_indices)} frames can be read")
        except Exception as error:  # every decoder raises its own exceptions, all about the file
            raise InputError(f"{self.where} is damaged or not a video ({decoder}: {reason(error)}).") from error
        if isinstance(frames, torch.Tensor):  # torchcodec has the channels in front
            frames = frames.permute(0, 2, 3, 1).numpy()
        return frames, metadata


def _opened(source: Any, where: str, folder: Path | None, allow_urls: bool) -> Path | bytes | tuple[RowImage, ...]:
    """A source in its final form: for a list, every frame as a :class:`RowImage` with its own digest."""
    if isinstance(source, (Path, bytes)):
        return source
    if isinstance(source, bytearray):
        return bytes(source)
    if not source:
        raise InputError(f"{where} is an empty list: expected its frames.")
    return tuple(
        RowImage.of(frame, f"{where}, frame {number}", folder=folder, allow_urls=allow_urls)
        for number, frame in enumerate(source, start=1)
    )


def _called(source: Callable[[], Any], opened: Callable[[Any], Any]) -> Any:
    return opened(source())


def _timing(part: Mapping, source: Any, where: str) -> tuple[float | None, dict[str, Any]]:
    """``fps`` and ``video_metadata`` of a part, without null values."""
    fps, metadata = (part.get(key) for key in TIMING)
    _check_above_zero(fps, "fps", where)
    if not metadata:
        return fps, {}
    if not isinstance(source, tuple):
        raise InputError(f'{where} is a file with "video_metadata", which needs a list of frames: remove it.')
    names = [each.name for each in fields(VideoMetadata)]
    if not isinstance(metadata, Mapping) or not metadata.keys() <= set(names):
        raise InputError(f'{where} has "video_metadata" {metadata!r}: expected an object of {", ".join(names)}.')
    for name in ("fps", "total_num_frames"):  # processors divide by both
        _check_above_zero(metadata.get(name), name, f'{where}, "video_metadata"')
    indices = metadata.get("frames_indices")
    if indices is not None and not (
        isinstance(indices, list)
        and len(indices) == len(source)
        and all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in indices)
    ):
        raise InputError(
            f'{where} has {len(source)} frames and "frames_indices" {indices!r}: expected a whole number of at least '
            "0 for each."
        )
    return fps, {name: value for name, value in metadata.items() if value is not None}


def _check_above_zero(number: Any, name: str, where: str) -> None:
    if number is None:
        return
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < float("inf"):
        raise InputError(f'{where} has "{name}" {number!r}: expected a number above 0.')


def _digest(source: Any, where: str, fps: float | None, metadata: Mapping[str, Any]) -> str:
    if callable(source):
        source = source()
    if isinstance(source, tuple):
        digest = hashlib.sha256(" ".join(image.digest for image in source).encode()).hexdigest()
    elif isinstance(source, Path):
        digest = reading(source, where, _hash_of_file)
    else:
        digest = hashlib.sha256(source).hexdigest()
    if fps is None and not metadata:
        return digest
    return hashlib.sha256(f"{digest} {fps} {sorted(metadata.items())}".encode()).hexdigest()


def _hash_of_file(path: Path) -> str:
    with path.open("rb") as file:  # a block at a time: a video need not fit in memory
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache  # otherwise a package that does not load would be tried again for every video
def _decoder() -> str | None:
    """Transformers' name of the first decoder whose package loads; torchcodec does not load without FFmpeg."""
    for name, package in _DECODERS.items():
        try:
            importlib.import_module(package)
        except Exception:
            continue
        return name
    return None
