"""Scores one batch of sequences: a forward pass, then the read-out in chunks of rows that may span sequences.

Knows tensors and jobs, no queue. Legend: B sequences, N tokens of the longest, W width of a feature, R rows.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protos.errors import TeacherFailed
from protos.scores import Field, ScoreSpec
from teacher_server.backends import readout
from teacher_server.backends.bits import to_bits
from teacher_server.backends.features import Features
from teacher_server.backends.jobs import Outbox, ScoreJob
from teacher_server.backends.packing import chunks
from teacher_server.backends.readout_blocks import Kernels
from teacher_server.backends.stopwatch import Stopwatch

_Part = tuple[ScoreJob, int, int]
"""Rows first..last-1 of a job."""


class Scorer:
    """Runs batches on one model; `packs` means that rows are concatenated without padding."""

    def __init__(
        self, features: Features, device: torch.device, vocab_size: int, kernels: Kernels, *, packs: bool
    ) -> None:
        self._features = features
        self._device = device
        self._kernels = kernels
        self._packs = packs
        self._chunk = readout.chunk_rows(vocab_size, device)
        self._stopwatch = Stopwatch()

    @torch.inference_mode()
    def score(self, jobs: list[ScoreJob], outbox: Outbox) -> None:
        """Answers each job through `outbox` as soon as its last row is read; TeacherFailed for non-finite results.

        Jobs that are cancelled meanwhile are left out of the next chunk. Errors of the engine are raised; jobs
        answered by then stay so.
        """
        rows = self._forward(jobs)
        self._stopwatch.start(self._device)
        groups: dict[tuple[ScoreSpec, frozenset[Field], int], list[ScoreJob]] = defaultdict(list)
        for job in jobs:
            groups[job.spec, job.fields, job.sequence.candidates].append(job)
        for (spec, fields, _), group in groups.items():
            got: dict[int, list[dict[str, Any]]] = defaultdict(list)
            ranges = ((job, 0, job.sequence.positions) for job in group)
            for chunk in chunks(ranges, self._chunk, lambda job: job.cancelled):
                result = self._read(chunk, rows, spec, fields)
                offset = 0
                for job, first, last in chunk:
                    got[id(job)].append({k: v[offset : offset + last - first] for k, v in result.items()})
                    offset += last - first
                    if last == job.sequence.positions:
                        scores = readout.assemble(got.pop(id(job)))
                        outbox.score(job, TeacherFailed() if scores is None else scores)
                outbox.flush()
        self._stopwatch.stop()

    def take_readout_s(self) -> float:
        """Seconds of reading scores out of features since the last time that this was asked."""
        return self._stopwatch.take()

    def _forward(self, jobs: list[ScoreJob]) -> dict[int, Tensor]:
        """The scored rows' features [T, W] of each job, by its identity; views of the batch.

        The last token of a sequence is scored and predicts nothing that is asked for, so it is not run.
        """
        lengths = [len(job.sequence.token_ids) - 1 for job in jobs]
        if self._packs:
            ids = np.concatenate([job.sequence.token_ids[:-1] for job in jobs])[None].astype(np.int64)
            positions = np.concatenate([np.arange(n) for n in lengths])[None]
            extra = {"position_ids": torch.from_numpy(positions).to(self._device)}
            starts = np.cumsum([0, *lengths[:-1]])
        else:
            # Padding on the right needs no mask under causal attention: no real token looks at what follows it.
            ids = np.zeros((len(jobs), max(lengths)), dtype=np.int64)
            for row, job in enumerate(jobs):
                ids[row, : lengths[row]] = job.sequence.token_ids[:-1]
            extra = {}
            starts = np.arange(len(jobs)) * ids.shape[1]
        features = self._features.run(torch.from_numpy(ids).to(self._device), **extra).flatten(0, 1)
        return {
            id(job): features[start + job.sequence.score_start - 1 : start + n]
            for job, start, n in zip(jobs, starts.tolist(), lengths, strict=True)
        }

    def _read(
        self, chunk: list[_Part], rows: dict[int, Tensor], spec: ScoreSpec, fields: frozenset[Field]
    ) -> dict[str, np.ndarray[Any, Any]]:
        features = torch.cat([rows[id(job)][first:last] for job, first, last in chunk])
        targets = [job.sequence.token_ids[job.sequence.score_start :][first:last] for job, first, last in chunk]
        candidates = [
            job.sequence.candidate_ids[first:last]
            for job, first, last in chunk
            if job.sequence.candidate_ids is not None
        ]
        if fields == {Field.HIDDEN_STATES}:
            return _hidden(features)
        device = features.device  # the copies wait for what the device is doing, so they come before the head
        asked = readout.Rows(_int64(targets).to(device), _int64(candidates).to(device) if candidates else None)
        result = readout.read_chunk(self._features.head(features), asked, spec, fields, self._kernels)
        arrays = {name: tensor.cpu().numpy() for name, tensor in result.items()}
        if Field.HIDDEN_STATES in fields:
            hidden = _hidden(features)
            arrays |= hidden | {"finite": arrays["finite"] & hidden["finite"]}
        return arrays


def _hidden(features: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    """The features of R rows as bits, and `finite` bool[R]."""
    finite = torch.isfinite(features).all(dim=-1)
    return {"hidden_states": to_bits(features), "finite": finite.cpu().numpy()}


def _int64(arrays: list[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))
