"""The disassembler: where it is found, and what code it is given. Stand-ins of it, no real one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from autotune.sass import disassembler
from autotune.sass.disassembler import NotDisassembled, cubin_in, disassembled, find_disassembler


def elf(machine: int, rest: bytes) -> bytes:
    """An ELF file: a header, `rest`, and one section's header behind it."""
    header = b"\x7fELF" + bytes(12)
    header += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 0, 64 + len(rest), 0, 64, 56, 0, 64, 1, 0)
    return header + rest + bytes(64)


CUBIN = elf(190, b"code of a GPU")
LIBRARY = elf(62, b"before" + CUBIN + b"after")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any disassembler: PATH is this folder, with what a shell script needs beside it."""
    monkeypatch.setenv("PATH", f"{tmp_path}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(disassembler, "PACKAGES", ())
    find_disassembler.cache_clear()
    yield tmp_path
    find_disassembler.cache_clear()


def test_the_cubin_in_a_library_is_found_whole() -> None:
    assert cubin_in(LIBRARY) == CUBIN
    assert cubin_in(elf(62, b"no code of a GPU")) is None
    assert cubin_in(b"\x7fELF") is None


def test_code_for_a_cpu_is_not_disassembled() -> None:
    with pytest.raises(NotDisassembled, match="the library carries no CUDA code"):
        disassembled(elf(62, b""))


def test_without_a_disassembler_one_line_says_how_to_get_one(alone: Path) -> None:
    with pytest.raises(NotDisassembled, match="nvdisasm is not here: pip install nvidia-cuda-nvdisasm, or put the bin"):
        disassembled(LIBRARY)


def test_it_is_looked_for_on_the_path_beside_nvcc_in_cuda_home_and_in_packages(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class File(type(alone)):
        def locate(self) -> Path:
            return alone / self

    monkeypatch.setattr(disassembler, "PACKAGES", ("not-installed-at-all", "some-package"))
    monkeypatch.setattr(disassembler.metadata, "files", files_of({"some-package": [File("x.py"), File("in/nvdisasm")]}))
    monkeypatch.setenv("CUDA_HOME", str(alone / "cuda"))
    places = [program(alone / place / "nvdisasm", "") for place in ("in", "cuda/bin", "toolkit")]
    program(alone / "toolkit/nvcc", "")
    (alone / "nvcc").symlink_to(alone / "toolkit/nvcc")
    places.append(program(alone / "nvdisasm", ""))
    for place in reversed(places):
        find_disassembler.cache_clear()
        assert find_disassembler() == str(place)
        place.unlink()
    find_disassembler.cache_clear()
    assert find_disassembler() is None


def files_of(packages: dict[str, list[Path]]):
    def files(name: str) -> list[Path]:
        if name not in packages:
            raise disassembler.metadata.PackageNotFoundError(name)
        return packages[name]

    return files


def test_it_is_given_the_cubin_and_its_words_come_back(alone: Path) -> None:
    program(alone / "nvdisasm", 'while read -r line; do echo "$line"; done < "$1"; echo "$1"')
    said = disassembled(elf(62, elf(190, b"\nsome text\n")))
    assert "some text" in said
    assert said.endswith("kernel.cubin\n")


def test_what_it_refuses_and_what_does_not_start_is_told_in_a_line(alone: Path) -> None:
    path = program(alone / "nvdisasm", "echo first >&2; echo 'too new' >&2; exit 1")
    with pytest.raises(NotDisassembled, match=r"nvdisasm does not read the code: too new$"):
        disassembled(LIBRARY)
    path.write_text("#!/not/there\n")
    with pytest.raises(NotDisassembled, match="nvdisasm does not start: "):
        disassembled(LIBRARY)
