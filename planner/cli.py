"""The command line: arguments, printing, exit codes. The one file that joins planner, codegen and runtime."""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moeplan.planner.explain.study import Study
    from moeplan.planner.ir.analysis import Decision
    from moeplan.planner.ir.machine import Machine
    from moeplan.planner.ir.plan import Plan
    from moeplan.planner.ir.workload import Workload
    from moeplan.planner.pipeline import Trace
    from moeplan.runtime_min.report import Report

    Comparison = tuple[str, tuple[str, ...], Plan | Exception, Plan | Exception]

app = typer.Typer(
    name="moeplan",
    help="Compile one spec.yaml into a deployment plan for a Mixture-of-Experts model, and run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="the spec file")]
OutFolder = Annotated[
    Path | None, typer.Option("-o", "--output", help="plan folder [default: NAME.plan beside the spec]")
]
MachineFile = Annotated[
    Path | None, typer.Option("--machine", help="compile for this machine file instead of the spec's machine")
]

PreviousPlan = Annotated[
    Path | None,
    typer.Option(
        "--from", help="the plan folder that runs now: move away from its fleet only where that pays"
    ),
]


NoHtml = Annotated[
    bool, typer.Option("--no-html", help="leave report.html out: about a second, and matplotlib, less")
]


def main() -> None:
    """Console script. Exit codes: 0 done, 1 drift, 2 bad input, 3 infeasible, 70 internal error."""
    from moeplan.planner.diagnostics import CompileError

    try:
        app()
    except CompileError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"{error.filename or 'moeplan'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if os.environ.get("MOEPLAN_TRACEBACK"):
            raise
        print(f"moeplan: internal error: {type(error).__name__}: {error}", file=sys.stderr)
        print("  hint: this is a bug; MOEPLAN_TRACEBACK=1 shows where", file=sys.stderr)
        sys.exit(70)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"moeplan {version('moeplan')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Compile one spec.yaml into a deployment plan for a Mixture-of-Experts model, and run it."""


@app.command("compile")
def compile_command(
    spec: SpecPath,
    output: OutFolder = None,
    machine: MachineFile = None,
    json: Annotated[bool, typer.Option("--json", help="print plan.json instead of the summary")] = False,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="print seconds per pass")] = False,
    dump_ir: Annotated[
        Path | None, typer.Option("--dump-ir", help="write every level to this folder")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace files edited by hand")] = False,
    no_html: NoHtml = False,
    previous: PreviousPlan = None,
) -> None:
    """Compile SPEC into its plan folder.

    Only files whose bytes change are written, only files of its own lock removed. Exit codes: 0 done, 2 bad
    input or a file in the way, 3 no plan meets the spec, 70 internal error.
    """
    gc.set_threshold(_ALLOCATIONS)
    from moeplan.codegen.write import ConflictError, write
    from moeplan.planner import terminal
    from moeplan.planner.pipeline import Trace

    with terminal.Status() as status:
        trace = Trace(status.show)
        plan, files = _compile(spec, machine, trace, not no_html, previous)
        found = () if json else _decisions(plan, trace)
    folder = output or _default_folder(spec, plan)
    try:
        changed = write(files, folder, force)
    except ConflictError as conflict:
        print(
            f"{conflict}\n  hint: --force replaces them; moeplan check --diff shows what differs",
            file=sys.stderr,
        )
        raise typer.Exit(2) from None
    if dump_ir:
        _dump(trace, dump_ir)
    if time_passes:
        for name, seconds in trace.seconds.items():
            print(f"{seconds * 1e3:8.1f} ms  {name}", file=sys.stderr)
    if json:
        print(files["plan.json"], end="")
    else:
        from moeplan.codegen.summary import summary

        checkpoint = _checkpoint_option(spec, folder, plan)
        report = "report.md" if no_html else "report.html"
        print(terminal.styled(summary(plan, str(folder), len(changed), checkpoint, found, report)))


@app.command()
def check(
    specs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[SPEC]...", help="spec files [default: every spec.yaml below with a plan beside it]"
        ),
    ] = None,
    output: OutFolder = None,
    machine: MachineFile = None,
    diff: Annotated[bool, typer.Option("--diff", help="show the differences")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="other prices in the catalog count, though the plan be the same")
    ] = False,
    no_html: NoHtml = False,
    previous: PreviousPlan = None,
) -> None:
    """Compare plan folders with their specs, for CI.

    Writes nothing; one line per file that is missing, stale, edited by hand or obsolete, and exit code 1.
    """
    gc.set_threshold(_ALLOCATIONS)
    from moeplan.planner.diagnostics import CompileError

    found = specs or _specs_with_plans(Path())
    if not found:
        print("moeplan: no spec.yaml below this folder has a plan folder beside it", file=sys.stderr)
        raise typer.Exit(2)
    if output and len(found) > 1:
        print("moeplan: --output is of one spec", file=sys.stderr)
        raise typer.Exit(2)
    worst = 0
    for spec in found:
        try:
            code = 0 if _is_current(spec, output, machine, diff, strict, no_html, previous) else 1
        except CompileError as error:
            print(error, file=sys.stderr)
            code = error.exit_code
        worst = max(worst, code)
    raise typer.Exit(worst)


def _specs_with_plans(folder: Path) -> list[Path]:
    """Every spec.yaml below `folder` with a lock beside it, outside of hidden folders."""
    found = (
        path for path in folder.rglob("spec.yaml") if next(path.parent.glob("*.plan/moeplan.lock"), None)
    )
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


def _is_current(
    spec: Path,
    output: Path | None,
    machine: Path | None,
    diff: bool,
    strict: bool,
    no_html: bool,
    previous: Path | None,
) -> bool:
    from moeplan.codegen.write import LOCK, older_catalog
    from moeplan.codegen.write import check as compare
    from moeplan.planner.pipeline import Trace

    plan, files = _compile(spec, machine, Trace(), not no_html, previous)
    folder = output or _default_folder(spec, plan)
    drifts = compare(files, folder)
    for drift in drifts:
        print(f"{folder / drift.path}: {drift.kind}", file=sys.stderr)
        if diff:
            print(drift.diff(), end="")
    if older := older_catalog(files, folder):
        print(f"{folder / LOCK}: {older}", file=sys.stderr)
    if drifts or (strict and older):
        print(f"  hint: moeplan compile {spec}", file=sys.stderr)
        return False
    print(f"{folder}: {len(files)} files are current")
    return True


@app.command()
def explain(
    spec: SpecPath,
    why_not: Annotated[
        list[str] | None,
        typer.Option("--why-not", metavar="GPU|MACHINE", help="the plan with this one forced"),
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            metavar="KEY=VALUE",
            help="the plan with this spec key, or fact of the catalog, changed",
        ),
    ] = None,
    machine: MachineFile = None,
    json: Annotated[bool, typer.Option("--json", help="print data instead of text")] = False,
) -> None:
    """Say why the plan is as it is, with figures from solving it again.

    Alone: other GPUs, markets and batches, what binds, and the smallest changes that would change the plan.
    A --what-if value may be +20% or -5%, or nothing to remove the key; several are made together. Facts are
    price, spot_price, gpu_bandwidth, link_bandwidth, host_bandwidth, disk_bandwidth, gpu_memory and
    host_memory, of one GPU or machine as in price.H100=+10%. Exit codes: 0 answered, 2 bad input, 3 no plan
    to explain.
    """
    gc.set_threshold(_ALLOCATIONS)
    from moeplan.codegen import explanation
    from moeplan.codegen.data import to_json
    from moeplan.planner import terminal
    from moeplan.planner.explain.case import Source
    from moeplan.planner.explain.explain import explain as explained
    from moeplan.planner.explain.study import Study

    with terminal.Status() as status:
        study = Study(Source(spec.read_bytes(), str(spec), machine), tuple(what_if or ()), status.show)
        if not what_if and not why_not:
            found = explained(study)
            text = to_json(found) if json else explanation.explanation_text(found)
        else:
            pairs = _compared(study, why_not or [])
            if json:
                text = to_json([explanation.comparison_data(*pair) for pair in pairs])
            else:
                text = "\n".join(explanation.comparison(*pair) for pair in pairs)
    print(text, end="")


def _compared(study: Study, why_not: list[str]) -> Iterator[Comparison]:
    """(what, settings, answer before, after) of every machine that is asked for, or of the settings."""
    from moeplan.planner.explain.study import Study
    from moeplan.planner.explain.why_not import forced

    if not why_not:
        plain = Study(study.source, (), study.progress)
        yield "what if", study.settings, plain.answer, study.answer
    for name in why_not:
        other = forced(study, name)
        yield f"why not {name}", other.settings, study.answer, other.answer


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="a plan folder, or its plan.json")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="another")],
    json: Annotated[bool, typer.Option("--json", help="print data instead of Markdown")] = False,
) -> None:
    """Compare two plans by meaning: cost, fleet, policies, placement, predictions.

    Markdown made for a comment on a pull request.
    """
    from moeplan.codegen import plan_diff
    from moeplan.codegen.data import to_json

    try:
        difference = plan_diff.compare(plan_diff.read_plan(before), plan_diff.read_plan(after))
    except plan_diff.PlanFileError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    print(to_json(plan_diff.as_data(difference)) if json else plan_diff.markdown(difference), end="")


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="the plan folder")],
    input: Annotated[Path, typer.Option("--input", help="requests, OpenAI batch file (JSONL)")],
    output: Annotated[Path, typer.Option("--output", help="where the answers go (JSONL)")],
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="the model's folder [default: as the spec says]")
    ] = None,
    show: Annotated[int, typer.Option("--show", help="print the first N answers")] = 0,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="add what was measured to this CSV, for `profile:`")
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="a plan for a GPU, with the CPU in the GPU's place")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="write what each lane did when (Chrome trace)")
    ] = None,
    metrics: Annotated[Path | None, typer.Option("--metrics", help="keep a file for Prometheus")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="write all that was measured, for `calibrate --from`")
    ] = None,
) -> None:
    """Run a plan on this machine.

    The bundled runtime executes the plan's batch replica; an interrupted run resumes when repeated.
    """
    from moeplan.runtime_min.__main__ import main as runtime_main

    if not plan.is_dir():
        print(f"{plan}: no such plan folder", file=sys.stderr)
        raise typer.Exit(2)
    folders = sorted(path.parent for path in plan.glob("runtime/*/runtime.json"))
    if len(folders) != 1:
        what = "holds no replica for" if not folders else "holds several replicas; name one to"
        print(f"{plan}: {what} runtime_min", file=sys.stderr)
        hint = "replicas under vLLM are deployed with the files in skypilot/, see report.md"
        print(
            f"  hint: {hint if not folders else 'runtime_min run PLAN/runtime/REPLICA ...'}", file=sys.stderr
        )
        raise typer.Exit(2)
    arguments = ["run", str(folders[0]), "--input", str(input), "--output", str(output), "--show", str(show)]
    files = {"checkpoint": checkpoint, "trace": trace, "metrics": metrics, "report": report}
    arguments += [f"--{name}={path}" for name, path in files.items() if path]
    arguments += ["--rehearse"] if rehearse else []
    raise typer.Exit(runtime_main(arguments, _recorder(plan, folders[0].name, profile) if profile else None))


def _recorder(plan: Path, replica: str, profile: Path) -> Callable[[Report], None]:
    """What adds a run's figures to `profile`; raises CompileError now if no row can be added there."""
    import json

    from moeplan.codegen.write import write_file
    from moeplan.planner.ir.profile import FIGURES
    from moeplan.planner.profile_file import ProfileRow, read_text, with_row

    compiled = json.loads((plan / "plan.json").read_bytes())
    policy = next(r["policy"] for r in compiled["replicas"] if r["name"] == replica)
    read_text(profile)

    def record(report: Report) -> None:
        full = report.full
        if full is None:
            print(f"{profile}: no row added: the whole run was resumed", file=sys.stderr)
            return
        requests = full.sums.requests
        row = ProfileRow(
            machine=policy["machine"]["name"],
            model=compiled["workload"]["model"]["name"],
            engine="runtime_min",
            gpus=policy["gpus"],
            prompt_tokens=(full.sums.prompt_tokens + full.sums.shared_tokens) / requests,
            output_tokens=full.sums.generated_tokens / requests,
            batch=full.sequences,
            figures={name: value for name in FIGURES if (value := full.figures().get(name))},
        )
        write_file(profile, with_row(read_text(profile), str(profile), row).encode())
        cold = "" if full.warm else " (one cold batch only)"
        print(f"  profile    a row in {profile}{cold}; with `profile: {profile.name}` a spec follows it")

    return record


@app.command()
def simulate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="the plan folder")],
    requests: Annotated[
        Path | None,
        typer.Option("--requests", help="a request trace: Azure's, Mooncake's or plain, see docs/spec.md"),
    ] = None,
    rate: Annotated[
        str, typer.Option("--rate", help="requests over time, such as 8/s [default: the trace's own]")
    ] = "",
    spot: Annotated[Path | None, typer.Option("--spot", help="a spot trace to replay over the plan")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="draw ready replicas over time (SVG)")] = None,
) -> None:
    """Replay traces against a plan.

    --requests: latency of its online replicas, in a queueing simulation. --spot: availability, bill,
    shortfall and preemptions of its spot replicas.
    """
    if requests is None and spot is None:
        print("moeplan: nothing to replay\n  hint: --requests TRACE or --spot TRACE", file=sys.stderr)
        raise typer.Exit(2)
    if requests:
        from moeplan.planner.replay import replay_requests

        print(replay_requests(plan, requests, rate))
    if spot:
        _simulate_spot(plan, spot, plot)


def _simulate_spot(plan: Path, spot: Path, plot: Path | None) -> None:
    from moeplan.codegen.timeline import Curve, timeline_svg
    from moeplan.codegen.write import write_file
    from moeplan.planner.simulate.spot import TICK_S
    from moeplan.planner.spot_simulation import OnlineRun, run_lines, simulate_spot

    runs = simulate_spot(plan, spot)
    print("\n".join(line for run in runs for line in run_lines(run)))
    if plot is None:
        return
    curves = [
        Curve(
            name=run.column,
            wanted=run.replicas,
            tick_s=TICK_S,
            spot=run.timeline[:, 0].tolist(),
            on_demand=run.timeline[:, 1].tolist(),
        )
        for run in runs
        if isinstance(run, OnlineRun)
    ]
    write_file(plot, timeline_svg(f"{plan.name} over {spot.name}: ready replicas", curves).encode())
    print(f"wrote {plot}")


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="the machine file")] = Path("machine.yaml"),
    run: Annotated[
        Path | None,
        typer.Option("--from", help="take it from the --report of a run, measure nothing"),
    ] = None,
) -> None:
    """Measure this machine, in less than a minute, or learn from a run.

    The result is a machine file for `machine: {file: ...}` or `--machine`. Prints what changed against the
    file as it was, or against the catalog's nearest machine. With --from: the machine that the run's plan was
    made for, its cores and disk as fast as they were in the run.
    """
    from moeplan.codegen.write import write_file
    from moeplan.planner.calibration import change_table, machine_figures
    from moeplan.planner.catalog import load_machine
    from moeplan.planner.diagnostics import Span

    before = _known_machine(output, os.cpu_count() or 1)
    output.parent.mkdir(parents=True, exist_ok=True)
    text = _machine_of_run(run) if run else _measured_machine(output.parent)
    write_file(output, text.encode())
    measured = machine_figures(load_machine(output, Span(str(output))))
    print(f"before: {before.name if before else 'nothing'} ({before.source if before else ''})")
    print("\n".join(change_table(machine_figures(before) if before else {}, measured)))
    print(f"wrote {output}; use it with `machine: {{file: {output.name}}}` or `--machine {output}`")


def _measured_machine(folder: Path) -> str:
    from moeplan.runtime_min.calibration import machine_yaml, measure

    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > _IDLE_LOAD * cores:
        print(
            f"moeplan: the machine is not idle (load {load:.1f}): its figures may come out low",
            file=sys.stderr,
        )
    return machine_yaml(measure(folder))


def _machine_of_run(report: Path) -> str:
    from moeplan.planner.calibration_from_run import figures_from_run
    from moeplan.runtime_min.calibration import machine_yaml

    found = figures_from_run(report)
    return machine_yaml(found.figures, found.source)


def _known_machine(file: Path, cores: int) -> Machine | None:
    """The machine of `file` where it is a machine file already, else the catalog's nearest without a GPU."""
    from moeplan.planner.calibration import nearest_machine
    from moeplan.planner.catalog import load_catalog, load_machine
    from moeplan.planner.diagnostics import CompileError, Span

    try:
        return load_machine(file, Span(str(file)))
    except CompileError:
        return nearest_machine(load_catalog(None, Span("catalog")).machines, cores)


@app.command()
def schema() -> None:
    """Print the spec's JSON Schema."""
    import json

    from moeplan.planner.schema import spec_schema

    print(json.dumps(spec_schema(), indent=2, sort_keys=True, ensure_ascii=False))


# Modules and records are made by the hundred thousand and hold no cycles: collecting takes a tenth of a
# compilation. Most end before the first collection.
_ALLOCATIONS = 1_000_000  # between collections
_IDLE_LOAD = 0.3  # of the processors
CATALOG_LISTS = ("models", "gpus", "machines", "offers", "sources")


catalog = typer.Typer(no_args_is_help=True, help="List what the catalog knows, or renew its prices.")
app.add_typer(catalog, name="catalog")
Folder = Annotated[Path | None, typer.Option("--folder", help="a folder of own entries, laid over ours")]


def _add_list(what: str) -> None:
    @catalog.command(what, help=f"List {what}.")
    def command(folder: Folder = None) -> None:
        from moeplan.planner import catalog as known
        from moeplan.planner.diagnostics import Span

        loaded = known.load_catalog(folder, Span(str(folder or "catalog")))
        rows = getattr(known, f"{what.removesuffix('s')}_rows")(loaded)
        widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


for _what in CATALOG_LISTS:
    _add_list(_what)


@catalog.command()
def update(
    source: Annotated[
        Path, typer.Option("--from", help="a folder of SkyPilot's price files, or a CSV like offers.csv")
    ] = Path("~/.sky/catalogs/v8"),
    folder: Annotated[Path, typer.Option("--folder", help="the folder that specs name as `catalog:`")] = Path(
        "catalog"
    ),
) -> None:
    """Renew the prices of a catalog folder.

    Writes FOLDER/offers.csv. Rows that make no sense are listed and left out. `moeplan check` tells which
    plans were compiled with older prices.
    """
    from moeplan.codegen.write import write_file
    from moeplan.planner import catalog as known
    from moeplan.planner.diagnostics import Span

    own = folder if folder.is_dir() else None
    machines = known.load_catalog(own, Span(str(folder))).machines
    found = known.update_offers(folder, source.expanduser(), machines)
    for problem in found.problems:
        print(problem, file=sys.stderr)
    write_file(folder / known.OFFERS_FILE, known.write_offers(found.offers).encode())
    changes = f"{found.added} new, {found.changed} changed, {found.gone} gone"
    print(f"{folder / known.OFFERS_FILE}: {len(found.offers)} prices ({changes})")
    if found.unknown:
        print(f"left out {len(found.unknown)} machine types that machines.yaml does not have")


def _compile(
    spec: Path, machine: Path | None, trace: Trace, html: bool, previous: Path | None
) -> tuple[Plan, dict[str, str]]:
    """The plan of a spec file and every file of its plan folder."""
    from moeplan.codegen.emit import emit_all
    from moeplan.codegen.write import with_lock
    from moeplan.planner.inputs import catalog_prices, input_digests
    from moeplan.planner.pipeline import compile_plan
    from moeplan.planner.previous_plan import read_fleet

    text = spec.read_bytes()
    replicas, digest = read_fleet(previous) if previous else (None, {})
    plan = compile_plan(text, str(spec), machine, trace, _unrunnable, replicas)
    digests = {**input_digests(plan.spec, text, machine), **digest, "facts": plan.facts_sha256}
    fleet = plan.fleet
    solver = {"status": fleet.solver_status, "gap": fleet.gap, "bound": fleet.cost_bound}
    files = emit_all(plan)
    if html:
        files |= _html_report(plan, trace)
    return plan, with_lock(files, digests, solver, catalog_prices(plan.spec) if not machine else None)


def _decisions(plan: Plan, trace: Trace) -> tuple[Decision, ...]:
    """What mattered most, from the report's analysis where that was made."""
    from moeplan.planner.explain.decisions import decisions

    if analysis := trace.levels.get("analysis"):
        found: tuple[Decision, ...] = analysis.decisions
        return found
    return trace.run("decisions", lambda: decisions(plan, trace.levels["inputs"]))


def _html_report(plan: Plan, trace: Trace) -> dict[str, str]:
    from moeplan.codegen.emit import report_html
    from moeplan.planner.explain.analyse import analyse

    analysis = trace.run("analysis", lambda: analyse(plan, trace.levels["inputs"]))
    trace.announce(report_html.PATH)
    started = time.perf_counter()
    page = report_html.emit(plan, analysis)
    trace.seconds[report_html.PATH] = time.perf_counter() - started
    return page


def _unrunnable(checkpoint: Path, workload: Workload) -> tuple[str, ...]:
    """What the runtime would refuse in a checkpoint's config.json when it opens it; nothing of a file that is
    no checkpoint's."""
    from moeplan.codegen.emit.runtime import model_plan
    from moeplan.runtime_min.checkpoint import CheckpointError
    from moeplan.runtime_min.model_config import read_config
    from moeplan.runtime_min.plan_file import ARCHITECTURES

    file = checkpoint / "config.json" if checkpoint.is_dir() else checkpoint
    if file.name != "config.json":
        return ()
    source = workload.model.source  # the same wherever the checkpoint lies, as plans have to be
    if workload.model.model_type not in ARCHITECTURES:
        return (f"{source}: model_type is {workload.model.model_type!r}, it runs {', '.join(ARCHITECTURES)}",)
    longest = max(requests.context_tokens_max for requests in workload.classes)
    try:
        read_config(file.parent, model_plan(workload.model, "", workload.dtype), longest)
    except CheckpointError as error:
        return tuple(problem.replace(str(file), source) for problem in error.problems)
    return ()


def _checkpoint_option(spec: Path, folder: Path, plan: Plan) -> str:
    """What `moeplan run` needs to find the checkpoint: nothing where the plan lies beside its spec."""
    if not plan.spec.model.path:
        return " --checkpoint CHECKPOINT"
    return "" if folder.parent == spec.parent else f" --checkpoint {spec.parent / plan.spec.model.path}"


def _default_folder(spec: Path, plan: Plan) -> Path:
    return spec.parent / f"{plan.spec.name}.plan"


def _dump(trace: Trace, folder: Path) -> None:
    from moeplan.codegen.data import to_json

    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, level) in enumerate(trace.levels.items()):
        (folder / f"{number}-{name}.json").write_text(to_json(level), encoding="utf-8")
