"""The sizes of a model that memory depends on, and how many weights follow from them.

From the config.json of a folder or of the hub, or from a table of the Qwen3 family, so that no network is needed for
these. Knows decoder-only models with gated MLPs, dense or with experts; no settings and no memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_trainer.errors import UserError, one_line


@dataclass(frozen=True)
class Shape:
    """A model's sizes, in numbers. `experts` 0 is a dense MLP of width `intermediate`; else every layer has `experts`
    of width `intermediate`, of which a token runs through `experts_per_token`. `positions` is the longest sequence.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    positions: int
    experts: int = 0
    experts_per_token: int = 0
    query_norm: bool = True
    attention_bias: bool = False

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; that of the values too."""
        return self.kv_heads * self.head_dim

    @property
    def mlp(self) -> int:
        """Width of the MLP that one token runs through."""
        return self.intermediate * max(self.experts_per_token, 1)

    @property
    def head_weights(self) -> int:
        """Weights of the LM head; of the embeddings too."""
        return self.vocab * self.hidden

    @property
    def linear_weights(self) -> int:
        """Weights of the layers' matrices: what adapters and quantisation are about."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        mlp = max(self.experts, 1) * 3 * self.hidden * self.intermediate + self.experts * self.hidden
        return self.layers * (attention + mlp)

    @property
    def weights(self) -> int:
        """All weights, tied ones once."""
        norms = self.layers * (2 * self.hidden + (2 * self.head_dim if self.query_norm else 0)) + self.hidden
        biases = self.layers * (self.queries + 2 * self.keys) if self.attention_bias else 0
        return self.linear_weights + norms + biases + self.head_weights * (1 if self.tied else 2)

    @property
    def active_weights(self) -> int:
        """Weights that one token runs through, embeddings and head included."""
        unused = self.experts - self.experts_per_token
        return self.weights - self.layers * max(unused, 0) * 3 * self.hidden * self.intermediate

    def adapter_weights(self, rank: int) -> int:
        """Weights of LoRA adapters of `rank` on every linear layer but the LM head: rank times both widths of each.

        Experts, which transformers keeps in one tensor for all of them, get none.
        """
        attention = 2 * (self.hidden + self.queries) + 2 * (self.hidden + self.keys)
        mlp = 0 if self.experts else 3 * (self.hidden + self.intermediate)
        return self.layers * rank * (attention + mlp)


def _qwen3(name: str, layers: int, hidden: int, heads: int, kv: int, mlp: int, tied: bool) -> Shape:
    return Shape(f"Qwen/{name}", layers, hidden, heads, kv, 128, mlp, 151_936, tied, 40_960)


KNOWN = {
    shape.name: shape
    for shape in (
        Shape("Qwen/Qwen3-235B-A22B", 94, 4096, 64, 4, 128, 1536, 151_936, False, 40_960, 128, 8),
        Shape("Qwen/Qwen3-30B-A3B", 48, 2048, 32, 4, 128, 768, 151_936, False, 40_960, 128, 8),
        _qwen3("Qwen3-32B", 64, 5120, 64, 8, 25_600, tied=False),
        _qwen3("Qwen3-14B", 40, 5120, 40, 8, 17_408, tied=False),
        _qwen3("Qwen3-8B", 36, 4096, 32, 8, 12_288, tied=False),
        _qwen3("Qwen3-4B", 36, 2560, 32, 8, 9728, tied=True),
        _qwen3("Qwen3-1.7B", 28, 2048, 16, 8, 6144, tied=True),
        _qwen3("Qwen3-0.6B", 28, 1024, 16, 8, 3072, tied=True),
    )
}
"""Published sizes of the Qwen3 family, by their names on the hub."""


def shape_of(source: str, key: str = "models.student_model") -> Shape:
    """The sizes of the model `source`: a folder's, the table's, or those of the hub; UserError where none of them is.

    `key` is the setting that names the model.
    """
    file = Path(source).expanduser() / "config.json"
    if file.is_file():
        return from_config(source, _read(file))
    adapter = Path(source).expanduser() / "adapter_config.json"
    if adapter.is_file():
        return shape_of(str(_read(adapter)["base_model_name_or_path"]), key)
    if source in KNOWN:
        return KNOWN[source]
    if Path(source).expanduser().exists() or source.startswith((".", "/", "~")):
        raise UserError(f"{source} has no config.json", key, "name a model folder or a model of the hub")
    try:
        from huggingface_hub import hf_hub_download

        return from_config(source, _read(Path(hf_hub_download(source, "config.json"))))
    except (OSError, ValueError, ImportError) as error:
        names = ", ".join(KNOWN)
        raise UserError(
            f"the sizes of {source} could not be read: {one_line(str(error), 160)}",
            key,
            f"name a model folder, or one whose sizes are known here: {names}",
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}", "", "copy or download the model's files again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is no model configuration", "", "copy or download the model's files again")
    return found


def from_config(name: str, config: dict[str, Any]) -> Shape:
    """The sizes that a config.json names; UserError where one is missing."""
    text = config.get("text_config") or config
    try:
        heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
        experts = int(text.get("num_experts") or text.get("num_local_experts") or 0)
        kind = str(text.get("model_type", ""))
        return Shape(
            name,
            layers=int(text["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or hidden // heads),
            intermediate=int(text["moe_intermediate_size"] if experts else text["intermediate_size"]),
            vocab=int(text["vocab_size"]),
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
            positions=int(text.get("max_position_embeddings") or 0),
            experts=experts,
            experts_per_token=int(text.get("num_experts_per_tok") or 0) if experts else 0,
            query_norm=kind.startswith("qwen3"),
            attention_bias=bool(text.get("attention_bias", kind.startswith("qwen2"))),
        )
    except KeyError as error:
        raise UserError(
            f"the config.json of {name} names no {error.args[0]}",
            "",
            "estimates are for decoder-only models with gated MLPs, such as Qwen3 or Llama",
        ) from error
