"""Write the task as instruction data: `python -m tiny_pair.dataset`.

Training problems and held-out problems, each a JSON list of `{"instruction", "input", "output"}`; the output is the
right final answer. Knows the task; knows no model.
"""

import argparse
import json
from pathlib import Path

from tiny_pair.task import INSTRUCTION, Problem, distinct_problems


def records(problems: list[Problem]) -> list[dict[str, str]]:
    """The problems as instruction data."""
    return [{"instruction": INSTRUCTION, "input": p.expression, "output": p.answer} for p in problems]


def main(arguments: list[str] | None = None) -> None:
    """Write `arithmetic.json` and `arithmetic_heldout.json`."""
    parser = argparse.ArgumentParser(prog="python -m tiny_pair.dataset", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "dataset")
    parser.add_argument("--training", type=int, default=16_000)
    parser.add_argument("--held-out", type=int, default=2_048)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, count, held_out in (
        ("arithmetic", options.training, False),
        ("arithmetic_heldout", options.held_out, True),
    ):
        found = records(distinct_problems(count, options.seed, held_out=held_out))
        lines = ",\n".join(f"  {json.dumps(record)}" for record in found)
        (options.out / f"{name}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
