"""The LM head as a domain type, whole or in consecutive rows, and how its numbers and hidden states travel as bits.

Numpy has no bfloat16, so 16-bit numbers are held as their bits in uint16; `itemsize` and `BITS` say how wide a named
dtype is and as what it is held. It knows no transport, no engine and no message. Legend: V real vocabulary, R rows,
H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protos.scores import BITS, Bits, Floats

ROWS_BYTES = 1024 * 1024
"""Largest weight, in bytes, of the rows that travel in one message."""


def itemsize(dtype: str) -> int:
    """Bytes of one number: 2 for bfloat16 and float16, 4 for float32; ValueError for another name."""
    return np.dtype(held_as(dtype)).itemsize


def held_as(dtype: str) -> type[np.uint16] | type[np.float32]:
    """The numpy type that holds numbers of a named dtype; ValueError for a name that is none of BITS."""
    if dtype not in BITS:
        raise ValueError(f"dtype must be one of {', '.join(BITS)}, got {dtype!r}")
    return BITS[dtype]


def rows_per_message(hidden_size: int) -> int:
    """The number of rows whose weight fits ROWS_BYTES in any dtype, at least 1."""
    return max(1, ROWS_BYTES // (4 * hidden_size))


def widened(bits: Bits, dtype: str) -> Floats:
    """float32[...] of numbers in a named dtype, exactly."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "float16" else bits.astype(np.float32, copy=False)


@dataclass(frozen=True, eq=False)
class Head:
    """All V rows of an LM head, or some of them, with the number of rows before and after these.

    `weight` uint16[R,H] (bits of `dtype` bfloat16 or float16) or float32[R,H]; `bias` float32[R] or None. The logits of
    a hidden state h[H] are weight @ h + bias, summed in float32. Checked when it is made (ValueError).
    """

    weight: Bits
    dtype: str
    bias: Floats | None = None
    first_row: int = 0
    rows_after: int = 0

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.weight.dtype != held_as(self.dtype):
            raise ValueError(
                f"the weight of a head in {self.dtype} must be {np.dtype(held_as(self.dtype)).name}[R,H], got "
                f"{self.weight.dtype}{list(self.weight.shape)}"
            )
        if self.bias is not None and (self.bias.dtype != np.float32 or self.bias.shape != (len(self.weight),)):
            raise ValueError(
                f"the bias must be float32[{len(self.weight)}], got {self.bias.dtype}{list(self.bias.shape)}"
            )
        if self.first_row < 0 or self.rows_after < 0:
            raise ValueError(f"rows {self.first_row} to {self.last_row} are not within {self.total_rows} rows")

    @property
    def last_row(self) -> int:
        """The row after the last one that is here."""
        return self.first_row + len(self.weight)

    @property
    def total_rows(self) -> int:
        """V."""
        return self.last_row + self.rows_after

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return int(self.weight.nbytes) + (0 if self.bias is None else int(self.bias.nbytes))

    def parts(self, rows: int) -> Iterator[Head]:
        """The same in parts of `rows` rows, without copying."""
        for first in range(0, len(self.weight), rows):
            bias = None if self.bias is None else self.bias[first : first + rows]
            weight = self.weight[first : first + rows]
            after = self.rows_after + len(self.weight) - first - len(weight)
            yield Head(weight, self.dtype, bias, self.first_row + first, after)


def logits(hidden: Bits, hidden_dtype: str, head: Head) -> npt.NDArray[np.float32]:
    """float32[T,R]: what a head makes of hidden states [T,H]; in numpy, for notebooks and tests."""
    product = widened(hidden, hidden_dtype) @ widened(head.weight, head.dtype).T
    return product if head.bias is None else product + head.bias
