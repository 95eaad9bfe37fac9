"""Packed rows: the same losses and gradients as one sequence alone, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from student_trainer import packing
from student_trainer.batches import Row, completion_ids, pack, pad
from student_trainer.errors import UserError
from student_trainer.objective_forward import accept_objective

CPU = torch.device("cpu")


def tiny(attention: str = "sdpa", **config: Any) -> Any:
    """A random Qwen3 in float32 with fewer heads of keys than of queries."""
    torch.manual_seed(0)
    options = {"max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.3, **config}
    small = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        **options,
    )
    model = Qwen3ForCausalLM._from_config(small, attn_implementation=attention)
    return accept_objective(model.train())


def some_rows(n: int = 6, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    lengths = [int(rng.integers(2, 30)) for _ in range(n)]
    return [
        Row(rng.integers(1, 50, m).astype(np.int32), int(rng.integers(1, m)), str(i)) for i, m in enumerate(lengths)
    ]


def losses(model: Any, rows: list[Row]) -> torch.Tensor:
    """float[N]: the cross-entropy at each completion token."""
    targets = torch.from_numpy(completion_ids(rows))

    def each(hidden: torch.Tensor, head: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none")

    found: torch.Tensor = model(**packing.forward_inputs(model, rows, 0, CPU), objective=each)
    return found


def gradients(model: Any, rows: list[Row]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses(model, rows).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_packed_places_point_at_the_same_tokens_as_padded_ones() -> None:
    rows = some_rows()
    packed, padded = pack(rows), pad(rows, 0)
    assert packed.targets.tolist() == padded.targets.tolist() == completion_ids(rows).tolist()
    assert packed.input_ids[packed.places].tolist() == padded.input_ids.reshape(-1)[padded.places].tolist()
    assert packed.input_ids.tolist() == [t for r in rows for t in r.ids.tolist()]
    assert packed.positions.tolist() == [i for r in rows for i in range(len(r.ids))]
    assert packed.lengths == tuple(len(r.ids) for r in rows)


@pytest.mark.parametrize("window", [None, 5])
def test_packed_rows_give_the_losses_and_gradients_of_padded_rows(window: int | None) -> None:
    model, rows = tiny(use_sliding_window=window is not None, sliding_window=window, max_window_layers=1), some_rows()
    packed = packing.set_up(model, True)
    values, slopes = losses(packed, rows), gradients(packed, rows)
    padded = packing.set_up(model, False)
    torch.testing.assert_close(values, losses(padded, rows), rtol=1e-6, atol=1e-7)
    for name, slope in gradients(padded, rows).items():
        assert (slopes[name] - slope).norm() <= 2e-6 * slope.norm(), name  # float32 sums in another order


def test_packed_rows_take_part_in_autocast_as_padded_ones_do() -> None:
    model, rows = tiny(), some_rows()
    with torch.autocast("cpu", torch.bfloat16):
        packed = losses(packing.set_up(model, True), rows)
        padded = losses(packing.set_up(model, False), rows)
    torch.testing.assert_close(packed, padded, rtol=0.02, atol=0.02)


def test_a_sequence_does_not_see_the_others_of_its_row() -> None:
    model, rows = packing.set_up(tiny(), True), some_rows()
    before = losses(model, rows)
    changed = rows[2]._replace(ids=(rows[2].ids % 49 + 1).astype(np.int32))
    after = losses(model, [*rows[:2], changed, *rows[3:]])
    bounds = np.cumsum([len(r.ids) - r.start for r in rows])
    mine = slice(bounds[1], bounds[2])
    assert not torch.equal(before[mine], after[mine])
    before[mine] = after[mine]
    assert torch.equal(before, after)


def test_packing_makes_no_mask_of_the_row_and_leaves_other_calls_as_they_were() -> None:
    plain, rows = tiny(), some_rows()
    ids = torch.from_numpy(pad(rows, 0).input_ids)
    mask = (torch.arange(ids.shape[1]) < ids.shape[1] - 3)[None].expand(len(rows), -1).long()
    before = plain(input_ids=ids, attention_mask=mask).logits, plain.generate(ids[:, :4], max_new_tokens=3)
    model = packing.set_up(plain, "auto")
    assert model.packs_rows
    assert torch.equal(before[0], model(input_ids=ids, attention_mask=mask).logits)
    assert torch.equal(before[1], model.generate(ids[:, :4], max_new_tokens=3))
    inputs = packing.forward_inputs(model, rows, 0, CPU)
    assert inputs["attention_mask"].numel() == 1
    assert inputs["input_ids"].shape == (1, sum(len(r.ids) for r in rows))


def test_what_cannot_be_packed_is_padded_or_refused() -> None:
    eager = tiny("eager")
    assert not packing.set_up(eager, "auto").packs_rows
    with pytest.raises(UserError, match="eager attention holds a mask of the whole row; use sdpa"):
        packing.set_up(eager, True)
    linear = tiny()
    linear.config.layer_types = ["full_attention", "linear_attention"]
    assert not packing.set_up(linear, "auto").packs_rows
    with pytest.raises(UserError, match=r"linear_attention.* would carry one sequence into the next"):
        packing.set_up(linear, True)
