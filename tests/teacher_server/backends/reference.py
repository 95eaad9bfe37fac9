"""A plain float64 reference of scores: one sequence at a time, the whole softmax, no chunks, no tricks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from protos.scores import Field, Scores, ScoreSpec, Sequence


class Reference:
    """The model of a folder in float64 with eager attention."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        from transformers import AutoModelForCausalLM

        self.vocab_size = vocab_size
        plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **plain)
        self.model.eval()

    @torch.inference_mode()
    def logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """float64[N,V]: row i is the distribution of token i+1."""
        logits = self.model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0, :, : self.vocab_size]
        return torch.log_softmax(logits.double(), -1).numpy()

    def check(self, scores: Scores, sequence: Sequence, spec: ScoreSpec, within: float) -> None:
        """Compares every field that was asked for."""
        ids, start = sequence.token_ids, sequence.score_start
        l_TV = self.logprobs(ids)[start - 1 : -1]
        fields = spec.fields(sequence.candidates)
        expected = set()

        def close(name: str, want: np.ndarray) -> None:
            expected.add(name)
            got = getattr(scores, name)
            assert got is not None, name
            assert got.shape == want.shape, name
            assert np.abs(got - want).max(initial=0) <= within, (name, float(np.abs(got - want).max()))

        if Field.TOKEN_LOGPROBS in fields:
            close("token_logprobs", np.take_along_axis(l_TV, ids[start:, None], 1)[:, 0])
        if Field.CANDIDATE_LOGPROBS in fields and sequence.candidate_ids is not None:
            close("candidate_logprobs", np.take_along_axis(l_TV, sequence.candidate_ids, 1))
        top = np.argsort(-l_TV, axis=1)[:, : spec.top_k]
        if Field.TOP in fields:
            close("top_logprobs", np.take_along_axis(l_TV, top, 1))
            ids_got = scores.top_token_ids
            assert ids_got is not None
            expected.add("top_token_ids")
            assert all(len(set(row)) == spec.top_k for row in ids_got.tolist())
            assert np.abs(np.take_along_axis(l_TV, ids_got, 1) - np.take_along_axis(l_TV, top, 1)).max() <= within
        c = np.stack([np.log(np.exp(l_TV / t).sum(1)) for t in spec.temperatures], 1)
        if Field.LOG_NORMALIZER in fields:
            close("log_normalizer", c)
        if Field.TAIL_LOGPROB in fields:
            np.put_along_axis(l_TV, top, -np.inf, 1)
            with np.errstate(divide="ignore"):
                tails = np.stack([np.log(np.exp(l_TV / t).sum(1)) for t in spec.temperatures], 1) - c
            close("tail_logprob", np.maximum(tails, -100))
        assert set(scores.arrays()) == expected
