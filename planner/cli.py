"""The command line: arguments, printing, exit codes. The one file that joins planner, codegen and runtime."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from moeplan.planner.ir.machine import Machine
    from moeplan.planner.ir.plan import Plan
    from moeplan.planner.pipeline import Trace
    from moeplan.runtime_min.report import Report

app = typer.Typer(
    name="moeplan",
    help="Compile one spec.yaml into a deployment plan for a Mixture-of-Experts model, and run it.",
    no_args_is_help=True,
    add_completion=False,
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
    previous: PreviousPlan = None,
) -> None:
    """Compile SPEC into its plan folder.

    Only files whose bytes change are written, only files of its own lock removed. Exit codes: 0 done, 2 bad
    input or a file in the way, 3 no plan meets the spec, 70 internal error.
    """
    from moeplan.codegen.write import ConflictError, write
    from moeplan.planner.pipeline import Trace

    trace = Trace()
    plan, files = _compile(spec, machine, trace, previous)
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

        print(summary(plan, str(folder), len(changed), _checkpoint_option(spec, folder, plan)))


@app.command()
def check(
    spec: SpecPath,
    output: OutFolder = None,
    machine: MachineFile = None,
    diff: Annotated[bool, typer.Option("--diff", help="show the differences")] = False,
    previous: PreviousPlan = None,
) -> None:
    """Compare the plan folder with SPEC, for CI.

    Writes nothing; one line per file that is missing, stale, edited by hand or obsolete, and exit code 1.
    """
    from moeplan.codegen.write import check as compare

    plan, files = _compile(spec, machine, None, previous)
    folder = output or _default_folder(spec, plan)
    drifts = compare(files, folder)
    for drift in drifts:
        print(f"{folder / drift.path}: {drift.kind}", file=sys.stderr)
        if diff:
            print(drift.diff(), end="")
    if drifts:
        print(f"  hint: moeplan compile {spec}", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{folder}: {len(files)} files are current")


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


@app.command()
def simulate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="the plan folder")],
    requests: Annotated[
        Path,
        typer.Option("--requests", help="a request trace: Azure's, Mooncake's or plain, see docs/spec.md"),
    ],
    rate: Annotated[
        str, typer.Option("--rate", help="requests over time, such as 8/s [default: the trace's own]")
    ] = "",
) -> None:
    """Replay a request trace against a plan's online replicas, in a queueing simulation."""
    from moeplan.planner.replay import replay_requests

    print(replay_requests(plan, requests, rate))


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
            prompt_tokens=full.sums.prompt_tokens / requests,
            output_tokens=full.sums.generated_tokens / requests,
            batch=full.sequences,
            figures={name: value for name in FIGURES if (value := full.figures().get(name))},
        )
        write_file(profile, with_row(read_text(profile), str(profile), row).encode())
        cold = "" if full.warm else " (one cold batch only)"
        print(f"  profile    a row in {profile}{cold}; with `profile: {profile.name}` a spec follows it")

    return record


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


_IDLE_LOAD = 0.3  # of the processors
CATALOG_LISTS = ("models", "gpus", "machines", "offers", "sources")


@app.command()
def catalog(
    what: Annotated[str, typer.Argument(metavar="LIST", help="|".join(CATALOG_LISTS))] = "machines",
    folder: Annotated[Path | None, typer.Option("--folder", help="a folder of own entries")] = None,
    skypilot: Annotated[
        Path | None,
        typer.Option("--skypilot", help="print the offers of this SkyPilot catalog folder as CSV"),
    ] = None,
) -> None:
    """List what the catalog knows.

    With --skypilot: print the prices of an installed SkyPilot as an offers.csv for an own catalog folder.
    """
    from moeplan.planner import catalog as known
    from moeplan.planner.diagnostics import Span

    loaded = known.load_catalog(folder, Span(str(folder or "catalog")))
    if skypilot:
        prices = known.import_skypilot(skypilot, Span(str(skypilot)), loaded.machines)
        for problem in prices.problems:
            print(problem, file=sys.stderr)
        print(known.write_offers(prices.offers), end="")
        return
    if what not in CATALOG_LISTS:
        print(f"moeplan: no list {what!r}: {', '.join(CATALOG_LISTS)}", file=sys.stderr)
        raise typer.Exit(2)
    rows = getattr(known, f"{what.removesuffix('s')}_rows")(loaded)
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _compile(
    spec: Path, machine: Path | None, trace: Trace | None, previous: Path | None = None
) -> tuple[Plan, dict[str, str]]:
    """The plan of a spec file and every file of its plan folder."""
    from moeplan.codegen.emit import emit_all
    from moeplan.codegen.write import with_lock
    from moeplan.planner.inputs import input_digests
    from moeplan.planner.pipeline import compile_plan
    from moeplan.planner.previous_plan import read_fleet

    text = spec.read_bytes()
    replicas, digest = read_fleet(previous) if previous else (None, {})
    plan = compile_plan(text, str(spec), machine, trace, replicas)
    digests = {**input_digests(plan.spec, text, machine), **digest, "facts": plan.facts_sha256}
    fleet = plan.fleet
    solver = {"status": fleet.solver_status, "gap": fleet.gap, "bound": fleet.cost_bound}
    return plan, with_lock(emit_all(plan), digests, solver)


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
