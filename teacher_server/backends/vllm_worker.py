"""The part of the teacher that runs inside vLLM's workers, which answers questions where the hidden states are.

vLLM mixes `TeacherWorker`, its `worker_extension_cls`, into its worker class, and the server calls its methods by
`collective_rpc` once the engine is up. `teacher_prepare` puts the scorer where the model runner computes the
log-probabilities of prompts; requests without a question go the engine's own way, as before. Of vLLM it uses, beside
public names, these of its model runners, compared in 0.32 and 0.33: V2 `prompt_logprobs_worker` and its four methods,
V1 `_get_prompt_logprobs_dict`, `num_prompt_logprobs` and `requests`. The server checks the answers at start-up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from teacher_server.backends import readout
from teacher_server.backends.bits import dtype_name
from teacher_server.backends.vllm_head import LmHead
from teacher_server.backends.vllm_scorer import Part, PromptScorer, Result
from teacher_server.backends.vllm_wire import Question


class TeacherWorker:
    """Methods that the server calls in every worker; names are long because vLLM's worker gets them too."""

    def teacher_prepare(self, vocab_size: int) -> dict[str, Any]:
        """Puts the scorer in place; what it found of this worker: runner, head, hidden width and dtype, shard."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        model: nn.Module = runner.get_model()
        found: dict[str, Any] = {"runner": "none", "head": "none", "masks": True, "measures": True}
        self.teacher_lm_head: LmHead | None = None
        self.teacher_scorer: PromptScorer | None = None
        if not _last_stage():
            return found
        device = torch.device(runner.device)
        head = self.teacher_lm_head = LmHead.of(model, vocab_size, device, _tensor_group())
        scorer = PromptScorer(head.read, device, readout.chunk_rows(vocab_size, device))
        self.teacher_scorer = scorer
        config: Any = self.vllm_config.model_config  # type: ignore[attr-defined]
        found |= {"head": "engine" if head.direct is None else "direct", "kernels": type(head.kernels).__name__}
        found |= {"hidden_size": int(config.get_hidden_size()), "hidden_dtype": dtype_name(config.dtype)}
        if hasattr(runner, "prompt_logprobs_worker"):
            runner.prompt_logprobs_worker = _RunnerV2(runner.prompt_logprobs_worker, scorer)
            _mask_padding(model, vocab_size)
            return found | {"runner": "v2"}
        runner._get_prompt_logprobs_dict = _RunnerV1(runner, scorer)
        if device.type == "cpu":
            runner.input_batch.generators = _Generators()
        _mask_padding(model, vocab_size)
        return found | {"runner": "v1"}

    def teacher_readout_s(self) -> float:
        """Seconds in which scores were read out since the last time that this was asked."""
        return 0.0 if self.teacher_scorer is None else self.teacher_scorer.stopwatch.take()

    def teacher_head_rows(self, first: int, last: int) -> tuple[int, bytes, bytes] | None:
        """(first row held here, bytes of the weight, of the bias) of the LM head's rows first..last-1; None without."""
        head = self.teacher_lm_head
        return None if head is None else head.rows(first, last)


def _last_stage() -> bool:
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def _tensor_group() -> Any:
    from vllm.distributed import get_tp_group

    return get_tp_group()


def _mask_padding(model: nn.Module, vocab_size: int) -> None:
    """Makes the model's own logits -inf beyond the real vocabulary, for sampling and for its log-probabilities."""
    inner: Any = model.compute_logits
    if getattr(inner, "teacher_masks", False):
        return

    def compute_logits(hidden: Tensor, *arguments: Any, **options: Any) -> Tensor | None:
        logits: Tensor | None = inner(hidden, *arguments, **options)
        if logits is not None and logits.shape[-1] > vocab_size:
            logits[..., vocab_size:] = -torch.inf
        return logits

    compute_logits.teacher_masks = True  # type: ignore[attr-defined]
    model.compute_logits = compute_logits  # type: ignore[assignment]


class _RunnerV2:
    """Stands in for `PromptLogprobsWorker`: takes requests with a question, hands the others on."""

    def __init__(self, stock: Any, scorer: PromptScorer) -> None:
        self._stock = stock
        self._scorer = scorer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def add_request(self, name: str, index: int, params: Any) -> None:
        from vllm import SamplingParams

        question = Question.read(params.extra_args)
        if question is None:
            self._scorer.remove(name)
            self._stock.add_request(name, index, params)
            return
        self._scorer.add(name, question)
        self._stock.add_request(name, index, SamplingParams())  # the slot may remember what an earlier request wanted

    def remove_request(self, name: str) -> None:
        self._scorer.remove(name)
        self._stock.remove_request(name)

    def compute_prompt_logprobs(
        self,
        logits_fn: Any,
        hidden_states: Tensor,
        batch: Any,
        all_token_ids: Tensor,
        num_computed_tokens: Tensor,
        prompt_lens: np.ndarray[Any, Any],
    ) -> dict[str, Any]:
        """The engine's own answers, and ours for the questions whose last row is in this step."""
        answers: dict[str, Any] = self._stock.compute_prompt_logprobs(
            logits_fn, hidden_states, batch, all_token_ids, num_computed_tokens, prompt_lens
        )
        parts, ended = [], []
        for row, name in enumerate(batch.req_ids):
            if name not in self._scorer:
                continue
            slot = batch.idx_mapping_np[row]
            begin = int(batch.num_computed_prefill_tokens_np[row])
            end, length = begin + int(batch.num_scheduled_tokens[row]), int(prompt_lens[slot])
            offset = int(batch.query_start_loc_np[row]) - begin
            part = _part(self._scorer, name, begin, end, length, hidden_states, offset, all_token_ids[slot])
            parts += part
            if end >= length:
                ended.append(name)
        self._scorer.step(parts)
        return answers | {name: _tensors(self._scorer.finish(name)) for name in ended}


class _RunnerV1:
    """Stands in for the older runner's `_get_prompt_logprobs_dict`."""

    def __init__(self, runner: Any, scorer: PromptScorer) -> None:
        self._runner = runner
        self._stock = runner._get_prompt_logprobs_dict
        self._scorer = scorer
        self._tokens: dict[str, Tensor] = {}

    def __call__(self, hidden_states: Tensor, scheduled: dict[str, int]) -> dict[str, Any]:
        runner, scorer = self._runner, self._scorer
        for name in [name for name in scorer.names if name not in runner.requests]:
            self._forget(name)
        for name in list(runner.num_prompt_logprobs):
            question = Question.read(runner.requests[name].sampling_params.extra_args)
            if question is not None:
                del runner.num_prompt_logprobs[name]
                scorer.add(name, question)
                tokens = np.asarray(runner.requests[name].prompt_token_ids, dtype=np.int32)
                self._tokens[name] = torch.from_numpy(tokens).to(hidden_states.device)
        answers: dict[str, Any] = self._stock(hidden_states, scheduled)
        parts, ended = [], []
        for name in scorer.names:
            if name not in scheduled:
                continue
            begin = int(runner.requests[name].num_computed_tokens)
            ids = self._tokens[name]
            end, length = begin + scheduled[name], len(ids)
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]]) - begin
            parts += _part(scorer, name, begin, end, length, hidden_states, offset, ids)
            if end >= length:
                ended.append(name)
        scorer.step(parts)
        for name in ended:
            answers[name] = _tensors(scorer.finish(name), to_cpu=True)
            self._forget(name)
        return answers

    def _forget(self, name: str) -> None:
        self._scorer.remove(name)
        self._tokens.pop(name, None)


class _Generator(torch.Generator):
    """A CPU's generator that can be wound back to its beginning in the words that CUDA's have for it.

    The older runner winds back the seeded generator of a request whose prompt was only read in part; a CPU's has no
    offset, and the engine would die of it. Nothing of such a request was sampled, so the beginning is right.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self.manual_seed(self.initial_seed())


class _Generators(dict[int, torch.Generator]):
    def __setitem__(self, index: int, generator: torch.Generator) -> None:
        if not isinstance(generator, _Generator):
            state, generator = generator.get_state(), _Generator()
            generator.set_state(state)
        super().__setitem__(index, generator)


def _part(
    scorer: PromptScorer, name: str, begin: int, end: int, length: int, hidden: Tensor, offset: int, tokens: Tensor
) -> list[Part]:
    """The scored rows among a prompt's tokens begin..end-1 of `length`, if any; token t is at hidden[offset + t]."""
    lead = scorer.score_start(name) - 1  # the token that predicts the first scored one
    first, last = max(begin, lead), min(end, length - 1)
    if first >= last:
        return []
    rows = hidden[offset + first : offset + last]
    return [Part(name, first - lead, last - lead, length - 1 - lead, rows, tokens[first + 1 : last + 1])]


def _tensors(result: Result | None, *, to_cpu: bool = False) -> Any:
    """A result in the type in which the engine carries log-probabilities of prompts; None where there is none."""
    from vllm.v1.outputs import LogprobsTensors

    if result is None:
        return None
    ids, numbers, states = (tensor.cpu() for tensor in result) if to_cpu else result
    return LogprobsTensors(ids, numbers, states)
