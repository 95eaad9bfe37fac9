"""A score as bytes for the disk and back: the arrays as they are, behind a header and before a digest of it all.

    magic, fields | T K C M | key | arrays, little-endian, in ORDER | SHA-256 of all before

It knows no file. Legend: T scored positions, K alternatives, C candidates, M temperatures.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np

from protos.scores import Scores
from teacher_server.cache.keys import Key

HEAD = struct.Struct("<4sI4I32s")
MAGIC = b"scr1"
DIGEST_BYTES = 32
ORDER = ("token_logprobs", "top_token_ids", "top_logprobs", "candidate_logprobs", "log_normalizer", "tail_logprob")
"""The fields that can be kept; hidden states cannot."""


def pack(key: Key, scores: Scores) -> bytes:
    """The bytes of `scores` under `key`; ValueError for hidden states."""
    arrays = scores.arrays()
    if not set(arrays) <= set(ORDER):
        raise ValueError(f"{sorted(set(arrays) - set(ORDER))} cannot be kept on the disk")
    there = sum(1 << bit for bit, name in enumerate(ORDER) if name in arrays)
    widths = [arrays[name].shape[1] if name in arrays else 0 for name in ("top_logprobs", "candidate_logprobs")]
    temperatures = next((arrays[n].shape[1] for n in ("log_normalizer", "tail_logprob") if n in arrays), 0)
    digest = hashlib.sha256()
    parts: list[bytes | memoryview] = [HEAD.pack(MAGIC, there, scores.positions, *widths, temperatures, key)]
    present = [arrays[name] for name in ORDER if name in arrays]
    parts += [np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data for array in present]
    for part in parts:
        digest.update(part)
    return b"".join([*parts, digest.digest()])


def unpack(key: Key, data: bytes) -> Scores | None:
    """The score that `pack` made of `key`, its arrays views of `data`; None where a single bit is another one."""
    if key_of(data) != key:
        return None
    _, there, t, k, c, m, _ = HEAD.unpack_from(data)
    shapes: dict[str, tuple[int, ...]] = {
        "token_logprobs": (t,),
        "top_token_ids": (t, k),
        "top_logprobs": (t, k),
        "candidate_logprobs": (t, c),
        "log_normalizer": (t, m),
        "tail_logprob": (t, m),
    }
    arrays: dict[str, Any] = {}
    offset = HEAD.size
    for bit, name in enumerate(ORDER):
        if there >> bit & 1:
            dtype = np.dtype("<i4" if name == "top_token_ids" else "<f4")
            count = int(np.prod(shapes[name]))
            arrays[name] = np.frombuffer(data, dtype, count, offset).reshape(shapes[name])
            offset += 4 * count
    return Scores(**arrays)


def key_of(data: bytes) -> Key | None:
    """The key of packed bytes; None where they are not what `pack` made."""
    if len(data) < HEAD.size + DIGEST_BYTES or not data.startswith(MAGIC):
        return None
    body = memoryview(data)[:-DIGEST_BYTES]
    if hashlib.sha256(body).digest() != data[-DIGEST_BYTES:]:
        return None
    key: Key = HEAD.unpack_from(data)[-1]
    return key
