"""What drives the tasks of a source asks for no CPU of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pytest
from ray.data import Dataset

from rayfm.data.sources.base import task_numbers


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_tasks_run_where_less_than_a_cpu_is_free() -> None:
    import ray

    @ray.remote(num_cpus=3.5)  # of the session's four
    class Trainer:
        def ready(self) -> bool:
            return True

    def numbered(batch: pa.Table) -> Iterator[pa.Table]:
        yield pa.table({"numbers": [batch["id"].to_pylist()]})

    trainer = Trainer.remote()
    assert ray.get(trainer.ready.remote())
    dataset: Dataset = task_numbers(3).map_batches(numbered, batch_size=None, batch_format="pyarrow", num_cpus=0.25)
    assert sorted(row["numbers"] for row in dataset.take_all()) == [[0], [1], [2]]
    ray.kill(trainer)
