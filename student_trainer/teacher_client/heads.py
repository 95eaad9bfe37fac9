"""A teacher's LM head: put together from its parts, and kept on disk so that a machine fetches it once.

A folder for each fingerprint holds weight and bias as .npy files and about.json with their sizes and digests, which are
checked whenever it is read. It is written beside its place and renamed into it, so that no reader meets half of one and
processes that write at the same time do not disturb each other. Knows files and arrays; no transport, no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from protos import codec, errors
from protos.head import Head
from protos.scores import Floats, TeacherInfo

log = logging.getLogger(__name__)

Make = Callable[[str, tuple[int, ...], Any], Any]
"""(name, shape, dtype) -> an array to be filled."""

ABOUT = "about.json"


def default_cache() -> Path:
    """$XDG_CACHE_HOME/strong2weak, or ~/.cache/strong2weak."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strong2weak"


def in_memory(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array in memory."""
    return np.empty(shape, dtype)


def assemble(parts: Iterable[Head], info: TeacherInfo, make: Make = in_memory) -> Head:
    """The whole head of its parts, in order; TeacherFailed where they do not fit together or are not `info`'s."""
    reader = codec.HeadReader()
    weight: Any = None
    bias: Floats | None = None
    dtype = ""
    for part in map(reader.add, parts):
        if weight is None:
            shape, dtype = (part.total_rows, part.hidden_size), part.dtype
            if shape != (info.vocab_size, info.hidden_size):
                raise errors.TeacherFailed(
                    f"the teacher's head is {list(shape)}, it described one of {[info.vocab_size, info.hidden_size]}"
                )
            weight = make("weight", shape, part.weight.dtype)
            bias = make("bias", shape[:1], np.float32) if part.bias is not None else None
        weight[part.first_row : part.last_row] = part.weight
        if bias is not None:
            bias[part.first_row : part.last_row] = part.bias
    reader.finish()
    return Head(weight, dtype, bias)


def folder_of(cache: Path, info: TeacherInfo) -> Path:
    """Where the head of that teacher is kept."""
    return cache / "heads" / hashlib.blake2b(info.fingerprint.encode(), digest_size=16).hexdigest()


def load(cache: Path, info: TeacherInfo) -> Head | None:
    """The kept head, mapped from its files; None where there is none or it is not what was written."""
    folder = folder_of(cache, info)
    try:
        about = json.loads((folder / ABOUT).read_text("utf-8"))
        if about["fingerprint"] != info.fingerprint:
            return None
        for name, digest in about["files"].items():
            if _digest(folder / name) != digest:
                raise ValueError(f"{name} is not what was written")
        arrays = {name: np.load(folder / name, mmap_mode="c") for name in about["files"]}
        return Head(arrays["weight.npy"], about["dtype"], arrays.get("bias.npy"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        log.warning("the head in %s is damaged (%s), fetching it again", folder, error)
        return None


def store(cache: Path, info: TeacherInfo, parts: Iterable[Head]) -> Head:
    """Writes a head to its place as its parts arrive, and gives it mapped from there. OSError where that fails."""
    folder = folder_of(cache, info)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name[:8]}-", dir=folder.parent))
    try:
        names: list[str] = []

        def make(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
            names.append(f"{name}.npy")
            return np.lib.format.open_memmap(staging / names[-1], mode="w+", dtype=dtype, shape=shape)

        head = assemble(parts, info, make)
        for array in (head.weight, head.bias):
            if isinstance(array, np.memmap):
                array.flush()
        digests = {name: _digest(staging / name) for name in names}
        about = {"fingerprint": info.fingerprint, "teacher": info.name, "dtype": head.dtype, "files": digests}
        (staging / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(staging, folder)
        except OSError:
            if not (folder / ABOUT).is_file():  # else another process was faster, with the same head
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    found = load(cache, info)
    if found is None:
        raise OSError(f"the head that was written to {folder} cannot be read back; is the disk full?")
    return found


def _digest(file: Path) -> list[int | str]:
    """Size in bytes and BLAKE2b of a file."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return [stream.tell(), digest]
