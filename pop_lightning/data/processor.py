"""The base's processor: from a text with images and videos to token ids, and to the tensors of a batch.

``rows.py`` uses it for a row's token ids, ``module.py`` for the tensors of a batch.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    BatchFeature,
    ProcessorMixin,
)

from pop_lightning.core.bundled import resolve_bundled
from pop_lightning.core.errors import InputError, Key, first_sentence
from pop_lightning.data.images import RowImage
from pop_lightning.data.media import reason
from pop_lightning.data.videos import RowVideo
from pop_lightning.models.loading import hub_unreached

_NOT_FEATURES = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "video_metadata")


class VisionProcessor:
    """The base's processor, loaded with the first image or video, because text does not need it.

    Args:
        load: returns the processor, or raises :class:`InputError` with the reason why there is none.
        tokens: the tokens that represent one feature each: of an image and, where the model reads them, of a video.
    """

    def __init__(self, load: Callable[[], ProcessorMixin], tokens: Sequence[int]):
        self._load, self.tokens = load, tuple(tokens)

    @cached_property
    def processor(self) -> ProcessorMixin:
        return self._load()

    @property
    def chat_template(self) -> str | None:
        return getattr(self.processor, "chat_template", None) or self.processor.tokenizer.chat_template

    def check(self, images: Sequence[RowImage], videos: Sequence[RowVideo]) -> None:
        """Raise :class:`InputError` if the processor does not load, or there are videos and it does not read any."""
        if videos and len(self.tokens) < 2:
            raise InputError(
                "the model reads only images",
                advice=("give single frames as images, or change ", Key("model.base"), " to a model that reads videos"),
            )
        processor = self.processor if images or videos else None
        if videos and getattr(processor, "video_processor", None) is None:
            raise InputError(
                "the base has no video processor (video_preprocessor_config.json), which videos need",
                advice=("set ", Key("model.base"), " to one that has it, or leave the videos out"),
            )

    def encode(
        self, text: str, images: Sequence[RowImage], videos: Sequence[RowVideo], where: str, *, special: bool
    ) -> list[int]:
        """Token ids of a text in which every placeholder is expanded to as many tokens as there are features.

        Args:
            special: whether the tokenizer adds its own bos and the like.

        Raises:
            InputError: an image or a video is damaged, or placeholders do not match them; the message names ``where``.
        """
        self._check_placeholders(text, images, videos, where)
        shown = self._shown([(images, videos)])
        try:
            ids = self.processor(text=[text], add_special_tokens=special, **shown)["input_ids"][0]
        except (ValueError, TypeError) as error:  # input that the processor rejects, such as a very narrow image
            kind = "an image" if not videos else "a video" if not images else "an image or a video"
            raise InputError(f"{where} has {kind} that the processor refuses: {reason(error)}.") from error
        return [int(token) for token in ids]

    def ask(self, text: str, images: Sequence[RowImage], videos: Sequence[RowVideo], where: str) -> list[int]:
        """Token ids of a user's turn that shows images, then videos, and asks something, up to where the answer starts.

        Raises:
            InputError: an image or a video is damaged, or the base has no chat template.
        """
        if not self.chat_template:
            raise InputError(f"{where} needs a chat template, and the base has none: give --data with prompts.")
        kinds = ["image"] * len(images) + ["video"] * len(videos)
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]
        rendered = self.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        return self.encode(rendered, images, videos, where, special=False)

    def tensors(self, rows: Sequence[tuple[Sequence[RowImage], Sequence[RowVideo]]]) -> dict[str, Tensor]:
        """The arguments of the model's forward for the images and videos of some rows, in order; empty without any.

        Raises:
            InputError: an image or a video can no longer be read.
        """
        rows = [(images, videos) for images, videos in rows if images or videos]
        if not rows:
            return {}
        texts = [
            self.processor.image_token * len(images) + (self._video_token or "") * len(videos)
            for images, videos in rows
        ]
        features: BatchFeature = self.processor(text=texts, padding=True, return_tensors="pt", **self._shown(rows))
        unused = {*_NOT_FEATURES, *getattr(self.processor, "unused_input_names", ())}
        return {name: torch.as_tensor(tensor) for name, tensor in features.items() if name not in unused}

    @property
    def _video_token(self) -> str | None:
        """The placeholder of a video in a text; None if the model reads no videos."""
        return getattr(self.processor, "video_token", None) if len(self.tokens) > 1 else None

    def _check_placeholders(
        self, text: str, images: Sequence[RowImage], videos: Sequence[RowVideo], where: str
    ) -> None:
        tokenizer, bare = self.processor.tokenizer, text
        kinds = (("image", self.processor.image_token, images), ("video", self._video_token, videos))
        for kind, token, given in kinds:
            if token is None:
                continue
            if text.count(token) != len(given):
                raise InputError(
                    f"{where} has {len(given)} {kind}s, and its prompt holds {token!r} {text.count(token)} times: "
                    f"expected one for each {kind}."
                )
            bare = bare.replace(token, "")
        ids = tokenizer(bare, add_special_tokens=False, verbose=False)["input_ids"]
        for feature, (kind, token, _) in zip(self.tokens, kinds, strict=False):
            strays = ids.count(feature)
            if strays:
                besides = "" if token is None else f" in addition to {token!r}, the placeholder for each {kind}"
                raise InputError(f"{where} has {strays} {kind} tokens in its prompt{besides}: remove them.")

    def _shown(self, rows: Sequence[tuple[Sequence[RowImage], Sequence[RowVideo]]]) -> dict[str, Any]:
        """The processor's arguments for the images and videos of some rows, opened."""
        arguments: dict[str, Any] = {}
        if any(images for images, _ in rows):
            arguments["images"] = [[image.open() for image in images] for images, _ in rows]
        if any(videos for _, videos in rows):
            opened = [video.open(self._sampling) for _, videos in rows for video in videos]
            arguments["videos"] = [frames for frames, _ in opened]
            # Files are sampled while they are decoded; of a list of frames all are shown.
            arguments["videos_kwargs"] = {
                "video_metadata": [metadata for _, metadata in opened],
                "do_sample_frames": False,
                "input_data_format": "channels_last",
            }
        return arguments

    def _sampling(self, fps: float | None) -> Callable | None:
        """The function that picks a file's frames, as the processor would: by its settings, or ``fps`` per second."""
        processor = self.processor.video_processor
        if fps is None and not getattr(processor, "do_sample_frames", False):
            return None
        settings = {name: getattr(processor, name, None) for name in processor.valid_kwargs.__annotations__}
        if fps is not None:
            settings |= {"fps": fps, "num_frames": None}
        return partial(processor.sample_frames, **settings)


def vision_processor(
    tokens: Sequence[int], name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> VisionProcessor | None:
    """The base's processor, not loaded yet; None without vision tokens (``Decoder.vision_tokens``): a text model."""
    if not tokens:
        return None
    load = partial(load_processor, name, revision=revision, trust_remote_code=trust_remote_code)
    return VisionProcessor(load, tokens)


def load_processor(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ProcessorMixin:
    """The processor that makes a base's inputs from text with images and videos.

    Raises:
        InputError: there is none, or a package that it needs is missing.
    """
    try:
        processor = AutoProcessor.from_pretrained(
            resolve_bundled(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if hub_unreached(error):
            raise InputError(
                f"{name!r} has no processor on this machine, and huggingface.co could not be reached",
                key="model.base",
                advice="check the connection",
            ) from error
        raise InputError(
            f"{name!r} has no processor that loads, which images and videos need: {first_sentence(error)}",
            key="model.base",
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise InputError(
            f"{name!r} has no image processor (preprocessor_config.json), which images need", key="model.base"
        )
    return processor
