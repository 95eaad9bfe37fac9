"""An exported folder loads in the real vLLM and generates there what it generates in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from student_trainer.__main__ import main
from tests.tiny_qwen3 import make

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]
PROMPT = list(b"What is 37 + 58?")
NEW = 24


def adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter on `base` that changes what it says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    wrapped.save_pretrained(folder)
    return folder


def greedy(folder: Path) -> list[int]:
    """The tokens after PROMPT that transformers finds most likely."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=NEW)
    return [int(i) for i in found[0, len(PROMPT) :]]


def test_an_exported_adapter_loads_in_vllm_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.chdir(tmp_path)
    base = make(tmp_path / "base")
    exported = tmp_path / "exported"
    assert main(["export", str(adapter(base, tmp_path / "adapter")), str(exported)]) == 0
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names <= {path.name for path in exported.iterdir()}
    expected = greedy(exported)
    assert expected != greedy(base)
    llm = LLM(
        model=str(exported),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        distributed_executor_backend="uni",
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW)
    (found,) = llm.generate([TokensPrompt(prompt_token_ids=PROMPT)], sampling, use_tqdm=False)
    assert list(found.outputs[0].token_ids) == expected
    tokenizer = llm.get_tokenizer()
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1"}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert rendered.endswith("<think>\n\n</think>\n\n")
    chat = llm.chat([{"role": "user", "content": "1 + 1"}], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert len(chat[0].outputs[0].token_ids) > 0
