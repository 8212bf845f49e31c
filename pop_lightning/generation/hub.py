"""Artifacts on the Hugging Face hub: read from it (through its cache, offline as well) and published to it.

A repository of an artifact holds what an ``artifact/`` folder holds, and the report of the run. Its weights stay in the
repository of the base, which the model card names.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from pop_lightning.core.errors import InputError, first_sentence
from pop_lightning.generation.artifact import CARD, CONFIG, CUSTOM_GENERATE, TENSORS, read_artifact
from pop_lightning.generation.model_card import PLACE
from pop_lightning.models.loading import hub_unreached

_LOG_IN = "log in with a token that may write (hf auth login, or the variable HF_TOKEN)"


def fetch(artifact: str | Path, revision: str | None = None) -> Path:
    """The local folder of an artifact: a folder as it is, a repository of the hub as the cache has it or gets it.

    Args:
        artifact: a folder, or an id such as ``user/llama-pop``; a folder of that name comes first.
        revision: branch, tag or commit of the repository; ``main`` unless given.

    Raises:
        InputError: there is neither, the hub cannot be reached and the cache has no copy, or ``revision`` was given for
            a folder.
    """
    path = Path(artifact).expanduser()
    if path.exists() or not is_hub_id(str(artifact)):
        if revision is not None:
            raise InputError(
                f"revision {revision!r} names a version of an artifact on the hub, and {artifact} is a folder: leave "
                "it out; the base's version is base_revision."
            )
        return path
    try:
        files = [CONFIG, TENSORS, CARD, str(CUSTOM_GENERATE)]
        return Path(snapshot_download(str(artifact), revision=revision, allow_patterns=files))
    except GatedRepoError as error:
        raise InputError(
            f"the artifact {artifact} is gated on the hub: accept its terms there and log in (hf auth login)."
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"the artifact {artifact} on the hub has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"the artifact {artifact} is neither a folder nor a repository of the hub: expected the artifact/ folder "
            "of a run, or an id such as user/llama-pop (where it is private, log in: hf auth login)."
        ) from error
    except (OSError, ValueError) as error:
        if not hub_unreached(error):
            raise InputError(f"the artifact {artifact} cannot be downloaded: {first_sentence(error)}") from error
        at = "" if revision is None else f" at revision {revision}"
        raise InputError(
            f"the artifact {artifact}{at} is neither a folder nor in the hub's cache on this machine, and "
            "huggingface.co could not be reached: check the connection, or the path."
        ) from error


def is_hub_id(name: str) -> bool:
    """Whether ``name`` may be a repository of a user or an organization: ``user/name``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def check_push(repository: str, token: str | None = None) -> None:
    """Raise :class:`InputError` where :func:`push` could not work: asked before hours of a run."""
    if not is_hub_id(repository):
        raise InputError(f"--push must name a repository such as user/llama-pop, found {repository!r}.")
    with _explained(repository):
        HfApi().whoami(token=token)


def push(
    folder: str | Path,
    repository: str,
    *,
    files: Mapping[str, str | Path] | None = None,
    revision: str | None = None,
    private: bool | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Publish an artifact in one commit; the repository is made unless it exists.

    Args:
        folder: of the artifact, which is verified first.
        repository: ``user/name``.
        files: further files by their name in the repository, such as the report.
        revision: branch, made unless it exists; ``main`` unless given.
        private: of a repository that is made; as the user's or organization's settings say unless given.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: it is not an artifact, the hub cannot be reached, or it refuses.
    """
    if not is_hub_id(repository):
        raise InputError(f"an artifact is published to a repository such as user/llama-pop, found {repository!r}.")
    artifact, api = read_artifact(folder), HfApi(token=token)
    own = {str(name): artifact.folder / name for name in (CONFIG, TENSORS, CARD, CUSTOM_GENERATE)}
    given = {name: Path(path) for name, path in (own | dict(files or {})).items()}
    contents = {name: path.read_bytes() for name, path in given.items() if path.is_file()}
    if CARD in contents:
        contents[CARD] = contents[CARD].replace(PLACE.encode(), repository.encode())
    with _explained(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=message or f"Prefill-Only Pruning at depth {artifact.plan.depth}",
            revision=revision,
        )
    return commit.commit_url


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Errors of the hub as one sentence each."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputError(f"publishing to {repository} needs an account of the hub: {_LOG_IN}.") from error
    except (HfHubHTTPError, OSError) as error:
        if hub_unreached(error):
            raise InputError(
                f"{repository} was not published, because huggingface.co could not be reached: check the connection."
            ) from error
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403, 404):
            raise InputError(f"the hub does not let this account write to {repository}: {_LOG_IN}.") from error
        raise InputError(f"{repository} was not published: {first_sentence(error)}") from error
