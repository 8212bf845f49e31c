"""``pop-fit --recipe NAME_OR_PATH``: score, fit, pick a depth under the budget, export."""

import sys

from pop_lightning.cli import importing, run


def main(argv: list[str] | None = None) -> int:
    """Run ``pop-fit`` with ``argv`` (the process's own unless given); returns the exit code."""

    def body() -> int:
        with importing():
            from pop_lightning.run.recipe import parse
        invocation = parse(argv)
        if invocation.check:
            with importing():
                from pop_lightning.run import preflight
            return preflight.check(invocation.recipe)
        with importing():
            from pop_lightning.run import pipeline

        return pipeline.fit(invocation.recipe, resume=invocation.resume, overwrite=invocation.overwrite)

    return run("pop-fit", body)


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
