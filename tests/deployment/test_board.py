"""Grafana's board, read by models that Grafana generates from its own schema of dashboards (grafana-foundation-sdk)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tests.deployment.test_compose import DOCKER, board

pytest.importorskip("grafana_foundation_sdk", reason="no grafana-foundation-sdk here, the board's schema")


def parsed(content: dict[str, Any]) -> Any:
    """The board as an object of Grafana's model; panels and queries by their own kinds."""
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    return Dashboard.from_json(content)


def as_json(value: Any) -> Any:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    return json.loads(JSONEncoder().encode(value))


def is_model(value: Any) -> bool:
    return type(value).__module__.startswith("grafana_foundation_sdk")


def wrong(value: Any, where: str) -> Iterator[str]:
    """Where an object has a value that its model's type does not allow."""
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from wrong(inner, f"{where}/{index}")
    if not is_model(value):
        return
    for name, hint in get_type_hints(type(value)).items():
        inner, place = getattr(value, name), f"{where}/{name}"
        yield from wrong(inner, place)
        if not is_model(inner) and not (isinstance(inner, list) and any(map(is_model, inner))):
            try:
                adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
                adapter.validate_json(json.dumps(as_json(inner)), strict=True)
            except ValidationError as error:
                yield f"{place}: {error}"


def lost(given: Any, kept: Any, where: str = "") -> Iterator[str]:
    """Where what was given did not survive: names that the model does not have."""
    if isinstance(given, dict):
        for name, value in given.items():
            if isinstance(kept, dict) and name in kept:
                yield from lost(value, kept[name], f"{where}/{name}")
            else:
                yield f"{where}/{name}"
    elif isinstance(given, list):
        assert isinstance(kept, list)
        assert len(given) == len(kept)
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{where}/{index}")
    elif given != kept:
        yield where


def test_the_board_has_the_names_and_types_of_grafanas_schema() -> None:
    model = parsed(board())
    assert list(wrong(model, "")) == []
    assert list(lost(board(), as_json(model))) == []


@pytest.mark.parametrize(
    "change",
    [
        {"schemaVersions": 39},
        {"editable": "no"},
        {"panels": [{"type": "timeseries", "title": 3}]},
        {"panels": [{"type": "timeseries", "gridPos": {"x": 0, "y": 0, "w": 12, "height": 8}}]},
        {"panels": [{"type": "timeseries", "targets": [{"datasource": {"type": "prometheus"}, "exp": "up"}]}]},
    ],
)
def test_a_board_with_a_wrong_name_or_type_is_found(change: dict[str, Any]) -> None:
    changed = board() | change
    model = parsed(changed)
    assert [*wrong(model, ""), *lost(changed, as_json(model))]


def test_panels_do_not_overlap_and_use_the_source_that_is_provisioned() -> None:
    import yaml

    folder = DOCKER / "grafana" / "provisioning" / "datasources"
    (source,) = yaml.safe_load((folder / "prometheus.yml").read_text())["datasources"]
    taken: set[tuple[int, int]] = set()
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"] == {"type": "prometheus", "uid": source["uid"]}
