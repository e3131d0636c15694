"""A few of the random kills that benchmarks/durability.py makes two hundred of, with the trained example."""

import durability
import pytest


@pytest.mark.slow
def test_nothing_is_lost_or_done_twice(tmp_path):
    (runtime_dir,) = [p.parent for p in durability.EXAMPLE.glob("tinymoe.plan/runtime/*/runtime.json")]
    source = tmp_path / "in.jsonl"
    durability.write_requests(source, ["It was", "Once upon a time"], 300)
    outcome = durability.torture(
        runtime_dir, durability.EXAMPLE / "checkpoint", source, tmp_path, kills=8, seed=3
    )
    assert outcome.kills.total() == 8
    assert (outcome.lost, outcome.duplicated, outcome.different) == (0, 0, 0)
