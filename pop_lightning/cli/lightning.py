"""LightningCLI for training projections: ``python -m pop_lightning.cli.lightning fit --config training.yaml``.

For those who configure Lightning by its own command line: ``model``, ``data`` and ``trainer`` are its sections, and
``fit --print_config`` writes them with their defaults. ``pop-fit`` is the whole path from a base to an artifact.
"""

import sys

from lightning.pytorch.cli import LightningCLI

from pop_lightning.cli import run
from pop_lightning.data.module import CalibrationData
from pop_lightning.fitting.training import KVProjectionTraining


def main(argv: list[str] | None = None) -> int:
    def body() -> None:
        LightningCLI(KVProjectionTraining, CalibrationData, args=argv)

    return run("pop_lightning.cli.lightning", body)


if __name__ == "__main__":
    sys.exit(main())
