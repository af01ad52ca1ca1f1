"""Files of tensors that tell whether they are whole, and writing where a disk is full for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.loop import patience
from trainer.loop.patience import patiently
from trainer.loop.tensors import check_tensors, write_tensors

TENSORS = {
    "weight/a": torch.arange(1000.0),
    "exp_avg/a": torch.randn(4, 5),
    "step": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
    "half": torch.randn(7).bfloat16(),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shard.safetensors"
    write_tensors(TENSORS, path, pytest.fail)
    return path


def test_what_is_written_is_whole_and_plain_safetensors(file: Path) -> None:
    check_tensors(file)
    found = load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_turned_bit_anywhere_in_the_contents_is_noticed(file: Path) -> None:
    content = file.read_bytes()
    start = len(content) - sum(tensor.nbytes for tensor in TENSORS.values())
    for at in (start, start + 17, len(content) - 1):
        damaged = bytearray(content)
        damaged[at] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"shard\.safetensors: its contents differ from its checksum"):
            check_tensors(file)


def test_a_cut_file_is_noticed_and_a_missing_one_no_damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="shard"):
        check_tensors(file)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        check_tensors(file)


def test_files_of_earlier_releases_have_no_checksum(tmp_path: Path) -> None:
    save_file({"weight/a": torch.zeros(3)}, tmp_path / "old.safetensors")
    check_tensors(tmp_path / "old.safetensors")


def test_a_full_disk_is_waited_for_and_gets_its_last_bytes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSE", 0.0)
    done, said = [], list[str]()

    def write() -> str:
        done.append("write")
        if done.count("write") < 3:
            raise OSError("No space left on device")
        return "written"

    assert patiently(write, lambda: done.append("undo"), "step-1", said.append) == "written"
    assert done == ["write", "undo", "write", "undo", "write"]
    assert said == ["step-1 cannot be saved, trying again for 10 minutes: No space left on device"]
    monkeypatch.setattr(patience, "MINUTES", 0)
    done.clear()
    with pytest.raises(OSError, match="No space"):
        patiently(write, lambda: done.append("undo"), "step-1", said.append)
    assert done == ["write", "undo"]
