"""`python -m student_trainer export`: a folder with whole weights, made of a checkpoint, a model folder or an adapter.

Adapters are merged into their base. The result is loaded with transformers and must give finite logits, those of the
source up to its data type, before it gets its name. Knows no teacher and no training.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLE = "What is 37 + 58? Think step by step."


def make_parser() -> argparse.ArgumentParser:
    """The command line of `export`."""
    parser = argparse.ArgumentParser(
        prog="python -m student_trainer export",
        description="Writes a model folder with whole weights: adapters are merged, the result is loaded and tried.",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, help="a checkpoint, model folder or adapter folder of a run")
    parser.add_argument("target", type=Path, help="the folder to write; it must not be there yet")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="data type of the weights [default: auto, that of the source's]",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model's files"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    print(export(options.source, options.target, options.dtype, trust_remote_code=options.trust_remote_code))
    return 0


def export(source: Path, target: Path, dtype: str = "auto", *, trust_remote_code: bool = False) -> str:
    """Writes `target` and says what it holds; UserError where there is no source, a target, or the check fails."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import adapters
    from .checkpoints import ABOUT, put
    from .errors import UserError
    from .models import resolve_dtype

    found = adapters.find(source)
    if not source.is_dir() or (found is None and not (source / "config.json").is_file()):
        raise UserError(f"{source} is no model folder", "source", "name a checkpoint or model folder")
    if target.exists():
        raise UserError(f"{target} is there already", "target", "name a new folder")
    alone = found if found is not None and found.alone else None
    load: dict[str, Any] = {"dtype": resolve_dtype(dtype), "trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(alone.base if alone else str(source), **load)
    has_tokenizer = (source / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(
        str(source) if has_tokenizer or alone is None else alone.base, trust_remote_code=trust_remote_code
    )
    if alone is not None:
        model = adapters.put_on(model, alone)
    expected = _logits(model, tokenizer)
    if alone is not None:
        model = model.merge_and_unload()
    staging = target.with_name(f".{target.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for name in (ABOUT, *(() if alone else ("README.md",))):
            if (source / name).is_file():
                shutil.copy(source / name, staging)
        written = AutoModelForCausalLM.from_pretrained(staging, **load)
        AutoTokenizer.from_pretrained(staging, trust_remote_code=trust_remote_code)
        far = float((_logits(written, tokenizer) - expected).abs().max() / expected.abs().max())
        if not far < 0.05:
            text = f"the written model's logits are off by {far:.1%} of the largest, so it was not kept"
            raise UserError(text, str(source), "try --dtype float32; if that does not help, report it")
        put(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    what = f"the adapter of rank {alone.rank} merged into {alone.base}" if alone else f"the weights of {source}"
    count = sum(p.numel() for p in written.parameters())
    return (
        f"{target}: {what}, {count:,} weights in {str(written.dtype).removeprefix('torch.')}; logits off by {far:.1e}"
    )


def _logits(model: Any, tokenizer: Any) -> Any:
    import torch

    ids = tokenizer(SAMPLE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()
