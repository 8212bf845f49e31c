"""``pop-fit --recipe NAME_OR_PATH``: score, fit, pick a depth under the budget, export."""

import os
import shlex
import sys
from collections.abc import Sequence

from pop_lightning.cli import importing, run
from pop_lightning.core.commands import script
from pop_lightning.core.errors import Key, as_recipe
from pop_lightning.core.quiet import quiet_bars


def main(argv: list[str] | None = None) -> int:
    """Run ``pop-fit`` with ``argv`` (the process's own unless given); returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}

    def spell(key: Key) -> str:
        """A key as the user gave it: as a flag, or in a recipe file."""
        flag = f"--{key.name}"
        return as_recipe(key) if flag not in flags else flag if key.value is None else f"{flag} {key.value}"

    def body() -> int:
        with importing():
            from pop_lightning.run.invocation import parse
        invocation = parse(words)
        quiet_bars()
        if invocation.check:
            with importing():
                from pop_lightning.run import check
            return check.check(invocation.recipe)
        with importing():
            from pop_lightning.run import pipeline

        return pipeline.fit(
            invocation.recipe,
            resume=invocation.resume,
            overwrite=invocation.overwrite,
            verbose=invocation.verbose,
            push=invocation.push,
        )

    return run("pop-fit", body, spell, "" if "--check" in flags else f"--resume continues the run{_resumed(words)}")


def _resumed(words: Sequence[str]) -> str:
    """The same command with ``--resume``; empty where torchrun or SLURM started this process by another one."""
    if os.environ.keys() & {"RANK", "SLURM_PROCID"}:
        return ""
    kept = [word for word in words if word not in ("--resume", "--overwrite")]
    return f": {script('pop-fit')} {shlex.join([*kept, '--resume'])}"


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
