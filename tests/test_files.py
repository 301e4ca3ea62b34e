"""Files are written whole or not at all, and an error names the file."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fastfg.files import (
    read_json,
    read_json_list,
    remove_unfinished,
    temporary,
    whole,
    write_durably,
    write_new,
    write_tensors,
)

SMALL = 60_000  # bytes that a file may have


def limited(folder, program):
    """Run ``program`` in ``folder`` in a process whose files may have ``SMALL`` bytes."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({SMALL}, {SMALL}))\n"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", limit + program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_file_replaces_another_when_it_is_complete(tmp_path):
    file = tmp_path / "a.txt"
    write_durably(file, b"one")
    with whole(file) as hidden:
        hidden.write_text("two")
        assert file.read_text() == "one"
        assert hidden.name.startswith(".a.txt.")
    assert file.read_text() == "two"
    assert names(tmp_path) == ["a.txt"]


def test_two_can_write_the_same_file_at_once(tmp_path):
    file = tmp_path / "a.txt"
    with whole(file) as one, whole(file) as other:
        one.write_text("same")
        other.write_text("same")
    assert file.read_text() == "same"
    assert names(tmp_path) == ["a.txt"]


def test_what_killed_processes_left_is_removed(tmp_path):
    for name in ("a.safetensors", "b.txt"):
        temporary(tmp_path / name).touch()
    (tmp_path / ".lock").touch()
    remove_unfinished(tmp_path, "a.safetensors")
    assert [name[:7] for name in names(tmp_path)] == [".b.txt.", ".lock"]
    remove_unfinished(tmp_path)
    assert names(tmp_path) == [".lock"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_a_damaged_json_file_is_named(tmp_path, content):
    file = tmp_path / "a.json"
    file.write_bytes(b'{"a": [1]}')
    assert read_json(file) == {"a": [1]}
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: expected JSON, got a damaged file: \S"):
        read_json(file)
    with pytest.raises(ValueError, match=r"a\.json: expected JSON, got a damaged file: \S"):
        read_json_list(file)


def test_json_without_its_fields_is_named(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"a\.json: expected b, c in it, got a$"):
        read_json(file, "a", "b", "c")
    for text in ("[]", '{"a": 1}', "3"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json: expected a list of JSON objects, got"):
            read_json_list(file)
    file.write_text('[{"a": 1}, 2]')
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON object, got 2"):
        read_json_list(file, "a")
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON object, got \["):
        read_json(file)
    file.write_text('[{"a": 1}, {"a": 2}]')
    assert [one["a"] for one in read_json_list(file, "a")] == [1, 2]


def test_an_error_leaves_the_earlier_file(tmp_path):
    file = tmp_path / "a.txt"
    write_durably(file, b"one")
    with pytest.raises(OSError, match="No such file"), whole(file):
        (tmp_path / "missing").read_text()
    assert file.read_text() == "one"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_tensors_have_the_mode_of_any_new_file(tmp_path, umask, mode):
    """In a process of its own, as the umask is the whole process's. An earlier file's mode is not kept."""
    (tmp_path / "a.safetensors").touch(mode=0o400)
    program = "import os, torch; from fastfg.files import write_tensors; from pathlib import Path\n"
    program += f"os.umask({umask}); write_tensors(Path('a.safetensors'), {{'a': torch.ones(1)}}); Path('b').touch()"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {"a.safetensors": mode, "b": mode}


def test_tensors_that_safetensors_refuses_keep_its_reason(tmp_path):
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(tmp_path / "a.safetensors", {"a": shared, "b": shared})
    assert names(tmp_path) == []


@pytest.mark.parametrize("folder", ["missing", "file/in"])
def test_a_folder_that_cannot_be_written_to(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"cannot write a.safetensors: No such file|cannot write a.safetensors: Not a dir"
    ):
        write_tensors(tmp_path / folder / "a.safetensors", {"a": torch.zeros(1)})


def test_a_full_disk(tmp_path):
    """The limit on a file's size stands for the disk: writing fails in the middle, with another reason."""
    file = tmp_path / "a.safetensors"
    write_tensors(file, {"a": torch.ones(3)})
    program = "import torch; from fastfg.files import write_tensors; from pathlib import Path\n"
    program += "try: write_tensors(Path('a.safetensors'), {'a': torch.zeros(100_000)})\n"
    program += "except OSError as error: print(error.errno, error)"
    ended = limited(tmp_path, program)
    said = f"{errno.EFBIG} [Errno {errno.EFBIG}] cannot write a.safetensors: File too large. What was finished before"
    assert ended.stdout.startswith(said), ended.stderr
    assert load_file(file)["a"].tolist() == [1, 1, 1]
    assert names(tmp_path) == ["a.safetensors"]


def test_a_new_file_is_written_once(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write_new(file, b"one")
    write_new(file, b"two")
    assert file.read_bytes() == b"one"

    def no_links(*_):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr("os.link", no_links)
    write_new(file, b"three")
    write_new(tmp_path / "b.txt", b"one")
    assert (file.read_bytes(), (tmp_path / "b.txt").read_bytes()) == (b"one", b"one")
    assert names(tmp_path) == ["a.txt", "b.txt"]
