"""Puts the toy data sets of tasks.json where the hub's would be looked for first."""
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.golden.fixtures import load


def place(base_dir, at_least: dict[tuple[str, ...], int] | None = None) -> None:
    """Two parquet files for each set; where a place is in `at_least`, one with the rows repeated up to that many."""
    golden = load("tasks")
    for name, places in golden["layout"].items():
        table = pa.Table.from_pylist(golden["rows"][name])
        for place in places:
            folder = Path(base_dir, "task_data", *place)
            folder.mkdir(parents=True)
            wanted = (at_least or {}).get(tuple(place))
            if wanted:
                pq.write_table(pa.concat_tables([table] * -(-wanted // len(table))).slice(0, wanted), folder / "00000.parquet")
                continue
            half = (len(table) + 1) // 2
            pq.write_table(table.slice(0, half), folder / "00000.parquet")
            pq.write_table(table.slice(half), folder / "00001.parquet")
            (folder / "manifest.json").write_text(json.dumps(["00000.parquet", "00001.parquet"]))
