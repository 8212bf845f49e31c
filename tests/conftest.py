import os
import warnings

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # wherever DeepSpeed is imported, it would look for other devices

torch.set_num_threads(1)  # tiny models: a second thread only waits, and much longer on a busy machine
warnings.filterwarnings("ignore", category=FutureWarning)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny base; a module may have one of its own."""
    from tests.helpers.workbench import save_base

    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of rows with responses; a module may have one of its own."""
    from tests.helpers.workbench import save_rows

    return save_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What runs of several processes start from; a module may have one of its own."""
    from tests.helpers.ranked import prepare

    return prepare(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def runs(work):
    from tests.helpers.ranked import Runs

    return Runs(work)
