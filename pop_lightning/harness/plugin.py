"""Makes ``lm_eval --model pop`` known to lm-eval's own command.

lm-eval reads no entry points: a model of another package has to be imported before the command looks for it. Torch does
read some when it is imported (group ``torch.backends``, made for devices of other packages), and lm-eval's command
imports torch before it looks for a model. In every other program this returns at once;
``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` leaves it out.
"""

import sys


def register() -> None:
    """Add ``pop`` to lm-eval's models, by name, where lm-eval is what imports torch."""
    if "lm_eval" not in sys.modules:
        return
    try:
        import lm_eval.models  # noqa: F401 - its own models first: it does not add them to a registry that has some
        from lm_eval.api.registry import model_registry

        model_registry.register("pop", target="pop_lightning.harness.model:PopLM")
    except Exception:  # another lm-eval: an error here would be one of importing torch
        return
