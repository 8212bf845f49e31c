"""Reads files, folders and data sets into examples: plain dictionaries of the known shapes, each with its origin.

The first step of the data flow: ``rows.py`` tokenizes what is read here. Images and videos are kept separate from the
text and are not read yet.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path

from pop_lightning.core.bundled import resolve_bundled
from pop_lightning.core.errors import InputError, Key, first_sentence, show
from pop_lightning.data.images import IMAGE
from pop_lightning.data.videos import VIDEO

_CALIBRATION = "data.calibration"
SHAPES = '{"prompt", "response"}, {"prompt", "completion"}, {"messages"}, {"prompt"} or {"text"}'
_KEYS = ("messages", "prompt", "response", "completion", "text")
_TABLES = {".csv": "csv", ".parquet": "parquet"}
_LISTS = ("images", "videos")  # next to the text, for placeholders and for message parts that do not name their file
_CHAT_KEYS = ("tools", "chat_template_kwargs")  # next to "messages": further arguments of apply_chat_template
_RENDERING = {"tools", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "chat_template"}


def _bad_row(problem: str, expected: str | None = None) -> InputError:
    return InputError(problem, key=_CALIBRATION, expected=expected)


def check_source(source: str | Path) -> None:
    """Raise :class:`InputError` for a missing path or a file of unknown kind; ids of data sets on the hub pass."""
    path, known = Path(resolve_bundled(str(source))), (".jsonl", ".json", ".txt", *_TABLES)
    if path.is_file() and _kind(path) not in known:
        raise InputError(f"{str(source)!r} is a file of unknown kind", key=_CALIBRATION, expected=", ".join(known))
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe or a device may never end
        raise InputError(f"{str(source)!r} is neither a regular file nor a folder", key=_CALIBRATION)
    # Not a hub id: asking the hub would only waste its retries.
    named = _kind(path) in known or path.suffix.lower() == ".gz"
    if not path.exists() and (named or len(path.parts) > 2 or path.is_absolute()):
        raise InputError(
            f"{str(source)!r} does not exist",
            key=_CALIBRATION,
            advice=("change ", Key(_CALIBRATION), " to a file that does"),
        )


def _kind(path: Path) -> str:
    """The suffix before ``.gz``, if any."""
    return next((suffix.lower() for suffix in reversed(path.suffixes) if suffix.lower() != ".gz"), "")


def read_examples(
    source: str | Path, split: str | None = None, *, name: str | None = None, columns: Mapping[str, str] | None = None
) -> list[tuple[dict, str]]:
    """All examples of ``source`` with their origins, in file order, each brought into one of the known shapes.

    An example with none of them is ``{"error": InputError}``: the caller decides how many of these are too many.
    ``"ignored"`` lists the keys of an example that are not read.

    Args:
        source: a ``.jsonl`` or ``.json`` file (JSON Lines or one array; also ``.gz``), a ``.csv`` or ``.parquet`` file,
            a ``.txt`` file (a blank line separates documents; also ``.gz``), ``bundled:NAME``, a folder written by
            ``datasets.save_to_disk``, or anything that ``datasets.load_dataset`` loads.
        split: the split of a dataset that has several, ``train`` unless given; files have none and ignore it.
        name: the configuration of a hub dataset that has several.
        columns: ``{our key: their key}``, as in ``{"prompt": "question", "response": "answer"}``.

    Raises:
        InputError: the source is missing, empty or unreadable.
    """
    check_source(source)
    path = Path(resolve_bundled(str(source)))
    kind, columns = _kind(path), dict(columns or {})
    if path.is_file() and kind in (".jsonl", ".json"):
        examples = _read_json(path, columns)
    elif path.is_file() and kind == ".txt":
        examples = _read_text(path)
    elif path.is_file():
        examples = _read_dataset(str(source), path, "train", None, columns, reader=_TABLES[kind])
    else:
        examples = _read_dataset(str(source), path, split, name, columns)
    if not examples:
        raise InputError(f"{str(source)!r} holds no rows", key=_CALIBRATION, expected=SHAPES)
    return examples


def given_examples(rows: Iterable[object], columns: Mapping[str, str] | None = None) -> list[tuple[dict, str]]:
    """As :func:`read_examples`, for rows in memory: dictionaries, such as those of a ``datasets.Dataset``."""

    def shaped(row: object, where: str) -> dict:
        if not isinstance(row, Mapping):
            raise _bad_row(f"{where} is a {type(row).__name__}, not a dictionary", SHAPES)
        return _shape(_renamed(dict(row), dict(columns or {}), where), where)

    places = ((row, f"row {number}") for number, row in enumerate(rows, start=1))
    examples = [(_attempt(partial(shaped, row, where)), where) for row, where in places]
    if not examples:
        raise InputError("holds no rows", key=_CALIBRATION, expected=SHAPES)
    return examples


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            yield from enumerate(file, start=1)
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 text: {error}", key=_CALIBRATION) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}", key=_CALIBRATION) from error


def _read_json(path: Path, columns: Mapping[str, str]) -> list[tuple[dict, str]]:
    """JSON Lines, or one array of objects."""
    lines = [(number, line) for number, line in _lines(path) if line.strip()]
    if lines and lines[0][1].lstrip().startswith("["):
        try:
            listed = json.loads("".join(line for _, line in lines))
        except (ValueError, RecursionError) as error:
            problem = f"{str(path)!r} begins with '[' but is not a JSON array ({_json_reason(error)})"
            raise _bad_row(problem, f"an array of objects, or one object per line, {SHAPES}") from error
        given = [(f"entry {number}", lambda each=each: each) for number, each in enumerate(listed, start=1)]
    else:
        given = [(f"line {number}", partial(json.loads, line)) for number, line in lines]
    examples = []
    for place, load in given:
        example = _attempt(partial(_parsed, load, f"{str(path)!r} {place}", columns))
        if example.keys() & {"parts", *_LISTS}:
            example["folder"] = path.parent  # relative paths of images and videos start here
        examples.append((example, f"{path.name} {place}"))
    return examples


def _parsed(load: Callable[[], object], where: str, columns: Mapping[str, str]) -> dict:
    try:
        example = load()
        json.dumps(example, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _bad_row(f"{where} holds half of a surrogate pair, which is not text") from error
    except (ValueError, RecursionError) as error:
        raise _bad_row(f"{where} is not JSON ({_json_reason(error)})", f"one object per line, {SHAPES}") from error
    if not isinstance(example, dict):
        raise _bad_row(f"{where} is a JSON {type(example).__name__}, not an object", SHAPES)
    return _shape(_renamed(example, columns, where), where)


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deep" if isinstance(error, RecursionError) else "a number of more than 4300 digits"


def _attempt(read: Callable[[], dict]) -> dict:
    """What ``read`` returns, or ``{"error": InputError}``."""
    try:
        return read()
    except InputError as error:
        return {"error": error}


def _renamed(example: Mapping, columns: Mapping[str, str], where: str) -> dict:
    """``example`` with the user's columns under our keys."""
    missing = [theirs for theirs in columns.values() if theirs not in example]
    if missing:
        raise InputError(
            f"{where} has no {missing[0]!r}",
            key="data.columns",
            expected=f"keys of the rows, which are {', '.join(map(show, example)) or 'none'}",
        )
    taken = {*columns.values(), *columns}
    return {key: value for key, value in example.items() if key not in taken} | {
        ours: example[theirs] for ours, theirs in columns.items()
    }


def _read_text(path: Path) -> list[tuple[dict, str]]:
    examples = []
    for blank, group in groupby(_lines(path), key=lambda line: not line[1].strip()):
        if not blank:
            lines = list(group)
            text = "".join(line for _, line in lines).strip("\n")
            examples.append(({"text": text}, f"{path.name} line {lines[0][0]}"))
    return examples


def _read_dataset(
    source: str,
    path: Path,
    split: str | None,
    name: str | None,
    columns: Mapping[str, str],
    reader: str | None = None,
) -> list[tuple[dict, str]]:
    import datasets  # imports pyarrow and pandas, which plain files do not need

    wanted = split or "train"
    try:
        if reader is not None:
            dataset = datasets.load_dataset(reader, data_files=str(path), split=wanted)
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            dataset = datasets.load_from_disk(str(path))
        else:
            dataset = datasets.load_dataset(str(path) if path.exists() else source, name, split=wanted)
    except Exception as error:  # every loader of `datasets` raises its own exceptions, all about the source
        from pop_lightning.models.loading import hub_unreached

        if not path.exists() and hub_unreached(error):
            raise InputError(
                f"{source!r} is not a file on this machine, and huggingface.co could not be reached",
                key=_CALIBRATION,
                advice="check the connection, or correct the path",
            ) from error
        raise InputError(
            (
                f"{source!r} (",
                Key("data.split"),
                f" {wanted!r}) is neither a file that exists nor a dataset that loads: {first_sentence(error)}",
            ),
            key=_CALIBRATION,
        ) from error
    if isinstance(dataset, Mapping):
        if wanted not in dataset:
            raise InputError(
                f"{source!r} has no split {wanted!r}",
                key=_CALIBRATION,
                advice=("set ", Key("data.split"), f" to one of {', '.join(dataset)}"),
            )
        dataset = dataset[wanted]
    missing = [theirs for theirs in columns.values() if theirs not in dataset.column_names]
    if missing:
        raise InputError(
            f"{source!r} has no column {missing[0]!r}",
            key="data.columns",
            expected=f"one of {', '.join(dataset.column_names)}",
        )
    if columns:
        dataset = dataset.remove_columns(
            [ours for ours in columns if ours in dataset.column_names and ours not in columns.values()]
        )
        dataset = dataset.rename_columns({theirs: ours for ours, theirs in columns.items() if theirs != ours})
    known = [key for key in _KEYS if key in dataset.column_names]
    if not known:
        raise _bad_row(f"{source!r} has the columns {', '.join(dataset.column_names) or '(none)'}", SHAPES)
    unread = sorted({*dataset.column_names} - {*known, *_CHAT_KEYS, *_LISTS})
    called = path.name or source
    chat = [key for key in _CHAT_KEYS if key in dataset.column_names and "messages" in known]
    shown = {}
    for key in {*_LISTS} & {*dataset.column_names}:
        column = dataset.select_columns([key])
        shown[key] = column.cast_column(key, _undecoded(column.features[key]))
    examples = []
    # Only these columns: others may be images or audio, which would be decoded when a row is read.
    for number, example in enumerate(dataset.select_columns(known + chat)):
        lazy = {key: partial(_cells, column, key, number) for key, column in shown.items()}
        where = f"{source!r} row {number}"
        shaped = _attempt(partial(_shape, _without_nulls(example) | lazy, where))
        if unread and "error" not in shaped:
            shaped["ignored"] = unread
        examples.append((shaped, f"{called} row {number}"))
    return examples


def _undecoded(feature):
    """A feature of `datasets` with images and videos left as the bytes in which they are stored."""
    import datasets

    if isinstance(feature, datasets.Image | datasets.Video):
        return type(feature)(decode=False)
    if isinstance(feature, list):
        return [_undecoded(each) for each in feature]
    inner = getattr(feature, "feature", None)
    return feature if inner is None else type(feature)(_undecoded(inner))


def _cells(dataset, key: str, row: int) -> list[Callable]:
    """A dataset row's images or videos, each read when it is needed."""
    cell = dataset[row][key]
    count = len(cell) if isinstance(cell, list) else int(cell is not None)
    return [partial(_cell, dataset, key, row, index) for index in range(count)]


def _cell(dataset, key: str, row: int, index: int):
    cell = dataset[row][key]
    return cell[index] if isinstance(cell, list) else cell


def _without_nulls(value):
    """``value`` without null keys at any depth: the rows of a table share their keys, and missing ones are null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _shape(example: dict, where: str) -> dict:
    """``example`` reduced to the keys of its shape; a key whose value is null counts as absent, as in a table.

    Images and videos are kept separate from the text: ``parts`` holds the messages' image and video parts, in order;
    ``images`` and ``videos`` those listed next to the text, or a callable that returns the list.
    """
    found = _as_ours({key: value for key, value in example.items() if value is not None})
    ignored = sorted(found.keys() - {*_KEYS, *_CHAT_KEYS, *_LISTS})
    shaped = _reduced(found, example, where)
    return shaped | {"ignored": ignored} if ignored else shaped


def _as_ours(found: dict) -> dict:
    """TRL's rows under our keys: a completion is a response, and messages under "prompt" (and "completion") a chat."""
    if isinstance(found.get("prompt"), list) and "messages" not in found:
        completion = found.pop("completion", [])
        return found | {"messages": [*found.pop("prompt"), *(completion if isinstance(completion, list) else [])]}
    if "completion" in found and "prompt" in found and "response" not in found:
        found["response"] = found.pop("completion")
    return found


def _reduced(found: dict, example: dict, where: str) -> dict:
    """The row with only the keys of its shape; raises if it has none of the known shapes."""
    media = {key: found[key] for key in _LISTS if found.get(key)}
    for key, listed in media.items():
        if not (isinstance(listed, list) or callable(listed)):
            raise _bad_row(f'{where} has "{key}" of type {type(listed).__name__}', "a list")
    if "messages" in found:
        messages, parts = _messages(found["messages"], where)
        shown = {"parts": parts} if parts else {}
        return {"messages": messages} | _chat_arguments(found, where) | shown | media
    keys = next((keys for keys in (("prompt", "response"), ("prompt",), ("text",)) if found.keys() >= set(keys)), None)
    if keys is None:
        named = ", ".join(show(key) for key in example) or "none"
        raise _bad_row(f"{where} has the keys {named}", SHAPES)
    for key in keys:
        if not isinstance(found[key], str):
            raise _bad_row(f"{where} has a {key!r} of type {type(found[key]).__name__}", "a string")
    return {key: found[key] for key in keys} | (media if "prompt" in keys else {})


def _chat_arguments(found: dict, where: str) -> dict:
    """``tools`` and ``chat_template_kwargs`` of a row, each as it is or as JSON text, as tables often hold them."""
    given = {}
    for key, kind, what in zip(_CHAT_KEYS, (list, dict), ("a list of tools", "an object"), strict=True):
        value = found.get(key)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise _bad_row(f"{where} has a {key!r} that is not JSON ({error.msg})") from error
        if value is None:
            continue
        if not isinstance(value, kind) or (kind is list and not all(isinstance(each, dict) for each in value)):
            raise _bad_row(f"{where} has a {key!r} of type {type(value).__name__}", what)
        given[key] = value
    taken = sorted(_RENDERING & given.get("chat_template_kwargs", {}).keys())
    if taken:
        raise _bad_row(
            f"{where} sets {', '.join(taken)} in 'chat_template_kwargs', which is for the template's own variables "
            "(such as enable_thinking)"
        )
    return given


def _messages(messages, where: str) -> tuple[list[dict], list]:
    """The messages as a chat template expects them, and their image and video parts, in order."""
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise _bad_row(f'{where} has "messages" that are not a list of objects with "role" and "content"')
    if not messages:
        raise _bad_row(f'{where} has no message in its "messages"')
    if messages[-1]["role"] == "system":
        raise _bad_row(
            f"{where} has 'system' as the role of its last message",
            "'assistant' (the response), or a question that the full model answers",
        )
    clean, shown = [], []
    for message in messages:
        content = message.get("content")
        parts = [{"type": "text"}] if isinstance(content, str) or content is None else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise _bad_row(f'{where} has a message whose "content" is neither a string nor a list of parts')
        others = sorted({str(part.get("type")) for part in parts} - {"text", "image_url", IMAGE.name, VIDEO.name})
        if others:  # the tokenizer would silently drop them
            raise _bad_row(f"{where} has message parts of type {', '.join(others)}", "text, image or video")
        parts = [_image_of(part) if part["type"] == "image_url" else part for part in parts]
        found = [part for part in parts if part["type"] != "text"]
        if found and message is messages[-1] and message["role"] == "assistant":
            kind = "a video" if found[0]["type"] == VIDEO.name else "an image"
            raise _bad_row(
                f"{where} has {kind} in its last message, the response: only prompts may hold images and videos"
            )
        shown += found
        clean.append({key: value for key, value in message.items() if value is not None})
        if isinstance(content, list):
            clean[-1]["content"] = [
                {key: value for key, value in part.items() if value is not None}
                if part["type"] == "text"
                else {"type": part["type"]}
                for part in parts
            ]
    return clean, shown


def _image_of(part: dict) -> dict:
    """OpenAI's ``image_url`` part in the form that Transformers expects."""
    address = part.get("image_url")
    return {"type": IMAGE.name, "url": address.get("url") if isinstance(address, dict) else address}
