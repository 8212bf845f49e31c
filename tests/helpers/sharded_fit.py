"""pop-fit that also notes how much of the base each process held at a time; test_ranks.py runs it under torchrun."""

import json
import os
import sys
from pathlib import Path

from pop_lightning.cli import fit
from pop_lightning.run import strategies


def noting(load):
    """``ShardedBase.load`` with a note of what is held: right after loading, and while any module runs."""

    def wrapped(sharded, *arguments):
        model = load(sharded, *arguments)
        parameters = list(model.parameters())
        note = {
            "whole": sum(parameter.ds_numel for parameter in parameters),
            "share": sum(parameter.ds_tensor.numel() for parameter in parameters),
            "after_loading": sum(parameter.numel() for parameter in parameters),
            "most_while_running": 0,
            "dtypes": sorted({str(parameter.dtype) for parameter in parameters}),
        }

        def look(*_):
            gathered = sum(parameter.numel() for parameter in parameters)
            note["most_while_running"] = max(note["most_while_running"], gathered)
            path.write_text(json.dumps(note))

        path = Path(os.environ["NOTES"]) / f"rank{os.environ['RANK']}.json"
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(look)
                module.register_forward_hook(look)
        return model

    return wrapped


if __name__ == "__main__":
    strategies.ShardedBase.load = noting(strategies.ShardedBase.load)
    sys.exit(fit.main())
