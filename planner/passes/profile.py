"""Policies, measured rows -> policies whose rates follow the user's own measurements.

A row is one configuration (machine, model, engine, GPUs per copy) at one point (sizes, sequences in flight).
The model is evaluated at the row's own point; `measured_laws` makes of the ratios laws for other points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.machine import Provenance
from moeplan.planner.ir.policy import BucketRate, Policy, Rejection
from moeplan.planner.ir.profile import Correction, FigureName, Figures, UnusedRow
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import Bucket, RequestClass, Workload
from moeplan.planner.measured_laws import CALIBRATED_SIGMA, Known, Laws, find_laws
from moeplan.planner.profile_file import ProfileRow
from moeplan.planner.strategies.common import AS_PREDICTED, Slower, keeps_slo, mixed_rate, resized, too_slow
from moeplan.planner.strategies.figures import figures_at

_Phase = Literal["prefill", "decode"]
# What tells how long a phase takes, best first.
_TELLS: Mapping[_Phase, tuple[FigureName, ...]] = {
    "prefill": ("prefill_tokens_per_s", "ttft_s", "requests_per_s"),
    "decode": ("decode_tokens_per_s", "itl_s", "requests_per_s"),
}
_PHASES_OF: Mapping[FigureName, tuple[_Phase, ...]] = {
    "prefill_tokens_per_s": ("prefill",),
    "decode_tokens_per_s": ("decode",),
    "requests_per_s": ("prefill", "decode"),
    "ttft_s": ("prefill", "decode"),
    "itl_s": ("prefill", "decode"),
}
_TRUST: tuple[Provenance, ...] = ("datasheet", "analytic", "calibrated", "measured")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """The corrected policies, those that the measurements refuse, and the rows that changed nothing."""

    policies: tuple[Policy, ...]
    rejections: tuple[Rejection, ...]
    unused: tuple[UnusedRow, ...]


def apply_profile(
    workload: Workload, rooflines: Sequence[Roofline], policies: Sequence[Policy], rows: Sequence[ProfileRow]
) -> Profiled:
    """Return `policies` with every rate that `rows` have something to say about corrected.

    A row of the same point replaces the prediction; three or more rows fit a power law; else the nearest row
    whose sizes and batch are within a factor of 2 scales it. A batch that no longer keeps the SLO is lowered.
    """
    by_machine = {roofline.machine.name: roofline for roofline in rooflines}
    answers = [
        _Case.of(workload, by_machine[policy.machine.name], policy, rows).corrected() for policy in policies
    ]
    accepted = tuple(answer for answer in answers if isinstance(answer, Policy))
    return Profiled(
        policies=accepted,
        rejections=tuple(answer for answer in answers if isinstance(answer, Rejection)),
        unused=_unused(workload, policies, accepted, rows),
    )


@dataclass(frozen=True, slots=True)
class _Case:
    """One policy and the rows of its configuration."""

    requests: RequestClass
    policy: Policy
    figures: Callable[[RequestClass, Bucket, int, Slower], Figures]
    known: tuple[Known, ...]

    @staticmethod
    def of(workload: Workload, roofline: Roofline, policy: Policy, rows: Sequence[ProfileRow]) -> _Case:
        requests = workload.request_class(policy.serves)
        figures = partial(figures_at, workload, roofline, policy)
        known = []
        for row in rows:
            if row.model == workload.model.name and _configuration(row) == _planned(policy):
                bucket = Bucket(prompt_tokens=row.prompt_tokens, output_tokens=row.output_tokens, share=1.0)
                like = resized(requests, bucket)
                known.append(Known(row, figures(like, bucket, row.batch, AS_PREDICTED)))
        return _Case(requests, policy, figures, tuple(known))

    def predicted(self, bucket: Bucket, batch: int, slower: Slower = AS_PREDICTED) -> Figures:
        return self.figures(self.requests, bucket, batch, slower)

    def corrected(self) -> Policy | Rejection:
        if not self.known:
            return self.policy
        rates: list[BucketRate] = []
        found: list[Correction] = []
        for rate in self.policy.rates:
            bucket = self.requests.buckets[rate.bucket]
            predicted = self.predicted(bucket, rate.batch)
            laws = find_laws(self.known, bucket, rate.batch, predicted)
            found += _corrections(laws, bucket, rate.batch, predicted)
            batch = self._largest_batch(bucket, rate.batch, laws)
            if batch == 0:
                alone = self._figures(bucket, 1, laws)
                machine, told = self.policy.machine.name, (alone.ttft_s, alone.itl_s)
                return too_slow(machine, self.requests, bucket, *told, by="by the profile, ")
            rates.append(self._rate(rate, bucket, batch, laws))
        if not found:
            return self.policy
        return self._policy(tuple(rates), found)

    def _figures(self, bucket: Bucket, batch: int, laws: Laws) -> Figures:
        """Measured figures by their own law, the others composed of phases that take as long as measured."""
        base = self.predicted(bucket, batch)
        told = {phase: next((f for f in tells if f in laws), None) for phase, tells in _TELLS.items()}
        factors = {phase: _slower(base, f, laws) if f else 1.0 for phase, f in told.items()}
        composed = self.predicted(bucket, batch, Slower(prefill=factors["prefill"], decode=factors["decode"]))
        figures = replace(composed, **{f: law.at(base.get(f)) for f, law in laws.items()})
        if self._follows_itl(laws):
            figures = replace(figures, requests_per_s=batch / (bucket.output_tokens * figures.itl_s))
        return figures

    def _follows_itl(self, laws: Laws) -> bool:
        """Under continuous batching requests/s are what Little's law makes of a measured ITL."""
        return self.policy.engine == "vllm" and "itl_s" in laws and "requests_per_s" not in laws

    def _largest_batch(self, bucket: Bucket, most: int, laws: Laws) -> int:
        """The most sequences, up to the planned, with which the SLO is kept; 0 where one is too many."""
        if self.requests.slo is None or not laws:
            return most

        def kept(batch: int) -> bool:
            figures = self._figures(bucket, batch, laws)
            return bool(keeps_slo(self.requests, figures.ttft_s, figures.itl_s))

        if kept(most):
            return most
        low, high = 0, most  # kept (or none) and not kept
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if kept(middle) else (low, middle)
        return low

    def _rate(self, rate: BucketRate, bucket: Bucket, batch: int, laws: Laws) -> BucketRate:
        if not laws:
            return rate
        figures = self._figures(bucket, batch, laws)
        factor = figures.requests_per_s / self.predicted(bucket, rate.batch).requests_per_s
        moved = batch != rate.batch
        return BucketRate(
            bucket=rate.bucket,
            requests_per_s=_estimate(
                rate.requests_per_s,
                factor,
                "itl_s" if self._follows_itl(laws) else "requests_per_s",
                laws,
                moved,
            ),
            batch=batch,
            ttft_s=figures.ttft_s,
            itl_s=figures.itl_s,
        )

    def _policy(self, rates: tuple[BucketRate, ...], found: list[Correction]) -> Policy:
        """The policy with corrected rates; its phases are those of the mean size."""
        policy, requests = self.policy, self.requests
        mean, sequences = requests.mean_bucket(), policy.sequences
        if any(new.batch != old.batch for new, old in zip(rates, policy.rates, strict=True)):
            sequences = max(rate.batch for rate in rates)
        base = self.predicted(mean, sequences)
        laws = find_laws(self.known, mean, sequences, base)
        figures = self._figures(mean, sequences, laws)
        found += _corrections(laws, mean, sequences, base)
        planned = self.predicted(mean, policy.sequences)

        def phase(before: Estimate, figure: FigureName) -> Estimate:
            return _estimate(before, figures.get(figure) / planned.get(figure), figure, laws, moved=False)

        return replace(
            policy,
            sequences=sequences,
            micro_batch=min(policy.micro_batch, sequences),
            rates=rates,
            prefill_tokens_per_s=phase(policy.prefill_tokens_per_s, "prefill_tokens_per_s"),
            decode_tokens_per_s=phase(policy.decode_tokens_per_s, "decode_tokens_per_s"),
            generated_tokens_per_s=_generated(requests, policy, rates),
            corrections=tuple(dict.fromkeys(found)),
        )


def _slower(base: Figures, figure: FigureName, laws: Laws) -> float:
    """How many times longer a phase takes, judged by one figure."""
    ratio = laws[figure].at(base.get(figure)) / base.get(figure)
    return ratio if figure in ("ttft_s", "itl_s") else 1.0 / ratio


def _estimate(before: Estimate, factor: float, figure: FigureName, laws: Laws, moved: bool) -> Estimate:
    """`before` times `factor`, as sure as the least sure of what it was made from.

    A figure `moved` to another batch than the measured one is calibrated by it, not measured.
    """
    sources = [_sureness(laws, (figure,), before)]
    if figure not in laws:
        sources = [_sureness(laws, _TELLS[phase], before) for phase in _PHASES_OF[figure]]
    if moved:
        sources.append((CALIBRATED_SIGMA, "calibrated"))
    return _weakest(before.value * factor, sources)


def _sureness(laws: Laws, tells: Sequence[FigureName], before: Estimate) -> tuple[float, Provenance]:
    """Standard error and provenance of a phase's time; told by another figure it is calibrated at best."""
    told = next((figure for figure in tells if figure in laws), None)
    if told is None:
        return before.sigma, before.provenance
    law = laws[told]
    if told == tells[0]:
        return law.sigma, law.provenance
    return max(law.sigma, CALIBRATED_SIGMA), "calibrated"


def _weakest(value: float, sources: Sequence[tuple[float, Provenance]]) -> Estimate:
    return Estimate(
        value=value,
        sigma=max(sigma for sigma, _ in sources),
        provenance=min((provenance for _, provenance in sources), key=_TRUST.index),
    )


def _generated(requests: RequestClass, policy: Policy, rates: Sequence[BucketRate]) -> Estimate:
    """Generated tokens/s follow the requests/s of the class's mix of sizes."""
    new, old = (mixed_rate(requests, (r.requests_per_s.value for r in of)) for of in (rates, policy.rates))
    value = policy.generated_tokens_per_s.value * new / old
    return _weakest(value, [(r.requests_per_s.sigma, r.requests_per_s.provenance) for r in rates])


def _corrections(laws: Laws, bucket: Bucket, batch: int, predicted: Figures) -> list[Correction]:
    return [
        Correction(
            figure=figure,
            prompt_tokens=bucket.prompt_tokens,
            output_tokens=bucket.output_tokens,
            batch=batch,
            method=law.method,
            lines=law.lines,
            factor=law.at(predicted.get(figure)) / predicted.get(figure),
            residual=law.residual,
            sigma=law.sigma,
        )
        for figure, law in laws.items()
    ]


def _configuration(row: ProfileRow) -> tuple[str, str, int]:
    return row.machine, row.engine, row.gpus


def _planned(policy: Policy) -> tuple[str, str, int]:
    return policy.machine.name, policy.engine, policy.gpus


def _unused(
    workload: Workload, policies: Sequence[Policy], accepted: Sequence[Policy], rows: Sequence[ProfileRow]
) -> tuple[UnusedRow, ...]:
    used = {line for policy in accepted for correction in policy.corrections for line in correction.lines}
    refused = {_planned(policy) for policy in policies} - {_planned(policy) for policy in accepted}
    return tuple(
        UnusedRow(line=row.line, reason=_why_unused(workload, policies, row))
        for row in rows
        if row.line not in used and _configuration(row) not in refused
    )


def _why_unused(workload: Workload, policies: Sequence[Policy], row: ProfileRow) -> str:
    if row.model != workload.model.name:
        return f"measured with {row.model}, planned is {workload.model.name}"
    ways = sorted({_planned(policy)[1:] for policy in policies if policy.machine.name == row.machine})
    if not ways:
        return f"{row.machine} is not a machine of this plan, or cannot do the work"
    if _configuration(row)[1:] not in ways:
        planned = ", ".join(f"{engine} over {gpus} GPUs" for engine, gpus in ways)
        return f"{row.engine} over {row.gpus} GPUs is not what is planned on {row.machine}: {planned}"
    return (
        "nearer rows were used, or it is over a factor of 2 away in prompt, output or batch; "
        "three rows make a fit, which reaches further"
    )
