"""Generators that belong to a loaded model, for ``model.generate(..., custom_generate=ARTIFACT)``."""

from transformers import PreTrainedModel

from pop_lightning.generation.artifact import CONFIG
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.generation.hub import fetch


class _Generators(dict):
    """Generators of one model by artifact, kept on the model; a copy of the model begins without any."""

    def __deepcopy__(self, memo: dict) -> "_Generators":
        return _Generators()

    def __reduce__(self):
        return _Generators, ()


def generator_of(model: PreTrainedModel) -> StageAwareGenerator:
    """The generator of a model whose artifact is next to its weights.

    Raises:
        InputError: as :meth:`StageAwareGenerator.from_artifact` does.
    """
    return generator_for(model, model.name_or_path, getattr(model.config, "_commit_hash", None))


def generator_for(model: PreTrainedModel, artifact: str, revision: str | None = None) -> StageAwareGenerator:
    """The generator of ``model`` with an artifact; made at the first call and kept on the model.

    Args:
        artifact: a folder, or a repository of the hub.
        revision: of the repository; ``main`` unless given.

    Raises:
        InputError: as :meth:`StageAwareGenerator.from_artifact` does.
    """
    folder = fetch(artifact, revision)
    made = model.__dict__.setdefault("_pop_generators", _Generators())
    config = folder / CONFIG
    key = (str(folder), config.stat().st_mtime_ns if config.is_file() else None)
    if key not in made:
        made.clear()
        made[key] = StageAwareGenerator.from_artifact(folder, base=model)
    return made[key]
