"""Start-up of the transformers backend: what it reports, how it is told apart, what it refuses in plain words."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protos.scores import Field, Mode, ScoreSpec, Sequence
from protos.tokenizer_hash import template_hash
from teacher_server.backends import features, model_files, transformers_model
from teacher_server.backends.factory import make_backend
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.transformers_backend import TransformersBackend
from tests.teacher_server.backends.conftest import TEMPLATE
from tests.teacher_server.backends.helpers import complete, ids_of

Saver = Callable[[str], Path]


def start(folder: Path | str, **options: Any) -> TransformersBackend:
    """A started backend, closed at once: only what it reports is looked at."""
    backend = make_backend(BackendOptions(model=str(folder), **{"device": "cpu", **options}))
    assert isinstance(backend, TransformersBackend)

    async def run() -> None:
        try:
            await backend.start()
        finally:
            await backend.close()

    asyncio.run(run())
    return backend


def test_a_teacher_describes_itself(saved: Saver) -> None:
    info = start(saved("qwen3"), name="tiny", max_top_k=100).info
    assert info.name == "tiny"
    assert (info.vocab_size, info.normalized_size) == (261, 261)
    assert info.eos_token_ids == (256, 258)
    assert info.modes == (Mode.THINKING, Mode.NON_THINKING)
    assert info.fields == frozenset(Field)
    assert info.template_hash == template_hash(TEMPLATE)
    assert info.dtype == "float32"
    assert info.engine.startswith("transformers ")
    limits = info.limits
    assert (limits.sequence_tokens, limits.top_k, limits.candidates) == (1024, 100, 261)
    assert (limits.request_tokens, limits.sequences, limits.temperatures) == (262144, 4096, 8)


def test_the_fingerprint_is_stable_and_changes_with_one_byte_of_the_weights_and_with_each_choice(
    saved: Saver, tmp_path: Path
) -> None:
    first = start(saved("qwen3")).info.fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(saved("qwen3"), copy)
    assert start(copy).info.fingerprint == first
    assert start(copy, dtype="bfloat16").info.fingerprint != first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    changed = start(copy).info.fingerprint
    assert changed != first
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert start(copy).info.fingerprint not in (first, changed)


def test_a_blob_of_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("a" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"x")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert model_files.file_hash(link) == "a" * 64


def drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"not weights"), "does not load"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nobody"}'), "does not load"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "no tokenizer"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer is in"),
        (drop_a_weight, "1 weights of .* are missing"),
    ],
)
def test_a_broken_folder_is_a_value_error_in_plain_words(
    spoil: Callable[[Path], object], words: str, saved: Saver, tmp_path: Path
) -> None:
    copy = tmp_path / "broken"
    shutil.copytree(saved("qwen3"), copy)
    spoil(copy)
    with pytest.raises(ValueError, match=words):
        start(copy)


def test_a_folder_that_is_not_there_and_a_missing_gpu_are_value_errors(saved: Saver) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        start("/nowhere/at/all")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA GPU"):
            start(saved("qwen3"), device="cuda")
        with pytest.raises(ValueError, match="flash_attention_2 needs a CUDA GPU"):
            start(saved("qwen3"), attn_implementation="flash_attention_2")


def test_a_hub_id_that_cannot_be_reached_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a folder here nor reachable on the hub"):
        model_files.resolve("nobody-here/no-such-model-of-ours")


@pytest.mark.parametrize(
    ("kind", "way"), [("qwen3", "head"), ("gpt2", "head"), ("gemma2", "replay"), ("granite", "replay")]
)
def test_the_self_check_finds_the_read_out_that_fits(
    kind: str, way: str, saved: Saver, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = transformers_model.load(saved(kind), BackendOptions(model="x", device="cpu"))
    with torch.inference_mode():
        chosen = features.choose(loaded, 261)
        ids = torch.arange(40).reshape(2, 20)
        theirs = loaded.model(ids).logits[..., :261]
        ours = chosen.head(chosen.run(ids).flatten(0, 1)).reshape(theirs.shape)
        full = features.full(loaded, 261)
        also = full.head(full.run(ids).flatten(0, 1)).reshape(theirs.shape)
    assert chosen.kind == way
    assert not chosen.equal_lengths
    assert ("after the LM head" in caplog.text) == (way == "replay")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(also, theirs)


def test_a_model_whose_logits_need_more_than_the_last_hidden_state_gets_full_logits(
    saved: Saver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = transformers_model.load(saved("qwen3"), BackendOptions(model="x", device="cpu"))
    real = loaded.model.forward

    def forward(input_ids: torch.Tensor, **rest: Any) -> Any:
        out = real(input_ids=input_ids, **rest)
        out.logits = out.logits + input_ids[..., None] / 50
        return out

    monkeypatch.setattr(loaded.model, "forward", forward)
    with torch.inference_mode():
        assert features.choose(loaded, 261).kind == "full"
    assert "costs memory" in caplog.text


def test_a_model_that_does_not_bear_padding_only_batches_equal_lengths(
    saved: Saver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = transformers_model.load(saved("qwen3"), BackendOptions(model="x", device="cpu"))
    real = loaded.decoder.forward

    def forward(input_ids: torch.Tensor, **rest: Any) -> Any:
        out = real(input_ids=input_ids, **rest)
        out.last_hidden_state = out.last_hidden_state * (1 + input_ids.shape[1] / 100)
        return out

    monkeypatch.setattr(loaded.decoder, "forward", forward)
    with torch.inference_mode():
        chosen = features.choose(loaded, 261)
    assert chosen.equal_lengths
    assert "equal length" in caplog.text


def test_dynamic_and_long_rope_bound_what_may_share_a_batch(saved: Saver) -> None:
    from transformers import Qwen3Config

    def lengths(**rope: Any) -> tuple[int, int]:
        return transformers_model._lengths(Qwen3Config(max_position_embeddings=4096, rope_parameters=rope))

    assert lengths(rope_type="default", rope_theta=1e4) == (4096, 0)
    assert lengths(rope_type="dynamic", rope_theta=1e4, factor=4.0, original_max_position_embeddings=1024) == (1024, 0)
    assert lengths(
        rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=1024, factor=4.0,
        short_factor=[1.0] * 64, long_factor=[2.0] * 64,
    ) == (4096, 1024)  # fmt: skip


def test_capped_attention_scores_are_never_left_to_sdpa(saved: Saver) -> None:
    assert transformers_model.load(saved("gemma2"), BackendOptions(model="x", device="cpu")).attention == "eager"
    assert transformers_model.load(saved("qwen3"), BackendOptions(model="x", device="cpu")).attention == "sdpa"
    with pytest.raises(ValueError, match="caps its attention scores"):
        start(saved("gemma2"), attn_implementation="sdpa")


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_models_score_and_generate_close_to_the_original(quantization: str, saved: Saver) -> None:
    pytest.importorskip("bitsandbytes")
    sequence = Sequence(ids_of(np.random.default_rng(0), 60, 200))
    plain = TransformersBackend(BackendOptions(model=str(saved("qwen3")), device="cpu"))
    small = TransformersBackend(BackendOptions(model=str(saved("qwen3")), device="cpu", quantization=quantization))  # type: ignore[arg-type]

    async def run() -> float:
        await asyncio.gather(plain.start(), small.start())
        a, b = await asyncio.gather(*(t.score(sequence, ScoreSpec(top_k=4)) for t in (plain, small)))
        made = await complete(small, sequence.token_ids[:9], n=2, max_tokens=5, ignore_eos=True)
        assert [len(t) for t in made.tokens] == [5, 5]
        await asyncio.gather(plain.close(), small.close())
        assert a.token_logprobs is not None
        assert b.token_logprobs is not None
        return float(np.corrcoef(a.token_logprobs, b.token_logprobs)[0, 1])

    assert asyncio.run(run()) > 0.9
    assert small.info.quantization == quantization
    assert small.info.fingerprint != plain.info.fingerprint


def test_models_that_load_at_the_same_time_keep_their_tied_weights(saved: Saver) -> None:
    from transformers import AutoModelForCausalLM

    backends = [TransformersBackend(BackendOptions(model=str(saved("gpt2")), device="cpu")) for _ in range(4)]

    async def run() -> list[np.ndarray]:
        await asyncio.gather(*(backend.start() for backend in backends))
        sequence = Sequence(np.arange(20, dtype=np.int32))
        scores = [(await backend.score(sequence, ScoreSpec())).token_logprobs for backend in backends]
        await asyncio.gather(*(backend.close() for backend in backends))
        return [s for s in scores if s is not None]

    first, *others = asyncio.run(run())
    assert all(np.array_equal(first, other) for other in others)
    model = AutoModelForCausalLM.from_pretrained(saved("gpt2"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_generation_config_with_one_eos_id_or_none_is_understood(saved: Saver, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved("qwen3"), copy)
    path = copy / "generation_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "eos_token_id": 256}))
    assert start(copy).info.eos_token_ids == (256, 258)
    path.unlink()
    assert start(copy).info.eos_token_ids == (258,)


def test_an_unknown_backend_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="no backend 'nobody'"):
        make_backend(BackendOptions(model="x", backend="nobody"))  # type: ignore[arg-type]
