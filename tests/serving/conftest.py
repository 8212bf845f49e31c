"""Tests that run vLLM are deselected unless they are asked for (``-m vllm``), which ``make test-vllm`` does."""

import pytest

from tests.helpers.served import Engines


def pytest_collection_modifyitems(config, items):
    if "vllm" in config.option.markexpr:
        return
    chosen = [item for item in items if item.get_closest_marker("vllm") is None]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(scope="session")
def engines():
    with Engines() as running:
        yield running
