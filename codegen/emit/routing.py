"""Plan -> routing.json: for a router, what part of each request size goes to which kind of replica."""

from __future__ import annotations

from typing import Any

from moeplan.codegen.data import to_json
from moeplan.planner.ir.fleet import Choice
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.workload import RequestClass

ROUTING_FORMAT = 1


def emit(plan: Plan) -> dict[str, str]:
    """Return routing.json: weights per size, which sum to 1, and the utilisation predicted from them.

    A request belongs to the size that it is nearest to. Within one kind of replica the least loaded is best.
    """
    data = {
        "format": ROUTING_FORMAT,
        "buckets": [
            _bucket(plan, requests, number)
            for requests in plan.workload.classes
            for number in range(len(requests.buckets))
        ],
        "replicas": [_replica(plan, choice) for choice in plan.fleet.choices],
    }
    return {"routing.json": to_json(data)}


def _bucket(plan: Plan, requests: RequestClass, number: int) -> dict[str, Any]:
    bucket = requests.buckets[number]
    routes = [r for r in plan.fleet.routes if (r.serves, r.bucket) == (requests.name, number)]
    return {
        "serves": requests.name,
        "prompt_tokens": bucket.prompt_tokens,
        "output_tokens": bucket.output_tokens,
        "share": bucket.share,
        "requests_per_s": requests.rate_per_s * bucket.share if requests.name == "online" else None,
        "requests": requests.requests * bucket.share if requests.name == "batch" else None,
        "weights": {route.column: route.share for route in routes},
    }


def _replica(plan: Plan, choice: Choice) -> dict[str, Any]:
    own = [r for r in plan.fleet.routes if r.column == choice.column.name]
    return {
        "name": choice.column.name,
        "count": choice.replicas,
        "spare": choice.spare,
        "predicted_utilisation": choice.utilisation,
        "target_utilisation": choice.target,
        "takes_batch_work_when_idle": any(r.serves == "batch" for r in own)
        and choice.column.policy.serves == "online",
        "figures_are": choice.column.policy.generated_tokens_per_s.provenance,
        "predicted_never_run_on_a_gpu": choice.column.policy.rehearsed_only,
    }
