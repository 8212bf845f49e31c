"""pop-fit in which every process notes what it decided; test_ranks.py runs it under torchrun."""

import json
import os
import sys
from pathlib import Path

from pop_lightning.cli import fit
from pop_lightning.run import pipeline


def noting(search):
    """``pipeline.search`` with a note of its result: tokens that run in full, what to verify, and all decisions."""

    def wrapped(run, depths):
        found = search(run, depths)
        note = {"kept": found.kept.to_dict(), "sequence": found.sequence, "decisions": found.decisions}
        path = Path(os.environ["NOTES"]) / f"plan{os.environ['RANK']}.json"
        path.write_text(json.dumps(note))
        return found

    return wrapped


if __name__ == "__main__":
    pipeline.search = noting(pipeline.search)
    sys.exit(fit.main())
