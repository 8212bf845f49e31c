"""Files that appear whole: their modes, what a power cut leaves of them, and what a full disk reports."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pop_lightning.core import files
from pop_lightning.core.files import replace_folder, write_json, write_problem, write_whole

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_the_umask_whoever_wrote_them(tmp_path, umask):
    def private(path):
        path.write_text("{}")
        path.chmod(0o600)

    before = os.umask(umask)
    try:
        write_whole(tmp_path / "file.json", private)
        (tmp_path / "partial").mkdir()
        safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "partial" / "a.safetensors")
        private(tmp_path / "partial" / "config.json")
        replace_folder(tmp_path / "partial", tmp_path / "folder")
    finally:
        os.umask(before)
    for name in ("file.json", "folder/a.safetensors", "folder/config.json"):
        assert mode(tmp_path / name) == 0o666 & ~umask, name


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, sync = [], files._sync

    def recording(path):
        synced.append((path.name, (tmp_path / "file.json").exists()))
        sync(path)

    monkeypatch.setattr(files, "_sync", recording)
    write_json(tmp_path / "file.json", {})
    assert synced == [(f".{os.getpid()}.file.json", False), (tmp_path.name, True)]


def test_a_file_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    write_json(tmp_path / "file.json", {"old": 1})
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(FULL))
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "file.json", {"new": 1})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file.json", '{\n "old": 1\n}')]


WRITE = """
import resource, signal, sys, torch, safetensors.torch
from pathlib import Path
from pop_lightning.core.files import write_problem
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
folder = Path(sys.argv[1])
tensor = torch.zeros(1000)
for write in (
    lambda: safetensors.torch.save_file({"a": tensor}, folder / "a"),
    lambda: torch.save(tensor, folder / "b"),
    lambda: (folder / "c").write_text("x" * 1000),
):
    try:
        write()
    except Exception as error:
        print(write_problem(error, Path("elsewhere")))
"""


def test_a_disk_without_room_is_recognized_whatever_library_wrote(tmp_path):
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 3
    assert said == ["File too large (os error 27)", "the file could not be written in full", "File too large"]


def test_an_error_of_another_file_or_of_the_network_is_not_put_down_to_the_folder(tmp_path):
    inside, outside = (FileNotFoundError(errno.ENOENT, "gone", str(path / "x")) for path in (tmp_path, Path("/other")))
    assert write_problem(inside, tmp_path) == "gone"
    assert write_problem(outside, tmp_path) is None
    assert write_problem(ConnectionError("no route"), tmp_path) is None
    assert write_problem(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), tmp_path) is None
