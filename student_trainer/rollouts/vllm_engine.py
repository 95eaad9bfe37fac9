"""Samples with vLLM, which runs in this process beside the student and takes its weights over after each update.

The engine is made without weights; before the first `sample` after an update each weight is copied from the student's
tensor into the engine's, so nothing touches a disk. vLLM samples over all rows of its LM head and changes temperatures
that it holds to be extreme, so padding is masked and the temperature applied in the model's logits, in float32, before
vLLM sees them; its own temperature stays 1. Knows vLLM's Python face, no teacher and no loss.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from protos.scores import FinishReason, Ids

from .. import distributed
from ..errors import UserError
from .base import Rollout, check_finite, row_limits, row_seeds
from .weights import full_weights

log = logging.getLogger(__name__)

GPU_MEMORY = 0.4
"""Share of a GPU's memory that the engine takes for its weights and keys and values while it samples."""


class VllmEngine:
    """One engine in each process of a training, on that process's device, started by the first `sample`.

    On a GPU it sleeps between two calls and then holds neither weights nor a cache. `engine_args` are further arguments
    of vllm.LLM; they win over those chosen here. `max_length` bounds every prompt with its completion.
    """

    name = "vllm"

    def __init__(
        self,
        model: Any,
        *,
        vocab_size: int,
        eos_ids: Sequence[int],
        slots: int,
        max_length: int,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.vocab_size, self.eos_ids = model, vocab_size, tuple(eos_ids)
        self.slots, self.max_length, self.engine_args = slots, max_length, dict(engine_args or {})
        self.gpu = next(model.parameters()).device.type == "cuda"
        self._llm: Any = None
        self._fresh = False
        self._logits = _Logits(vocab_size)
        self._serial = itertools.count()

    def sample(
        self,
        prompts: Sequence[Ids],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        max_length: int | None = None,
        logprobs: bool = False,
        rows: int | None = None,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Rollout]]:
        """See RolloutEngine; `rows` is not needed, vLLM runs what fits its memory and at most `slots`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        limits, seeds = row_limits(prompts, max_new_tokens, max_length), row_seeds(prompts, seed, names)
        if not prompts and distributed.world() == 1:
            return
        engine = self._ready().llm_engine  # the processes of a training start it together
        self._logits.temperature = temperature or 1.0
        places: dict[str, int] = {}
        try:
            for place, prompt in enumerate(prompts):
                params = SamplingParams(
                    max_tokens=int(limits[place]),
                    temperature=1.0 if temperature > 0 else 0.0,
                    seed=int(seeds[place].generate_state(1, np.uint64)[0] >> 1),
                    stop_token_ids=list(self.eos_ids),
                    ignore_eos=True,  # the model's own ids are among them
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                name = str(next(self._serial))
                places[name] = place
                engine.add_request(name, {"type": "token", "prompt_token_ids": prompt.tolist()}, params)
            while places:
                with _cpu_random_state_kept():
                    ended = [output for output in engine.step() if output.finished]
                for output in ended:
                    place = places.pop(output.request_id)
                    yield place, _rollout(prompts[place], output.outputs[0], logprobs)
        finally:
            if places:
                engine.abort_request(list(places))
                while engine.has_unfinished_requests():
                    engine.step()
            self._sleep()

    def update_weights(self) -> None:
        """The next `sample` takes the student's weights over."""
        self._fresh = False

    def close(self) -> None:
        """Ends the engine and gives its memory back."""
        llm, self._llm, self._fresh = self._llm, None, False
        if llm is None:
            return
        client = llm.llm_engine.engine_core
        if distributed.world() == 1:
            client.shutdown()
        else:
            _shut_down_beside(client)
        del llm, client
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def _ready(self) -> Any:
        """The engine, awake, with the student's present weights."""
        if self._llm is None:
            self._llm = self._start()
            self._llm.apply_model(self._logits.put_on)
        elif self.gpu:
            self._llm.wake_up(["weights"])
        if not self._fresh:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full_weights(self.model)})
            self._llm.apply_model(_refresh_tied_head)
            self._fresh = True
        if self.gpu:
            self._llm.wake_up(["kv_cache"])
        self._llm.reset_prefix_cache()
        return self._llm

    def _sleep(self) -> None:
        if self.gpu:
            self._llm.sleep(level=2)  # its weights go too; the student has them
            self._fresh = False

    def _start(self) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the student's tensors are
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the training's threads are not moved
        from vllm import LLM

        parameter = next(p for p in self.model.parameters() if p.is_floating_point())
        narrow = parameter.dtype is torch.float32 and self.gpu
        chosen: dict[str, Any] = {
            "model": self.model.config.name_or_path,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16" if narrow else str(parameter.dtype).removeprefix("torch."),
            "max_model_len": self.max_length,
            "max_num_seqs": self.slots,
            "distributed_executor_backend": "external_launcher" if distributed.world() > 1 else "uni",
            "disable_log_stats": True,
            "generation_config": "vllm",
        }
        if self.gpu:
            chosen |= {"gpu_memory_utilization": GPU_MEMORY, "enable_sleep_mode": True}
        with _random_state_kept():
            try:
                return LLM(**{**chosen, **self.engine_args})
            except (ValueError, RuntimeError, TypeError) as error:
                raise UserError(
                    f"vLLM did not start: {error}",
                    "policy_distillation.rollout_engine",
                    "change rollout_engine_args (gpu_memory_utilization where memory is short), or use continuous",
                ) from error


def _shut_down_beside(client: Any) -> None:
    """What `client.shutdown()` does, but for the default process group, which is the training's."""
    from vllm.distributed.parallel_state import destroy_model_parallel

    client._finalizer.detach()
    client.engine_core.model_executor.shutdown()
    client.engine_core.scheduler.shutdown()
    gc.unfreeze()
    destroy_model_parallel()


class _Logits:
    """Stands before a model's logits: float32, -inf beyond the real vocabulary, divided by the temperature."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.temperature = vocab_size, 1.0

    def put_on(self, model: nn.Module) -> None:
        """Replaces `model.compute_logits`."""
        inner: Any = model.compute_logits

        def compute_logits(*arguments: Any, **options: Any) -> Tensor | None:
            logits: Tensor | None = inner(*arguments, **options)
            if logits is None:
                return None
            logits = logits.float() / self.temperature
            logits[..., self.vocab_size :] = -torch.inf
            return logits

        model.compute_logits = compute_logits  # type: ignore[assignment]


def _refresh_tied_head(model: nn.Module) -> None:
    """Lets a head that is tied to the embedding see its new weight: on a CPU vLLM multiplies with a packed copy of it,
    which taking weights over renews for heads with a weight of their own alone.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    for head in (m for m in modules if isinstance(m, ParallelLMHead)):
        if any(m.weight is head.weight for m in modules if m is not head):
            head.quant_method.process_weights_after_loading(head)


def _rollout(prompt: Ids, output: Any, logprobs: bool) -> Rollout:
    numbers = np.array(output.logprobs.logprobs, dtype=np.float32)
    check_finite(numbers)
    reason = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}[output.finish_reason]
    return Rollout(prompt, np.array(output.token_ids, dtype=np.int32), reason, numbers if logprobs else None)


@contextmanager
def _cpu_random_state_kept() -> Iterator[None]:
    """On a CPU vLLM draws numbers that it does not use, for rows with a seed of their own."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds every generator of its process; a training's own random numbers go on as if it had not."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
