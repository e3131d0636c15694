"""The command line of the runtime alone: `run`, `bench`, `checksum`, `quantize`, `split` and `merge`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moeplan.runtime_min.checksums import check_checksums, write_checksums
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.formats import PACKINGS
from moeplan.runtime_min.interruption import Interruption, interruptible
from moeplan.runtime_min.plan_file import load
from moeplan.runtime_min.report import Report, summary, write_report
from moeplan.runtime_min.results import GOES_ON, partial_path
from moeplan.runtime_min.run import Progress, Watch, bench_plan, run_plan, show
from moeplan.runtime_min.shards import merge, split

INTERRUPTED = 130
BAR = 30  # characters
_MOST_PARTS = 100_000

Execute = Callable[[argparse.Namespace, Interruption], Report | None]


def main(argv: Sequence[str] | None = None, finished: Callable[[Report], None] | None = None) -> int:
    """Run a command; 0, 2 for a plan, checkpoint or file that cannot be used, 130 for an interruption.

    A run that SIGTERM ends in order, as machines that are taken back send it, gives 0. `finished` gets the
    report of a run that is complete.
    """
    options = _parser().parse_args(argv)
    with interruptible() as interruption:
        try:
            report = options.execute(options, interruption)
            if finished and report:
                finished(report)
            return 0
        except (Exception, KeyboardInterrupt) as error:
            # A signal may surface as an error of whatever it came into.
            if interruption.number or isinstance(error, KeyboardInterrupt):
                terminated = interruption.number == signal.SIGTERM
                print("\nterminated" if terminated else "\ninterrupted", file=sys.stderr)
                _hint(options, "")
                return 0 if terminated else INTERRUPTED
            if not isinstance(error, RunError):
                raise
            print(error, file=sys.stderr)
            _hint(options, error.hint)
            return 2


def _hint(options: argparse.Namespace, hint: str) -> None:
    """What helps, and that nothing done is lost."""
    resumable = options.command == "run" and partial_path(options.output).exists()
    hints = [hint] * bool(hint) + [GOES_ON] * resumable
    if hints:
        print(f"  hint: {'; '.join(hints)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="runtime_min", description="Execute a moeplan runtime folder.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, execute: Execute, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help)
        added.set_defaults(execute=execute)
        return added

    run = command("run", _run, "answer the requests of an OpenAI batch file")
    bench = command("bench", _bench, "time full batches of random prompts")
    for some in (run, bench):
        some.add_argument("runtime_dir", type=Path, metavar="RUNTIME_DIR")
        some.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the one the plan names")
        rehearsal = "let the CPU take the place of the accelerator that the plan is for"
        some.add_argument("--rehearse", action="store_true", help=rehearsal)
        some.add_argument("--trace", type=Path, metavar="FILE.json", help="write what each lane did when")
        some.add_argument("--metrics", type=Path, metavar="FILE.prom", help="keep a file for Prometheus")
        some.add_argument("--report", type=Path, metavar="FILE.json", help="write all that was measured")
    run.add_argument("--input", type=Path, required=True, metavar="IN.jsonl")
    run.add_argument("--output", type=Path, required=True, metavar="OUT.jsonl")
    run.add_argument("--show", type=int, default=0, metavar="N", help="print the first N prompts and answers")
    for option, default, help in (
        ("--prompt-tokens", 0, "default: the plan's longest"),
        ("--tokens", 16, "generated per sequence (16)"),
        ("--batches", 1, "full batches, one after the other (1)"),
    ):
        bench.add_argument(option, type=int, default=default, metavar="N", help=help)
    checksum = command("checksum", _checksum, "note the checksum of each tensor of a checkpoint")
    checksum.add_argument("checkpoint", type=Path, metavar="DIR")
    checksum.add_argument("--check", action="store_true", help="compare them with those noted earlier")
    quantize = command("quantize", _quantize, "write a checkpoint with its experts in fewer bits")
    quantize.add_argument("checkpoint", type=Path, metavar="DIR")
    quantize.add_argument("output", type=Path, metavar="OUT")
    kinds = "bf12: lossless, 12 bits a value; int8 and int4: 8.25 and 5 bits, rounded"
    quantize.add_argument("--to", choices=sorted(PACKINGS), required=True, help=kinds)
    divide = command("split", _split, "divide an OpenAI batch file for several machines")
    divide.add_argument("input", type=Path, metavar="IN.jsonl")
    divide.add_argument("folder", type=Path, metavar="DIR", help="where part-NNNNN.jsonl are written")
    divide.add_argument("--parts", type=_count, required=True, metavar="N")
    join = command("merge", _merge, "put the answers to all parts together, one per request")
    join.add_argument("input", type=Path, metavar="IN.jsonl", help="the batch file that was split")
    join.add_argument("answers", type=Path, metavar="DIR", help="holds the answers, any *.jsonl")
    join.add_argument("--output", type=Path, required=True, metavar="OUT.jsonl")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= _MOST_PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {_MOST_PARTS}")
    return int(text)


def _run(options: argparse.Namespace, interruption: Interruption) -> Report:
    progress: Progress = ProgressBar() if sys.stderr.isatty() else lambda done, total, tokens: None

    def after_pass(done: int, total: int, tokens: int) -> None:
        interruption.check()
        progress(done, total, tokens)

    folders = options.runtime_dir, options.checkpoint, options.input, options.output
    watch = Watch(trace=options.trace, metrics=options.metrics)
    report = run_plan(*folders, after_pass, options.rehearse, watch)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if options.show > 0:
        print(show(options.input, options.output, options.show))
    return _reported(options, report)


def _bench(options: argparse.Namespace, interruption: Interruption) -> Report:
    sizes = options.prompt_tokens, options.tokens, options.batches
    watch = Watch(trace=options.trace, metrics=options.metrics)
    report = bench_plan(options.runtime_dir, options.checkpoint, *sizes, options.rehearse, watch)
    return _reported(options, report)


def _checksum(options: argparse.Namespace, interruption: Interruption) -> None:
    if options.check:
        print(f"{check_checksums(options.checkpoint)} tensors have the checksums noted")
    else:
        print(f"wrote {write_checksums(options.checkpoint)}")


def _split(options: argparse.Namespace, interruption: Interruption) -> None:
    print(f"wrote {split(options.input, options.folder, options.parts)} parts to {options.folder}")


def _merge(options: argparse.Namespace, interruption: Interruption) -> None:
    errors = merge(options.input, options.answers, options.output)
    print(f"wrote {options.output}; {errors} requests have an error record")


def _quantize(options: argparse.Namespace, interruption: Interruption) -> None:
    from moeplan.runtime_min.quantize import quantize

    def progress(done: int, total: int) -> None:
        interruption.check()
        if sys.stderr.isatty():
            print(f"\r{done / 1e9:.1f} of {total / 1e9:.1f} GB", end="", file=sys.stderr, flush=True)

    size = quantize(options.checkpoint, options.output, options.to, progress)
    print(f"wrote {options.output}: {size / 1e9:.2f} GB")


def _reported(options: argparse.Namespace, report: Report) -> Report:
    plan = load(options.runtime_dir)
    print(summary(plan, report))
    if options.report:
        write_report(options.report, options.runtime_dir, plan, report)
    return report


class ProgressBar:
    """Redraws one line on stderr: requests, tokens/s since the first call, and how long the rest may take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[float, int] | None = None  # when the first call came, and what was done then

    def __call__(self, done: int, total: int, tokens: int) -> None:
        now = self._clock()
        self._first = self._first or (now, done)
        elapsed, fresh = now - self._first[0], done - self._first[1]
        filled = BAR * done // max(1, total)
        text = f"[{'#' * filled}{'-' * (BAR - filled)}] {done}/{total} requests, {tokens:,} tokens"
        if elapsed > 0:
            text += f", {tokens / elapsed:,.0f}/s"
        if fresh > 0 and done < total:
            text += f", {_clock_text((total - done) * elapsed / fresh)} left"
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main())
