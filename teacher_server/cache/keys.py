"""What a score depends on, as one key: equal keys are equal scores, so entries never go stale."""

from __future__ import annotations

import hashlib
import struct

from protos.scores import ScoreSpec, Sequence

Key = bytes
"""32 bytes."""


def score_key(fingerprint: str, sequence: Sequence, spec: ScoreSpec) -> Key:
    """SHA-256 over all that a score depends on; the fields are resolved first, so that equal wants are equal keys."""
    fields = ",".join(sorted(field.value for field in spec.fields(sequence.candidates)))
    head = (
        f"{fingerprint}\0{fields}\0{len(sequence.token_ids)}\0{sequence.score_start}\0{sequence.candidates}\0"
        f"{spec.top_k}\0"
    )
    digest = hashlib.sha256(head.encode())
    digest.update(struct.pack(f"<I{len(spec.temperatures)}d", len(spec.temperatures), *spec.temperatures))
    digest.update(sequence.token_ids.data)
    if sequence.candidate_ids is not None:
        digest.update(sequence.candidate_ids.data)
    return digest.digest()
