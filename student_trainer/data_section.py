"""The `data` section of the trainer's configuration (see config.py)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from student_trainer.section import PositiveInt, Section


class Data(Section):
    """Where examples come from."""

    data_path: str = "dataset/train-00000-of-00001-cae87f8e074b4b5d.json"
    """JSON list, JSON lines (.gz and .zst too) or Parquet: a file, a folder of shards or a pattern, data/*.parquet.
    Or a folder of datasets' save_to_disk (folder#train), hub:owner/name:config@revision#split, or
    reasoning-gym:task,task?size=1000&seed=0. See docs/data.md."""
    val_path: str | None = None
    """Where validation examples come from, in the same words; without it val_ratio of data_path is set apart."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompts"] = "auto"
    """Shape of the rows; auto tells it for each row by its keys."""
    prompt_column: str | None = None
    """Key of a row's prompt where it is none of prompt, question, problem, query and text; makes format prompts."""
    answer_column: str | None = None
    """Key of the expected answer beside such a prompt where it is none of expected_answer, answer, response, solution,
    completion and output."""
    metadata_columns: list[str] = Field(default_factory=list)
    """Keys of a row that are kept for verifiers, as example.metadata; other keys are not kept."""
    max_length: Annotated[int, Field(ge=16)] = 2048
    """Largest number of tokens of a prompt and its completion together."""
    max_prompt_length: PositiveInt | None = None
    """Leave out prompts of more tokens (in the longer of both modes) while reading; null leaves out those that have no
    room for a completion below max_length."""
    val_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the examples that is set apart for validation, at least one where above 0; unused with val_path."""
    max_examples: PositiveInt | None = None
    """Use only the first examples of data_path, before validation is set apart, and read no further than these; null
    uses all, which must fit in memory (about 1 KB each and their text)."""
    shuffle_buffer: Annotated[int, Field(ge=0)] = 0
    """Rows that are drawn from at random (by training.seed, shards too) while reading, so that max_examples are not the
    first ones; 0 keeps the order. val_path is never shuffled."""
    streaming: bool = False
    """Read a hub dataset over the network as far as it is needed; false downloads it once and keeps it in the cache of
    datasets. Files are always read as far as needed."""
    system_prompt: str | None = None
    """System message put before every conversation that has none."""
    domain_column: str = "domain"
    """Key of a row whose text names its domain. It may choose the teacher (teacher.routes); where there are several,
    accuracy and divergences are also given for each. Rows without it have no domain."""

    @model_validator(mode="after")
    def _room_for_a_completion(self) -> Data:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length {self.max_prompt_length} leaves no room for a completion within max_length "
                f"{self.max_length}; set it below"
            )
        return self
