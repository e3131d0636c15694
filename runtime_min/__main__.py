"""The command line of the runtime alone: `runtime_min run` and `runtime_min bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.plan_file import load
from moeplan.runtime_min.run import Report, bench_plan, run_plan, show, summary

INTERRUPTED = 130
BAR = 30  # characters


def main(argv: Sequence[str] | None = None, finished: Callable[[Report], None] | None = None) -> int:
    """Run a command; 0, 2 for a plan, checkpoint or input that cannot be used, 130 for an interruption.

    `finished` gets the report of a run that is complete.
    """
    options = _parser().parse_args(argv)
    try:
        report = _run(options) if options.command == "run" else _bench(options)
        if finished:
            finished(report)
        return 0
    except RunError as error:
        print(error, file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        if options.command == "run" and options.output.with_name(options.output.name + ".partial").exists():
            print("  hint: the same command goes on from what is done", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="runtime_min", description="Execute a moeplan runtime folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="answer the requests of an OpenAI batch file")
    bench = commands.add_parser("bench", help="time full batches of random prompts")
    for command in (run, bench):
        command.add_argument("runtime_dir", type=Path, metavar="RUNTIME_DIR")
        command.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the one the plan names")
        rehearsal = "let the CPU take the place of the accelerator that the plan is for"
        command.add_argument("--rehearse", action="store_true", help=rehearsal)
    run.add_argument("--input", type=Path, required=True, metavar="IN.jsonl")
    run.add_argument("--output", type=Path, required=True, metavar="OUT.jsonl")
    run.add_argument("--show", type=int, default=0, metavar="N", help="print the first N prompts and answers")
    bench.add_argument(
        "--prompt-tokens", type=int, default=0, metavar="N", help="default: the plan's longest"
    )
    bench.add_argument("--tokens", type=int, default=16, metavar="N", help="generated per sequence (16)")
    bench.add_argument(
        "--batches", type=int, default=1, metavar="N", help="full batches, one after the other (1)"
    )
    return parser


def _run(options: argparse.Namespace) -> Report:
    progress = progress_bar if sys.stderr.isatty() else _silent
    report = run_plan(
        options.runtime_dir, options.checkpoint, options.input, options.output, progress, options.rehearse
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if options.show > 0:
        print(show(options.input, options.output, options.show))
    print(summary(load(options.runtime_dir), report))
    return report


def _bench(options: argparse.Namespace) -> Report:
    sizes = options.prompt_tokens, options.tokens, options.batches
    report = bench_plan(options.runtime_dir, options.checkpoint, *sizes, options.rehearse)
    print(summary(load(options.runtime_dir), report))
    return report


def progress_bar(done: int, total: int, tokens: int) -> None:
    """Redraw one line on stderr."""
    filled = BAR * done // max(1, total)
    bar = "#" * filled + "-" * (BAR - filled)
    print(f"\r[{bar}] {done}/{total} requests, {tokens:,} tokens", end="", file=sys.stderr, flush=True)


def _silent(done: int, total: int, tokens: int) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
