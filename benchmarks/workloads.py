"""Workloads of models that need be in no catalog."""

from __future__ import annotations

from moeplan.planner.catalog import Catalog
from moeplan.planner.inputs import Inputs
from moeplan.planner.ir.model import Model
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec

# For benchmarks that give sizes of their own.
ANY_REQUESTS = """
name: benchmark
model: mixtral-8x7b
workload: {batch: {requests: 1, prompt: 1, output: 1}}
machine: cpu-2core
"""


def workload_of(catalog: Catalog, model: Model, spec: str = ANY_REQUESTS) -> Workload:
    """The requests of a spec's text, with `model` in place of the spec's own."""
    inputs = Inputs(catalog=catalog, model=model, machine=None, prompts=None, trace=None)
    return build_workload(parse_spec(spec, "benchmark"), inputs)
