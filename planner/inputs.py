"""The files a spec points at, read once and checked: catalog, model, machine, prompts, request trace."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from moeplan.planner.catalog import Catalog, facts_digest, load_catalog, load_machine
from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.interruptions_file import read_interruptions
from moeplan.planner.ir.machine import Machine
from moeplan.planner.ir.model import Model
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.spot import Interruption, SpotTrace
from moeplan.planner.ir.workload import ExpertPopularity, Workload
from moeplan.planner.model_config import load_model
from moeplan.planner.popularity_file import read_popularity
from moeplan.planner.profile_file import ProfileRow, read_profile
from moeplan.planner.request_files import PromptsFile, read_prompts
from moeplan.planner.spot_traces import read_spot_trace
from moeplan.planner.suggest import nearest
from moeplan.planner.traces import RequestTrace, spec_trace
from moeplan.planner.units import format_bytes

_T = TypeVar("_T")
_HUB_HINT = (
    "nothing is fetched from a hub: take a name of `moeplan catalog models`, or {path: folder or config.json}"
)


Unrunnable = Callable[[Path, Workload], Sequence[str]]  # a checkpoint -> why the bundled runtime refuses it


def runs_all(checkpoint: Path, workload: Workload) -> tuple[str, ...]:
    """Refuses nothing."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything outside the spec text that a plan depends on. `machine` is the pinned one, if any.

    `previous` counts the replicas that run now, by column.
    """

    catalog: Catalog
    model: Model
    machine: Machine | None
    prompts: PromptsFile | None
    trace: RequestTrace | None
    profile: tuple[ProfileRow, ...] = ()
    popularity: tuple[ExpertPopularity, ...] = ()
    spot_trace: SpotTrace | None = None
    interruptions: tuple[Interruption, ...] = ()
    unrunnable: Unrunnable = runs_all
    previous: Mapping[str, int] | None = None

    def refusals(self, spec: Spec, workload: Workload) -> Sequence[str]:
        """Why the bundled runtime refuses the spec's checkpoint; nothing of a model of the catalog."""
        if not spec.model.path:
            return ()
        return self.unrunnable(Path(spec.path).parent / spec.model.path, workload)


def load_inputs(spec: Spec, machine_file: Path | None = None) -> Inputs:
    """Read what `spec` names, relative to its own folder; `machine_file` overrides its machine.

    Raises CompileError with the problems of all files.
    """
    folder = Path(spec.path).parent
    problems: list[Diagnostic] = []
    catalog = _try(
        problems, lambda: load_catalog(folder / spec.catalog if spec.catalog else None, spec.span("catalog"))
    )
    if catalog is None:
        raise CompileError(*problems)
    model = _try(problems, lambda: _model(spec, catalog, folder))
    machine = _try(problems, lambda: _machine(spec, catalog, folder, machine_file))
    # Its rows name models and machines: without the spec's own every row would be a problem.
    unnamed = bool(problems)
    profile = () if unnamed else _try(problems, lambda: _profile(spec, catalog, folder, model, machine))
    prompts = _try(problems, lambda: read_prompts(spec, folder))
    trace = _try(problems, lambda: spec_trace(spec, folder))
    popularity = _try(problems, lambda: _popularity(spec, folder, model)) if model else ()
    spot_trace = _try(problems, lambda: _spot_trace(spec, catalog, folder))
    interruptions = _try(problems, lambda: _interruptions(spec, catalog, folder)) or ()
    if problems or model is None or profile is None or popularity is None:
        raise CompileError(*problems)
    return Inputs(
        catalog=catalog,
        model=model,
        machine=machine,
        prompts=prompts,
        trace=trace,
        profile=profile,
        popularity=popularity,
        spot_trace=spot_trace,
        interruptions=interruptions,
    )


def _try(problems: list[Diagnostic], read: Callable[[], _T]) -> _T | None:
    try:
        return read()
    except CompileError as error:
        problems.extend(error.diagnostics)
        return None


def _model(spec: Spec, catalog: Catalog, folder: Path) -> Model:
    if spec.model.path:
        return load_model(folder / spec.model.path, spec.span("model.path"))
    return _named("model", spec.model.name, catalog.models, spec.span("model.name"))


def _machine(spec: Spec, catalog: Catalog, folder: Path, override: Path | None) -> Machine | None:
    machine = _pinned(spec, catalog, folder, override)
    limit = spec.machine.memory_bytes if spec.machine else None
    if machine is not None and limit is not None and limit > machine.level("dram").bytes:
        raise CompileError(
            Diagnostic(
                code="too-much-memory",
                span=spec.span("machine.memory"),
                message=f"{format_bytes(limit)} is more than {machine.name} has",
                hint=f"it has {format_bytes(machine.level('dram').bytes)}",
            )
        )
    return machine


def _pinned(spec: Spec, catalog: Catalog, folder: Path, override: Path | None) -> Machine | None:
    if override is not None:
        return load_machine(override, Span(str(override)))
    if spec.machine is None:
        return None
    if spec.machine.file:
        return load_machine(folder / spec.machine.file, spec.span("machine.file"))
    return _named("machine", spec.machine.name, catalog.machines, spec.span("machine.name"))


def _profile(
    spec: Spec, catalog: Catalog, folder: Path, model: Model | None, machine: Machine | None
) -> tuple[ProfileRow, ...]:
    """The rows of the spec's profile; they may name what the catalog has and what the spec brings along."""
    if not spec.profile_file:
        return ()
    machines = {**catalog.machines, **({machine.name: machine} if machine else {})}
    models = {**catalog.models, **({model.name: model} if model else {})}
    return read_profile(folder / spec.profile_file, spec.span("profile"), machines, sorted(models))


def _popularity(spec: Spec, folder: Path, model: Model) -> tuple[ExpertPopularity, ...]:
    if not spec.model.popularity:
        return ()
    return read_popularity(folder / spec.model.popularity, spec.span("model.popularity"), model)


def _spot_trace(spec: Spec, catalog: Catalog, folder: Path) -> SpotTrace | None:
    if not spec.market.spot_trace:
        return None
    regions = {(offer.cloud, offer.region) for offer in catalog.offers}
    return read_spot_trace(folder / spec.market.spot_trace, spec.span("market.spot_trace"), regions)


def _interruptions(spec: Spec, catalog: Catalog, folder: Path) -> tuple[Interruption, ...]:
    if not spec.market.interruptions:
        return ()
    offers = {(offer.cloud, offer.region, offer.machine) for offer in catalog.offers}
    return read_interruptions(folder / spec.market.interruptions, spec.span("market.interruptions"), offers)


def _named(kind: str, name: str, known: Mapping[str, _T], span: Span) -> _T:
    if name in known:
        return known[name]
    raise CompileError(
        Diagnostic(
            code=f"unknown-{kind}",
            span=span,
            message=f"no {kind} named {name!r} in the catalog",
            hint=_HUB_HINT if "/" in name else nearest(name, known, f"`moeplan catalog {kind}s` lists them"),
        )
    )


def catalog_prices(spec: Spec) -> dict[str, str]:
    """Which prices a spec is compiled against, for the lock: a digest of all and the newest one's date.

    Empty where the machine is the user's own. Prices beyond the spec's market count: with the others they say
    how old the catalog is.
    """
    if spec.machine is not None:
        return {}
    folder = Path(spec.path).parent / spec.catalog if spec.catalog else None
    offers = load_catalog(folder, spec.span("catalog")).offers
    return {"prices": facts_digest(*offers), "newest": max((offer.date for offer in offers), default="")}


def input_digests(spec: Spec, text: bytes, machine_file: Path | None) -> dict[str, str]:
    """sha256 of the spec and of every input file, by its key in the spec, for the lock."""
    folder = Path(spec.path).parent
    batch, online, machine = spec.workload.batch, spec.workload.online, spec.machine
    named = {
        "prompts": batch.prompts_file if batch else "",
        "trace": online.trace_file if online else "",
        "profile": spec.profile_file,
        "popularity": spec.model.popularity,
        "interruptions": spec.market.interruptions,
        "machine": machine.file if machine and machine_file is None else "",
    }
    paths = {key: folder / name for key, name in named.items() if name}
    if machine_file is not None:
        paths["machine"] = machine_file
    if spec.model.path:
        config = folder / spec.model.path
        paths["model"] = config / "config.json" if config.is_dir() else config
    contents = {"spec": text, **{key: path.read_bytes() for key, path in paths.items()}}
    if spec.market.spot_trace:
        trace = folder / spec.market.spot_trace
        files = sorted(trace.glob("*.json")) if trace.is_dir() else [trace]
        contents["spot_trace"] = b"".join(file.read_bytes() for file in files)
    return {key: hashlib.sha256(content).hexdigest() for key, content in sorted(contents.items())}
