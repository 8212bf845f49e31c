"""The names that a notebook imports from ``pop_lightning`` itself."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import pop_lightning


def test_every_public_name_is_listed_and_can_be_imported():
    assert set(pop_lightning.__all__) <= set(dir(pop_lightning))
    for name in pop_lightning.__all__:
        assert name == "__version__" or getattr(pop_lightning, name).__module__.startswith("pop_lightning.")
    assert pop_lightning.__version__ == version("pop-lightning")
    with pytest.raises(AttributeError, match="no attribute 'Evaluations'"):
        getattr(pop_lightning, "Evaluations")  # noqa: B009


def test_torch_waits_until_a_name_is_used():
    code = "import sys, pop_lightning; dir(pop_lightning); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
