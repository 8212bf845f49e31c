"""Plans as plain data: what they say in a file is what they say when it is read."""

import pytest

from pop_lightning.core.plan import Kept


@pytest.mark.parametrize("kept", [Kept(), Kept(16), Kept(0.1, 20), Kept(1, 0.05, "recency")])
def test_tokens_in_full_are_read_back_as_they_were_written(kept):
    assert Kept.of(kept.to_dict() | {"depth": 3}) == kept


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"salient": 8}, Kept(1, 8)),
        ({"boundary": 4, "selector": "recency"}, Kept(4, 0, "recency")),
        ({}, Kept()),
    ],
)
def test_a_name_that_is_absent_has_its_default_and_moves_no_other_value(entry, expected):
    assert Kept.of(entry) == expected
