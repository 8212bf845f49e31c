"""Output in the cell of a notebook, where tables are displayed instead of printed."""

import sys
from collections.abc import Iterable

from pop_lightning.core.tables import Table, joined


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


def show(blocks: Iterable[Table | str]) -> None:
    """Print paragraphs and tables; in a notebook tables are displayed as HTML."""
    if not in_notebook():
        print(joined(blocks))
        return
    from IPython.display import HTML, display

    for each in blocks:
        if isinstance(each, Table):
            display(HTML(each.__html__()))
        else:
            print(each)
