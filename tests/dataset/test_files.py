"""Atomic writes, locks on folders, digests."""

from __future__ import annotations

import errno
import os
import signal
import stat
from pathlib import Path

import numpy as np
import pytest

from dataset import files
from dataset.files import array_digest, atomic_write, file_digest, locked, sweep, write_json
from tests.stress.injector import Injector, Moment, in_a_child, wait_for


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "label.nii.gz"
    path.write_text("old")
    with atomic_write(path) as scratch:
        assert scratch.parent == tmp_path and scratch.name.endswith("label.nii.gz")
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyError), atomic_write(path) as scratch:
        scratch.write_text("half")
        raise KeyError("stop")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_reach_the_disk_before_the_name_and_then_the_folder(tmp_path: Path) -> None:
    watcher = Injector()
    with watcher.watching():
        write_json(tmp_path / "a.json", [1])
    assert [op.name for op in watcher.seen][-3:] == ["fsync", "replace", "fsync"]
    assert watcher.seen[-1].path == str(tmp_path)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", [1])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_long_names_fit_and_errors_name_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / ("x" * 250 + ".json"), [1])
    with pytest.raises(FileNotFoundError) as caught:
        write_json(tmp_path / "missing" / "a.json", [1])
    assert caught.value.filename == str(tmp_path / "missing" / "a.json")


def test_files_of_a_killed_process_are_swept_and_those_in_use_are_not(tmp_path: Path) -> None:
    def work() -> None:
        with Injector(Moment(1, "within", 10)).watching():
            write_json(tmp_path / "a.json", ["x" * 1000])

    assert wait_for(in_a_child(work)) == -signal.SIGKILL
    (unfinished,) = tmp_path.iterdir()
    with atomic_write(tmp_path / "b.json") as scratch:
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [scratch]
    assert not unfinished.exists()


# ------------------------------------------------------------------ locks


def test_a_second_process_is_refused_with_the_first_ones_number(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(ValueError, match=rf"in use by process {holder} on .*\(training\)"):
            locked(tmp_path, "training").__enter__()

    holder = os.getpid()
    with locked(tmp_path, "training"):
        assert wait_for(in_a_child(second)) == 0
        with pytest.raises(ValueError, match=f"process {holder}"), locked(tmp_path, "training"):
            raise AssertionError("locked twice")
    with locked(tmp_path, "training"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_lets_its_lock_go_although_its_children_live(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def holder() -> None:
        with locked(tmp_path, "training"):
            if not (child := os.fork()):
                signal.pause()
            os.write(writer, child.to_bytes(4, "little"))
            signal.pause()

    process = in_a_child(holder)
    child = int.from_bytes(os.read(reader, 4), "little")
    try:
        os.kill(process, signal.SIGKILL)
        wait_for(process)
        with locked(tmp_path, "training"):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
    finally:
        os.kill(child, signal.SIGKILL)


def test_without_locks_the_block_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with locked(tmp_path, "training"):
        write_json(tmp_path / "a.json", [1])
    assert "no file locks here" in capsys.readouterr().out
    assert (tmp_path / "a.json").is_file()


# ------------------------------------------------------------------ digests


def test_digests_tell_values_and_shapes_apart_but_not_layouts(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    assert array_digest(array) == array_digest(np.asfortranarray(array))
    assert array_digest(array) != array_digest(array.reshape(3, 2, 4))
    assert array_digest(array) != array_digest(array + 1)
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a").startswith("ba7816bf")


# ------------------------------------------------------------------ folders


def folder_of(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def test_a_rebuilt_folder_takes_the_place_of_the_old_one_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    for content in ("one", "two"):
        with files.rebuilt(folder, "preparing") as new:
            (new / content).write_text(content)
            assert folder_of(folder) == {"one": "one"} if folder.exists() else content == "one"
        assert folder_of(folder) == {content: content}
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_leaves_the_old_folder_and_work_that_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "one").write_text("one")
    for keep in (False, True):
        with pytest.raises(KeyError), files.rebuilt(folder, "preparing", keep=keep) as new:
            (new / "two").write_text("two")
            raise KeyError("stop")
        assert folder_of(folder) == {"one": "one"}
        assert (len(list(tmp_path.iterdir())) == 2) == keep
    with files.rebuilt(folder, "preparing", keep=True) as new:
        assert folder_of(new) == {"two": "two"}
    assert list(tmp_path.iterdir()) == [folder]
    with files.rebuilt(folder, "preparing"):
        pass  # nothing was written: nothing changes
    assert folder_of(folder) == {"two": "two"}


def test_a_second_process_is_refused_or_waits(tmp_path: Path) -> None:
    def second(wait: bool) -> None:
        with files.rebuilt(tmp_path / "store", "preparing", wait=wait) as new:
            (new / "two").write_text("two")

    with files.rebuilt(tmp_path / "store", "preparing") as new:
        assert wait_for(in_a_child(lambda: second(False))) == 1
        later = in_a_child(lambda: second(True))
        (new / "one").write_text("one")
    assert wait_for(later) == 0
    assert folder_of(tmp_path / "store") == {"two": "two"}
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_two_renames_replace_a_folder_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    folder = tmp_path / "store"
    for content in ("one", "two"):
        with files.rebuilt(folder, "preparing") as new:
            (new / content).write_text(content)
    assert folder_of(folder) == {"two": "two"}
    os.rename(folder, tmp_path / "away")
    (tmp_path / ".store.next").mkdir()
    os.rename(tmp_path / "away", tmp_path / ".store.next" / "old")  # as after a kill in between
    with files.rebuilt(folder, "preparing"):
        assert folder_of(folder) == {"two": "two"}
