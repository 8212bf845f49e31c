"""A journal holds what was finished, whatever happened to the process."""

import pytest

from pop_lightning.core.journal import Busy, Journal


def test_records_are_found_again(tmp_path):
    with Journal(tmp_path / "j") as journal:
        assert (journal.settings, journal.records) == (None, [])
        journal.begin({"a": 1})
        journal.add([{"row": 1, "text": "é\n"}, {"row": 2}])
    with Journal(tmp_path / "j") as journal:
        assert (journal.settings, journal.records) == ({"a": 1}, [{"row": 1, "text": "é\n"}, {"row": 2}])
        journal.begin({"a": 2})
    with Journal(tmp_path / "j") as journal:
        assert (journal.settings, journal.records) == ({"a": 2}, [])


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_line_that_was_cut_is_dropped_and_what_follows_is_whole(tmp_path, cut):
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.begin({"a": 1})
        journal.add([{"row": 1}, {"row": 2}])
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path) as journal:
        left = [{"row": 1}] if cut <= 11 else []
        assert journal.records == left
        journal.add([{"row": 3}])
    with Journal(path) as journal:
        assert journal.records == [*left, {"row": 3}]


def test_two_processes_do_not_write_to_one_journal(tmp_path):
    with Journal(tmp_path / "j"), pytest.raises(Busy), Journal(tmp_path / "j"):
        pass
