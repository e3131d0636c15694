"""The Attainment level: what a queueing simulation of the fleet says about its promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeplan.planner.ir.workload import ClassName

ArrivalSource = Literal["trace", "gamma"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLaw:
    """One engine under continuous batching, as its policy's cost law has it. Tables are linear in between.

    A step takes every running sequence one token further and up to `step_tokens` tokens, less one per
    running sequence, of waiting prompts. It lasts `step_s[batch][context]`, where context is the mean of the
    running sequences, and `prefill_s[prompt]` more for each whole prompt of that many tokens. At most
    `sequences` run, and their caches, `cache_bytes[context]` each, fill `memory_bytes` at most. A first token
    leaves `first_token_s[prompt]` and `first_token_steps` times its step later than that step ends.
    """

    sequences: int
    step_tokens: int
    memory_bytes: float
    batch: tuple[int, ...]
    context_tokens: tuple[float, ...]
    step_s: tuple[tuple[float, ...], ...]
    cache_bytes: tuple[float, ...]
    prompt_tokens: tuple[float, ...]
    prefill_s: tuple[float, ...]
    first_token_s: tuple[float, ...]
    first_token_steps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The replicas of one column that serve, spares left out: `engines` copies of the model in all.

    The plan is made for `margin` times its requests, as `law` is a prediction. Queues leave
    `capacity_share` of the throughput that one would have without them: so the solver was told.
    """

    column: str
    engines: int
    margin: float
    capacity_share: float
    law: ServingLaw


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Of the requests, in seconds."""

    p50_s: float
    p90_s: float
    p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReplay:
    """One pool in a simulation. `busy` is the share of time in which its engines step, `occupied` how full of
    sequences they are on average."""

    column: str
    requests: int
    attained_share: float
    busy: float
    occupied: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What one simulation of all requests found.

    A request attains its SLO if its TTFT and the mean of its gaps between tokens do; `refused` are longer
    than the engines were planned for. `gap` is of each request's longest gap.
    """

    attained_share: float
    refused: int
    ttft: Percentiles
    itl: Percentiles
    gap: Percentiles
    pools: tuple[PoolReplay, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassAttainment:
    """An online class in simulation: at the rate that is planned for, and in a surge of `margin` times it.

    The fleet attains the SLO in the second simulation if `bears_surge`, or else in the first only; it is the
    cheapest found among `fleets_tried`. The first of them, which the solver chose without simulation, would
    have cost `unsimulated_usd_per_hour` and attains for `unsimulated_share` in the second.
    """

    serves: ClassName
    wanted_share: float
    requests: int
    arrivals: ArrivalSource
    planned: Replay
    surge: Replay
    bears_surge: bool
    margin: float
    fleets_tried: int
    usd_per_hour: float
    unsimulated_usd_per_hour: float
    unsimulated_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """Empty for batch work, which has no latency to promise."""

    classes: tuple[ClassAttainment, ...] = ()
    pools: tuple[Pool, ...] = ()
