"""Where a model's files are, and the fingerprint of what they hold. Knows files and the hub, no engine."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_LOG = logging.getLogger(__name__)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.py"]
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def resolve(model: str) -> Path:
    """The folder with the files of `model`, a folder or a hub id (downloaded if need be); ValueError if neither."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json; name a folder that save_pretrained wrote, or a hub id")
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"there is no folder {model}; name an existing folder or a hub id such as Qwen/Qwen3-8B")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(model, allow_patterns=[*_SMALL, "*.safetensors"]))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(model, allow_patterns=[*_SMALL, "*.bin"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{model} is neither a folder here nor reachable on the hub ({reason}); check the name and the network, "
            "or download it and name the folder"
        ) from error
    if not (found / "config.json").is_file():
        raise ValueError(f"{model} has no config.json on the hub; it is not a transformers model")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The weight files of `folder`: safetensors where there are any, else PyTorch's own, sorted by name."""
    for pattern in WEIGHTS:
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise ValueError(f"{folder} has no weights (*.safetensors or *.bin); the download or the copy is incomplete")


def file_hash(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's contents.

    The hub's cache names the blob of a large file by exactly this hash, so such a file is not read again.
    """
    target = path.resolve()
    if target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return target.name
    with target.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(folder: Path, parts: Iterable[str]) -> str:
    """Hexadecimal SHA-256 over configuration, generation configuration, every weight file and `parts`.

    `parts` name all else that changes a score: tokenizer, template, dtype, quantisation, engine.
    """
    return digest([*hashes(folder), *parts])


def hashes(folder: Path, *, weights: bool = True) -> list[str]:
    """A line for configuration, generation configuration and, unless an engine makes them up, each weight file."""
    files = [folder / "config.json", *(weight_files(folder) if weights else [])]
    if (folder / "generation_config.json").is_file():
        files.append(folder / "generation_config.json")
    size = sum(path.stat().st_size for path in files)
    if size > 2**33:
        _LOG.info("hashing %.0f GB of weights for the fingerprint", size / 1e9)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(file_hash, files))
    return [f"{path.name}={value}" for path, value in zip(files, found, strict=True)]


def digest(lines: Iterable[str]) -> str:
    """Hexadecimal SHA-256 over lines."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def generation_eos(folder: Path) -> tuple[int, ...]:
    """The end ids that generation_config.json names, if any."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    found = json.loads(path.read_text("utf-8")).get("eos_token_id")
    return () if found is None else tuple(found) if isinstance(found, list) else (int(found),)
