"""Prefill-Only Pruning for ``model.generate(..., custom_generate=FOLDER_OR_REPOSITORY, trust_remote_code=True)``.

Next to a model's weights it prunes every ``generate`` of a model that was loaded with ``trust_remote_code=True``.
"""

import inspect

POP_LIGHTNING = True  # by which models.loading.plain_generate knows this file


def generate(inputs=None, *, model, **arguments):
    """``model.generate`` with its prefill pruned as the artifact says that holds this file."""
    from pop_lightning.generation.per_model import generator_for, generator_of

    # Transformers runs a copy of this file and does not pass on where it is from. A call that names the artifact has it
    # in its caller's frame; otherwise the model was loaded from the folder or repository that holds it.
    caller = inspect.currentframe().f_back
    named = caller.f_globals.get("__name__") == "transformers.generation.utils"
    generator = generator_for(model, caller.f_locals["custom_generate"]) if named else generator_of(model)
    return generator.generate(inputs, **arguments)
