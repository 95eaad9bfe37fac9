"""Sources: folders of shards, patterns, compressed files, streams, the hub's library; and how little is read."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.scores import Message
from student_trainer.config import Data
from student_trainer.data import json_rows, load_examples, read_examples
from student_trainer.data.hub import HubName, parse
from student_trainer.data.loading import shuffled
from student_trainer.data.sources import open_source
from student_trainer.errors import UserError

ROWS = [{"question": f"q{i}", "answer": str(i), "id": i, "tests": [f"t{i}"]} for i in range(40)]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with four Parquet shards of ten rows, as on the hub, and files that are no data."""
    for n in range(4):
        parquet(tmp_path / "data" / f"train-{n:05d}-of-00004.parquet", ROWS[10 * n : 10 * n + 10])
    (tmp_path / "README.md").write_text("# a dataset")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.json").write_text("broken")
    return tmp_path


def expected(source: str | Path, **options: Any) -> list[str | None]:
    return [e.expected for e in read_examples(source, Data(**options))]


def test_a_folder_of_shards_is_read_in_the_order_of_their_names(shards: Path) -> None:
    assert expected(shards) == [r["answer"] for r in ROWS]
    assert expected(f"{shards}/data/train-*.parquet") == expected(f"{shards}/**/*.parquet") == expected(shards)
    assert expected(f"{shards}/data/train-0000[12]*") == [r["answer"] for r in ROWS[10:30]]


def test_shards_may_be_of_any_format(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", ROWS[:3])
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, ROWS[3:5])))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(ROWS[5:8]).encode()))
    with pa.CompressedOutputStream(str(tmp_path / "d.jsonl.zst"), "zstd") as file:
        file.write("\n".join(map(json.dumps, ROWS[8:10])).encode())
    assert expected(tmp_path) == [r["answer"] for r in ROWS[:10]]


def test_a_folder_with_several_splits_is_not_mixed(shards: Path) -> None:
    parquet(shards / "data" / "test-00000-of-00001.parquet", ROWS[:2])
    with pytest.raises(
        UserError, match=r"several splits: test \(1 file\), train \(4 files\); name one of them"
    ) as caught:
        read_examples(shards)
    pattern = str(caught.value).rpartition("such as ")[2]
    assert len(read_examples(pattern)) == 40


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("nothing-*.parquet", "no file matches this pattern"),
        ("nowhere/", "no such file"),
        ("s3://bucket/data", "neither a path nor a hub dataset; download it"),
        ("hub:", "not the name of a hub dataset; write hub:owner/name"),
        ("hub:a/b#", "not the name of a hub dataset"),
    ],
)
def test_a_source_that_is_not_there_is_told(tmp_path: Path, source: str, wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        read_examples(source if ":" in source else str(tmp_path / source))


def test_a_file_that_was_cut_off_is_told(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps([{"prompt": str(random.Random(i).random())} for i in range(999)]).encode())
    (tmp_path / "a.json.gz").write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"a\.json\.gz: not "):
        read_examples(tmp_path / "a.json.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")
    with pytest.raises(UserError, match=r"not a whole gzip file: .*; compress or copy it again"):
        read_examples(tmp_path / "b.jsonl.gz")


def test_no_more_is_read_than_max_examples_need(shards: Path) -> None:
    for n in (2, 3):
        (shards / "data" / f"train-{n:05d}-of-00004.parquet").write_bytes(b"PAR1 broken")
    data = Data(data_path=str(shards), max_examples=15, val_ratio=0)
    train, _ = load_examples(data, 0)
    assert [e.expected for e in train] == [r["answer"] for r in ROWS[:15]]
    with pytest.raises(UserError, match="train-00002-of-00004"):
        load_examples(data.model_copy(update={"max_examples": 21}), 0)


def test_a_shuffle_buffer_draws_by_the_seed_and_from_all_shards(shards: Path) -> None:
    data = Data(data_path=str(shards), max_examples=12, val_ratio=0, shuffle_buffer=25)

    def drawn(seed: int) -> list[str | None]:
        return [e.expected for e in load_examples(data, seed)[0]]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 12
    assert {int(e or 0) // 10 for seed in range(6) for e in drawn(seed)} == {0, 1, 2, 3}


@given(st.integers(0, 60), st.integers(1, 70), st.integers(0, 9))
def test_shuffling_loses_and_invents_nothing(count: int, size: int, seed: int) -> None:
    found = list(shuffled(range(count), size, seed))
    assert sorted(found) == list(range(count))
    assert found == list(shuffled(range(count), size, seed))
    assert all(item < place + size for place, item in enumerate(found)), "nothing comes before it was read"


def test_the_validation_part_does_not_depend_on_how_it_was_read(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    ways = [
        Data(data_path=str(shards / "data")),
        Data(data_path=str(shards / "data"), shuffle_buffer=7),
        Data(data_path=str(tmp_path / "one.jsonl")),
    ]
    found = [{e.id for e in load_examples(data, 3)[1]} for data in ways]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4


def test_long_prompts_are_left_out_while_reading_and_counted(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    def length(messages: tuple[Message, ...]) -> int:
        return len(messages[0].content)

    data = Data(data_path=str(shards), max_examples=10, val_ratio=0, max_prompt_length=2)
    train, _ = load_examples(data, 0, length)
    assert [e.expected for e in train] == [str(i) for i in range(10)]
    assert not caplog.text
    train, _ = load_examples(data.model_copy(update={"max_examples": None}), 0, length)
    assert len(train) == 10
    assert "40 rows, left out 30 whose prompts have more than data.max_prompt_length = 2 tokens" in caplog.text
    with pytest.raises(UserError, match="of 40, 40 have prompts of more than 1 tokens and 0 are blank; raise"):
        load_examples(data.model_copy(update={"max_prompt_length": 1}), 0, length)


def test_named_columns_are_kept_for_verifiers_and_leave_the_id_alone(shards: Path) -> None:
    kept = read_examples(shards, Data(metadata_columns=["tests", "id"]))
    assert kept[3].metadata == {"tests": ["t3"], "id": 3}
    assert [e.id for e in kept] == [e.id for e in read_examples(shards)]
    assert read_examples(shards)[3].metadata is None
    with pytest.raises(UserError, match=r"row 1: no test among its keys .*; mend data\.metadata_columns"):
        read_examples(shards, Data(metadata_columns=["test"]))


@given(
    st.lists(st.recursive(st.none() | st.integers() | st.text() | st.floats(allow_nan=False), st.lists, max_leaves=4)),
    st.integers(1, 9),
    st.sampled_from([None, 1]),
)
@settings(max_examples=60)
def test_a_json_list_is_read_in_pieces_as_json_reads_it_whole(rows: list[Any], piece: int, indent: int | None) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "a.json"
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
        patch.setattr(json_rows, "PIECE", piece)
        assert [row for _, row in json_rows.rows(path)] == rows


@pytest.mark.parametrize("piece", [1, 3, 7, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1},\n {"b" 2}]',
        '[{"a": 1}\n\n{"b": 2}]',
        '[{"a": "open',
        "[1, 2",
        "[1, 2] 3",
        '[{"a": 1},]',
        "[,]",
        '[\n"é", x]',
    ],
)
def test_a_broken_list_is_told_at_the_place_that_json_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, piece: int
) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(json_rows, "PIECE", piece)
    with pytest.raises(json.JSONDecodeError) as whole:
        json.loads(text)
    with pytest.raises(UserError) as caught:
        list(json_rows.rows(tmp_path / "a.json"))
    line = str(caught.value).partition("not valid JSON at ")[2]
    assert line.startswith(f"line {whole.value.lineno}, column "), line


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_a_file_larger_than_memory_is_not_read_whole(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": random.Random(i).randbytes(2000).hex()} for i in range(3000)]  # 12 MB
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=500)
    else:
        lines = map(json.dumps, rows)
        text = "\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]"
        (tmp_path / name).write_text(text)
    del rows
    read_examples(tmp_path / name, Data(), limit=1)  # imports are not what is measured
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    try:
        count = sum(1 for _ in open_source(str(tmp_path / name), Data()).rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 3000
    assert peak < 9e6
    assert pa.total_allocated_bytes() - before < 1e6, "nothing is held when it is read"


def test_the_name_of_a_hub_dataset_has_four_parts() -> None:
    assert parse("hub:openai/gsm8k") == HubName("openai/gsm8k")
    assert parse("hub:openai/gsm8k:main@v1.0#test") == HubName("openai/gsm8k", "main", "v1.0", "test")
    assert parse("hub:o/n@main#train[:10%]") == HubName("o/n", None, "main", "train[:10%]")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The datasets library without a network, and with a cache of its own."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_repository_of_the_hub_is_read_by_split(shards: Path, streaming: bool) -> None:
    parquet(shards / "data" / "test-00000-of-00001.parquet", ROWS[:5])
    (shards / "dataset_infos.json").unlink()
    source = f"hub:{shards}"
    assert expected(source, streaming=streaming) == [r["answer"] for r in ROWS]
    assert expected(f"{source}#test", streaming=streaming) == ["0", "1", "2", "3", "4"]
    with pytest.raises(UserError, match=r"datasets cannot read it: .*nope.*test.*; write hub:owner/name"):
        read_examples(f"{source}#nope", Data(streaming=streaming))
    data = Data(data_path=source, streaming=streaming, max_examples=12, val_ratio=0, shuffle_buffer=15)
    drawn = [[e.expected for e in load_examples(data, seed)[0]] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.usefixtures("offline")
def test_a_slice_of_a_downloaded_split_is_read(shards: Path) -> None:
    assert expected(f"hub:{shards}#train[5:8]") == ["5", "6", "7"]


@pytest.mark.usefixtures("offline")
def test_a_hub_dataset_that_cannot_be_reached_is_told() -> None:
    with pytest.raises(
        UserError, match=r"hub:no-such-owner/no-such-name: datasets cannot read it: .*hf auth login"
    ) as e:
        read_examples("hub:no-such-owner/no-such-name", Data(streaming=True))
    assert "\n" not in str(e.value)


@pytest.mark.usefixtures("offline")
def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    parts = {"train": ROWS[:30], "test": ROWS[30:]}
    both = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    both.save_to_disk(tmp_path / "both")
    both["train"].select(range(5, 9)).save_to_disk(tmp_path / "one")
    assert expected(tmp_path / "both") == [r["answer"] for r in ROWS[:30]]
    assert expected(f"{tmp_path}/both#test") == [r["answer"] for r in ROWS[30:]]
    assert expected(tmp_path / "one") == ["5", "6", "7", "8"]
    assert read_examples(tmp_path / "one", Data(metadata_columns=["id"]))[0].metadata == {"id": 5}
    with pytest.raises(UserError, match="it has no split dev; name one after #: test, train"):
        read_examples(f"{tmp_path}/both#dev")
