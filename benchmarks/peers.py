"""The bundled runtime beside transformers, accelerate's disk offload and llama.cpp.

usage: python benchmarks/peers.py [--python PEER_PYTHON] [--llama FOLDER] [--machine FILE] [--limit GiB]
           [--rounds N] [--only WORD] [--reuse] [--skip-ours]

Checkpoints are random (checkpoints.py) and the same for all. "small" runs in RAM; "big" is larger than the
limit, which a cgroup v1 memory controller enforces: it counts the page cache too, and the checkpoint's pages
are dropped from the cache before each run, so no system reads from memory that it does not pay for.
PEER_PYTHON is a Python that has torch, transformers and accelerate, FOLDER has llama-batched-bench and
llama-quantize; a peer that is absent is skipped, and said so. Results go to build/bench/peers.json with their
commands; `--reuse` takes the peers' from there. Of a peer the best round counts, of ours the median, so a
busy machine never favours us.

Prompts have 32 tokens in RAM and 8 under the limit, for all alike. GB/pass is what came from storage for each
pass over the weights: in decode steps for transformers; for llama.cpp and ours all reads over all passes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from checkpoints import BUILD, SHAPES, Shape, packed_checkpoint, weights_bytes
from plans import calibrated, compiled
from tables import show

HERE = Path(__file__).parent
RESULTS = BUILD / "peers.json"
CGROUP = Path("/sys/fs/cgroup/memory")
OURS, OURS_PACKED = "moeplan", "moeplan bf12"  # the latter: the same values in 12 bits
UBATCH = 512  # tokens that llama.cpp takes in one pass, its default
LLAMA_SEQUENCES = 256  # llama.cpp's LLAMA_MAX_SEQ
MARGIN = 0.93  # of the limit: what our plan is given, since a plan may be exceeded by 5 %
TIMEOUT_S = 900
# glibc gives freed memory back at once: else what the loading held still counts in the first pass.
RETURN_MEMORY = ("MALLOC_ARENA_MAX=1", "MALLOC_TRIM_THRESHOLD_=65536", "MALLOC_MMAP_THRESHOLD_=65536")


@dataclass(frozen=True)
class Setting:
    """What is compared: a model, a memory limit (0: none), and how much each sequence gets and gives."""

    model: str
    limit_bytes: int
    batches: tuple[int, ...]
    prompt: int
    tokens: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]


@dataclass(frozen=True)
class Result:
    """One run. Zero tokens/s where it did not finish: `outcome` says why.

    `others` is the processor time that everything else took meanwhile, in cores.
    """

    system: str
    model: str
    limit_bytes: int
    batch: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    pass_bytes: float
    rss_bytes: int
    cgroup_bytes: int
    others: float
    outcome: str
    command: str


@dataclass(frozen=True)
class Ended:
    """A child process that has ended, and what it cost."""

    output: str
    outcome: str
    seconds: float
    read_bytes: int
    rss_bytes: int
    cgroup_bytes: int
    others: float


Measure = Callable[[Setting, Sequence[int]], Iterator[Result]]


def main() -> None:
    options = _options()
    settings = [
        Setting("small", 0, (1, 32, 128, 512), 32, 6),
        Setting("big", int(options.limit * 2**30), (32, 128, 512, 2048), 8, 4),
    ]
    peers = _peers(options)
    settings = [
        s for s in settings if any(_wanted(options, system, s) for system in (*peers, OURS, OURS_PACKED))
    ]
    for setting in settings:
        _write_checkpoint(setting.shape, options)
    results = _stored() if RESULTS.exists() else []
    if not options.reuse:
        results = _measure(peers, settings, options, results)
    if not options.skip_ours:
        machine = options.machine or calibrated(BUILD / "machine.yaml")
        ours = [name for name in (OURS, OURS_PACKED) if any(_wanted(options, name, s) for s in settings)]
        systems = {name: _ours(name, machine) for name in ours}
        models = {setting.model for setting in settings}
        results = [r for r in results if r.system not in systems or r.model not in models]
        results = _measure(systems, settings, options, results)
    for setting in settings:
        _print(setting, results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, default=Path("/tmp/peers-venv/bin/python"))
    parser.add_argument("--llama", type=Path, default=Path("/tmp/peers-src/build/bin"))
    parser.add_argument("--machine", type=Path, help="a machine file; default: calibrate now")
    parser.add_argument("--limit", type=float, default=4.0, help="memory in GiB for the big model (4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="of `system model` those with these words, as `bf16 small`"
    )
    parser.add_argument("--reuse", action="store_true", help="take the peers' results from peers.json")
    parser.add_argument("--skip-ours", action="store_true", help="measure peers only")
    return parser.parse_args()


def _write_checkpoint(shape: Shape, options: argparse.Namespace) -> None:
    """In a process of its own: this one must stay small, a child inherits its peak."""
    script = [str(HERE / "checkpoints.py"), shape.name]
    subprocess.run([sys.executable, *script], check=True, stdout=subprocess.DEVNULL)
    if options.python.exists():
        subprocess.run([str(options.python), *script, "--gguf"], check=True, stdout=subprocess.DEVNULL)


# --- systems


def _peers(options: argparse.Namespace) -> dict[str, Measure]:
    """Those that are here, by name."""
    peers: dict[str, Measure] = {}
    if options.python.exists():
        for experts in ("eager", "grouped_mm"):
            peers[f"transformers {experts}"] = _transformers(options.python, experts)
    else:
        print(f"transformers, accelerate: skipped, no {options.python}")
    if (options.llama / "llama-batched-bench").exists():
        for kind in ("bf16", "bf16 -kvu", "q8_0"):
            peers[f"llama.cpp {kind}"] = _llama(options.llama, kind)
    else:
        print(f"llama.cpp: skipped, no {options.llama / 'llama-batched-bench'}")
    return peers


def _transformers(python: Path, experts: str) -> Measure:
    """In RAM, or with accelerate's disk offload where there is a limit.

    All batches in one process, since loading rewrites the checkpoint for the offload: 14 GB.
    """

    def measure(setting: Setting, batches: Sequence[int]) -> Iterator[Result]:
        command = [str(python), str(HERE / "peer_transformers.py"), str(setting.shape.folder)]
        command += ["--batches", ",".join(map(str, batches)), "--experts", experts]
        command += ["--prompt", str(setting.prompt), "--tokens", str(setting.tokens)]
        if setting.limit_bytes:  # accelerate holds several times what it is told to
            cpu = str(setting.limit_bytes // 16)
            command = [
                "env",
                *RETURN_MEMORY,
                *command,
                "--offload",
                str(BUILD / "offload"),
                "--cpu-bytes",
                cpu,
            ]
        ended = _run(command, setting)
        rows = [json.loads(line) for line in ended.output.splitlines() if line.startswith('{"batch"')]
        for batch in batches:
            row: dict[str, float] = next((row for row in rows if row["batch"] == batch), {})
            part = replace(ended, outcome="ok", rss_bytes=int(row["rss_bytes"])) if row else ended
            yield _result(f"transformers {experts}", setting, batch, row, part, command)
        shutil.rmtree(BUILD / "offload", ignore_errors=True)

    return measure


def _llama(folder: Path, kind: str) -> Measure:
    """`-kvu`: one KV cache for all sequences, of 256 tokens and more for each otherwise."""

    def measure_one(setting: Setting, batch: int) -> Result:
        model = _quantised(folder, setting.shape) if kind == "q8_0" else setting.shape.gguf
        context = batch * (setting.prompt + setting.tokens)
        command = [str(folder / "llama-batched-bench"), "-m", str(model), "-t", str(os.cpu_count())]
        command += ["-c", str(-(-context // 256) * 256), "-b", "2048", "-ub", str(UBATCH), "-npl", str(batch)]
        command += ["-npp", str(setting.prompt), "-ntg", str(setting.tokens), "--output-format", "jsonl"]
        command += kind.split()[1:]
        ended = _run(command, setting)
        rows = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
        passes = 1 + setting.tokens + -(-batch * setting.prompt // UBATCH)  # it warms up with one
        figures = (
            {}
            if not rows
            else {
                "prefill_tokens_per_s": rows[0]["speed_pp"],
                "decode_tokens_per_s": rows[0]["speed_tg"],
                "pass_bytes": ended.read_bytes / passes,
            }
        )
        return _result(f"llama.cpp {kind}", setting, batch, figures, ended, command)

    return lambda setting, batches: (measure_one(setting, batch) for batch in batches)


def _quantised(folder: Path, shape: Shape) -> Path:
    to = BUILD / f"{shape.name}-q8_0.gguf"
    if not to.exists():
        command = [str(folder / "llama-quantize"), str(shape.gguf), str(to), "q8_0", str(os.cpu_count())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return to


def _ours(system: str, machine: Path) -> Measure:
    """`runtime_min bench` of a plan for this setting; its report, not its text, is read."""

    def measure_one(setting: Setting, batch: int) -> Result:
        checkpoint = packed_checkpoint(setting.shape, "bf16" if system == OURS else "bf12")
        folder, sequences = _compile(setting, checkpoint, batch, machine)
        code = (
            "import json, sys; from pathlib import Path; from dataclasses import asdict\n"
            "from moeplan.runtime_min.run import bench_plan\n"
            "folder, checkpoint, *sizes = sys.argv[1:]\n"
            "report = bench_plan(Path(folder), Path(checkpoint), *map(int, sizes))\n"
            "print(json.dumps({**asdict(report), 'rates': report.full.figures()}))"
        )
        batches = 1 if setting.limit_bytes else 2  # the second is warm
        sizes = [str(n) for n in (setting.prompt, setting.tokens, batches)]
        command = [sys.executable, "-c", code, str(folder), str(checkpoint), *sizes]
        ended = _run(command, setting)
        figures = {}
        if ended.outcome == "ok":
            report = json.loads(ended.output.splitlines()[-1])
            passes = report["stats"]["decode_passes"] + batches
            figures = {**report["rates"], "pass_bytes": report["bytes_read"] / passes}
        return _result(system, setting, sequences, figures, ended, ["runtime_min", "bench", *command[3:]])

    return lambda setting, batches: (measure_one(setting, batch) for batch in batches)


def _compile(setting: Setting, checkpoint: Path, batch: int, machine: Path) -> tuple[Path, int]:
    """The runtime folder, and how many sequences it runs together."""
    home = BUILD / f"{checkpoint.name}-{setting.limit_bytes}-{batch}"
    sizes = batch, setting.prompt, setting.tokens
    folder = compiled(home, checkpoint, "bf16", sizes, machine, MARGIN * setting.limit_bytes)
    return folder, json.loads((folder / "runtime.json").read_text())["batch"]["sequences"]


def _result(
    system: str,
    setting: Setting,
    batch: int,
    figures: dict[str, float],
    ended: Ended,
    command: Sequence[str],
) -> Result:
    return Result(
        system=system,
        model=setting.model,
        limit_bytes=setting.limit_bytes,
        batch=batch,
        prefill_tokens_per_s=figures.get("prefill_tokens_per_s", 0.0),
        decode_tokens_per_s=figures.get("decode_tokens_per_s", 0.0),
        pass_bytes=figures.get("pass_bytes", 0.0),
        rss_bytes=ended.rss_bytes,
        cgroup_bytes=ended.cgroup_bytes,
        others=ended.others,
        outcome=ended.outcome,
        command=" ".join(part if "\n" not in part else "..." for part in command),
    )


# --- a child process under a limit


def _run(command: Sequence[str], setting: Setting) -> Ended:
    """Run to the end under the setting's limit. Reads /proc of the child before it is reaped."""
    if setting.limit_bytes:
        _evict(setting.shape)
    with _cgroup(setting.limit_bytes) as group:
        busy, start = _busy_s(), time.perf_counter()
        output = (BUILD / "output.txt").open("w+")
        errors = (BUILD / "errors.txt").open("w+")
        child = subprocess.Popen(command, stdout=output, stderr=errors, preexec_fn=lambda: _enter(group))
        late = _wait(child.pid)
        read = _read_bytes(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        others = (_busy_s() - busy - usage.ru_utime - usage.ru_stime) / seconds
        output.seek(0)
        errors.seek(0)
        return Ended(
            output=output.read(),
            outcome=_outcome(child.returncode, late, group, errors.read()),
            seconds=seconds,
            read_bytes=read,
            rss_bytes=usage.ru_maxrss * 1024,
            cgroup_bytes=int((group / "memory.max_usage_in_bytes").read_text()) if group else 0,
            others=others,
        )


def _wait(pid: int) -> bool:
    """Wait until the child has ended, but leave it to be reaped; whether it ran into the time limit."""
    end = time.monotonic() + TIMEOUT_S
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > end:
            os.kill(pid, 9)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            return True
        time.sleep(0.05)
    return False


def _outcome(code: int, late: bool, group: Path | None, errors: str) -> str:
    if late:
        return f"not done after {TIMEOUT_S} s"
    if group and "oom_kill 0" not in (group / "memory.oom_control").read_text():
        return "killed: more memory than the limit"
    return (
        "ok"
        if code == 0
        else f"exit {code}: {errors.strip().splitlines()[-1][:200] if errors.strip() else ''}"
    )


@contextmanager
def _cgroup(limit_bytes: int) -> Iterator[Path | None]:
    """A memory cgroup with that limit; None where there is no limit."""
    if not limit_bytes:
        yield None
        return
    group = CGROUP / f"moeplan-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError as error:
        sys.exit(f"{group}: {error.strerror}: this comparison needs a cgroup v1 memory controller and root")
    try:
        yield group
    finally:
        group.rmdir()


def _enter(group: Path | None) -> None:
    if group:
        (group / "cgroup.procs").write_text(str(os.getpid()))


def _evict(shape: Shape) -> None:
    """Drop the checkpoint from the page cache."""
    for path in [*shape.folder.iterdir(), *BUILD.glob(f"{shape.name}*.gguf"), *BUILD.glob("offload/*")]:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def _read_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _busy_s() -> float:
    """Processor seconds that all processes, and the host, have taken so far."""
    numbers = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")


# --- results


def _measure(
    systems: dict[str, Measure],
    settings: Sequence[Setting],
    options: argparse.Namespace,
    results: list[Result],
) -> list[Result]:
    """Run all systems in turn, `rounds` times; a limited peer once. Each result is stored at once."""
    for setting in settings:
        for number in range(options.rounds):
            for system, measure in systems.items():
                if not _wanted(options, system, setting) or _left_out(system, setting, number):
                    continue
                for result in measure(setting, list(_batches(system, setting))):
                    results = [*results, result]
                    RESULTS.write_text(json.dumps([asdict(result) for result in results], indent=1))
                    print(_line(result), flush=True)
    return results


def _wanted(options: argparse.Namespace, system: str, setting: Setting) -> bool:
    return options.only in f"{system} {setting.model}"


def _left_out(system: str, setting: Setting, number: int) -> bool:
    """Under the limit minutes go by with each run of a peer: one round, in the checkpoint's own dtype."""
    if not setting.limit_bytes:
        return system.endswith("-kvu") or system == OURS_PACKED
    return (number > 0 and not system.startswith(OURS)) or system in (
        "transformers grouped_mm",
        "llama.cpp q8_0",
    )


def _batches(system: str, setting: Setting) -> Iterator[int]:
    for batch in setting.batches:
        if system.startswith(OURS) or not setting.limit_bytes:
            yield min(batch, LLAMA_SEQUENCES) if system.startswith("llama") else batch
        elif batch <= 128:
            yield batch
        else:
            yield LLAMA_SEQUENCES
            return


def _stored() -> list[Result]:
    return [Result(**row) for row in json.loads(RESULTS.read_text())]


def _line(result: Result) -> str:
    return (
        f"{result.model:6} {result.system:24} batch {result.batch:5} "
        f"decode {result.decode_tokens_per_s:8.1f} prefill {result.prefill_tokens_per_s:8.1f} tok/s, "
        f"others {result.others:.2f} cores, {result.outcome}"
    )


def _print(setting: Setting, results: Sequence[Result]) -> None:
    """A table: each system at each batch beside ours, then each at its own best batch."""
    rows = [r for r in results if (r.model, r.limit_bytes) == (setting.model, setting.limit_bytes)]
    kept = _summarised(rows)
    limit = f", limit {setting.limit_bytes / 2**30:.1f} GiB" if setting.limit_bytes else ", in RAM"
    size = weights_bytes(setting.shape) / 1e9
    print(f"\n{setting.model}, {size:.2f} GB of bf16{limit}, prompts of {setting.prompt} tokens")
    heads = ["system", "batch", "decode tok/s", "ours is", "prefill tok/s", "ours is", "GB/pass"]
    heads += ["RSS GiB", "cgroup GiB", "others", "outcome"]
    lines = [_cells(row, _matching(kept, row)) for row in kept]
    best = [
        max((r for r in kept if r.system == system), key=lambda r: r.decode_tokens_per_s)
        for system in dict.fromkeys(r.system for r in kept)
    ]
    ours = next((r for r in best if r.system == OURS), None)
    show(heads, lines + [[f"best: {cells[0]}", *cells[1:]] for cells in (_cells(r, ours) for r in best)])


def _summarised(rows: Sequence[Result]) -> list[Result]:
    """One result per system and batch: the best of a peer, the middle one of ours."""
    kept = []
    for batch, system in sorted({(r.batch, r.system) for r in rows}):
        some = sorted(
            (r for r in rows if (r.batch, r.system) == (batch, system)), key=lambda r: r.decode_tokens_per_s
        )
        kept.append(some[(len(some) - 1) // 2] if system.startswith(OURS) else some[-1])
    return kept


def _matching(rows: Sequence[Result], row: Result) -> Result | None:
    """Ours at the same batch, or at 512 for a peer that stops before."""
    ours = [r for r in rows if r.system == OURS and r.batch >= row.batch]
    return min(ours, key=lambda r: r.batch, default=None)


def _cells(row: Result, ours: Result | None) -> list[str]:
    def ratio(name: str) -> str:
        peer = getattr(row, name)
        return f"{getattr(ours, name) / peer:.2f}x" if ours and peer and row.system != OURS else ""

    return [
        row.system,
        str(row.batch),
        f"{row.decode_tokens_per_s:.1f}" if row.decode_tokens_per_s else "-",
        ratio("decode_tokens_per_s"),
        f"{row.prefill_tokens_per_s:.1f}" if row.prefill_tokens_per_s else "-",
        ratio("prefill_tokens_per_s"),
        f"{row.pass_bytes / 1e9:.2f}",
        f"{row.rss_bytes / 2**30:.2f}",
        f"{row.cgroup_bytes / 2**30:.2f}" if row.cgroup_bytes else "",
        f"{row.others:.2f}",
        "" if row.outcome == "ok" else row.outcome,
    ]


if __name__ == "__main__":
    main()
