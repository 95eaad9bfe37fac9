"""What the sections of the trainer's configuration share: their base, and the kinds of numbers in them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

Probability = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Distribution = Literal["top_k", "full"]
MaxSteps = Annotated[int, Field(ge=-1)]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, documented fields."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        serialize_by_alias=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation in (int, float):
            raise ValueError(f"a number is expected, got {str(value).lower()}")
        return value


def keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section by the keys that users write."""
    return {field.alias or name: field for name, field in model.model_fields.items()}
