"""Which experts are popular: the file, the law of distinct experts under it, and what stays on the GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import batch_spec

from moeplan.planner.catalog import Catalog
from moeplan.planner.diagnostics import CompileError, Span
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.popularity_file import read_popularity
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.offload import offload_policy
from moeplan.planner.strategies.offload_lanes import Experts

MODEL = "mixtral-8x7b"


def text(counts: list[int]) -> str:
    """Every layer of Mixtral with these counts, turned by one expert from layer to layer."""
    rows = [f"{layer},{(e + layer) % 8},{n}" for layer in range(32) for e, n in enumerate(counts)]
    return "\n".join(["layer,expert,tokens", *rows]) + "\n"


def workload(tmp_path: Path, counts: list[int]) -> Workload:
    (tmp_path / "popularity.csv").write_text(text(counts))
    spec_text = batch_spec("g6e.4xlarge").replace(
        f"model: {MODEL}", f"model: {{name: {MODEL}, popularity: popularity.csv}}"
    )
    spec = parse_spec(spec_text, str(tmp_path / "spec.yaml"))
    return build_workload(spec, load_inputs(spec))


@pytest.mark.parametrize("tokens", [1.0, 5.0, 300.0])
def test_equal_counts_are_the_uniform_law(tmp_path: Path, tokens: float) -> None:
    spec = parse_spec(batch_spec(), "spec.yaml")
    alike, counted = (
        Experts(w) for w in (build_workload(spec, load_inputs(spec)), workload(tmp_path, [10] * 8))
    )
    for rank in (0.0, 3.0, 8.0):
        of = [float(e.hits(e.key(np.array([tokens])), np.array([rank]))[0]) for e in (alike, counted)]
        assert of[0] == pytest.approx(of[1])


def test_skewed_counts_hit_what_a_draw_hits(tmp_path: Path) -> None:
    """20 tokens, each to the popular expert and to one of seven: counted in a simulation."""
    counts = [700, 100, 100, 100, 100, 100, 100, 100]
    experts = Experts(workload(tmp_path, counts))
    draw = np.random.default_rng(0)
    seen = [len({0, *draw.integers(1, 8, size=20)}) for _ in range(4000)]
    hit = float(experts.hits(experts.key(np.array([20.0])), np.array([8.0]))[0])
    assert hit == pytest.approx(np.mean(seen), rel=0.02)


def test_the_popular_stay_on_the_gpu(tmp_path: Path, catalog: Catalog) -> None:
    """Residents are the most popular of each layer; knowing them never costs speed."""
    machine = catalog.machines["g6e.4xlarge"]
    found = []
    for counts in ([10] * 8, [900, 300, 20, 10, 10, 10, 10, 10]):
        load = workload(tmp_path, counts)
        policy = offload_policy(load, load.classes[0], find_roofline(load, machine), None)
        assert isinstance(policy, Policy)
        found.append(policy)
    alike, skewed = found
    count = round(skewed.resident_share * 8)
    assert count >= 2
    for layer, resident in enumerate(skewed.resident_experts):
        assert resident.layer == layer
        assert resident.experts[:2] == (layer % 8, (layer + 1) % 8)
        assert len(resident.experts) == count
    assert skewed.generated_tokens_per_s.value >= 0.99 * alike.generated_tokens_per_s.value


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("layer,expert\n0,0\n", 1, "the header is not layer,expert,tokens"),
        ("layer,expert,tokens\n0,0,many\n", 2, "three whole numbers"),
        ("layer,expert,tokens\n32,0,1\n", 2, "layers 0 to 31"),
        ("layer,expert,tokens\n0,8,1\n", 2, "experts 0 to 7"),
        ("layer,expert,tokens\n0,1,1\n0,1,2\n", 3, "comes twice"),
        ("layer,expert,tokens\n0,1,1\n", 1, "has 32 layers with experts, the file has 1"),
        (text([0] * 8), 1, "no token went to any expert of layer 0"),
    ],
)
def test_mistakes_are_told_by_line(
    tmp_path: Path, catalog: Catalog, content: str, line: int, message: str
) -> None:
    file = tmp_path / "popularity.csv"
    file.write_text(content)
    with pytest.raises(CompileError) as caught:
        read_popularity(file, Span("spec.yaml"), catalog.models[MODEL])
    first = caught.value.diagnostics[0]
    assert (first.span.path, first.span.line) == (str(file), line)
    assert message in first.message


def test_a_missing_file_is_told_at_the_spec(tmp_path: Path, catalog: Catalog) -> None:
    with pytest.raises(CompileError) as caught:
        read_popularity(tmp_path / "none.csv", Span("spec.yaml", 3, 5), catalog.models[MODEL])
    assert caught.value.diagnostics[0].span == Span("spec.yaml", 3, 5)
