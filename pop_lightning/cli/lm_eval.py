"""lm-eval's own command with the model ``pop``, as ``python -m pop_lightning.cli.lm_eval --model pop ...``.

lm-eval finds a model of another package only where that package has been imported; it reads no entry points.
"""

import sys

from pop_lightning.cli import importing, run


def main() -> int:
    """Run lm-eval's command with the arguments of this process; returns the exit code."""

    def body() -> None:
        with importing():
            from lm_eval.__main__ import cli_evaluate

            import pop_lightning.harness.model  # noqa: F401 - registers the model

        cli_evaluate()

    return run("lm-eval", body)


if __name__ == "__main__":
    sys.exit(main())
