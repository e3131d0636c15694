"""kill -9 at random moments, resume, compare: nothing lost, nothing twice, the same bytes as in one go.

    python benchmarks/durability.py [--kills 200] [--requests 1000] [--seed 0]

One batch of short greedy requests runs with examples/tinymoe. The process is killed at a random moment and
started again, until the batch is complete; then the next batch begins, until there were as many kills as
asked. Moments: while it starts, behind a random number of new bytes of results, and while it completes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "tinymoe"
STARTING_S = 3.0  # about what a start takes
MOMENTS = {"starting": 0.2, "working": 0.7, "completing": 0.1}  # how often each is aimed at


@dataclass(slots=True)
class Outcome:
    """Kills by what the run had done by then, and what went wrong. All but the first two should be zero."""

    kills: Counter[str] = field(default_factory=Counter)
    batches: int = 0
    lost: int = 0
    duplicated: int = 0
    different: int = 0


def write_requests(path: Path, prompts: list[str], count: int) -> None:
    """`count` greedy completions of 1 to 12 tokens."""
    bodies = [{"prompt": prompts[n % len(prompts)], "max_tokens": 1 + n % 12} for n in range(count)]
    lines = [
        {"custom_id": f"r{n}", "url": "/v1/completions", "body": {**body, "temperature": 0}}
        for n, body in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def torture(
    runtime_dir: Path, checkpoint: Path, source: Path, folder: Path, kills: int, seed: int
) -> Outcome:
    """Kill runs of `source` at `kills` random moments; outputs go to `folder`."""
    chance, outcome = random.Random(seed), Outcome()
    command = [sys.executable, "-m", "moeplan.runtime_min", "run", str(runtime_dir)]
    command += ["--checkpoint", str(checkpoint), "--input", str(source), "--output"]
    whole = folder / "whole.jsonl"
    subprocess.run([*command, str(whole)], check=True, stdout=subprocess.DEVNULL)
    expected = whole.read_bytes()
    for number in itertools.count():
        output = folder / f"{number}.jsonl"
        while not output.exists() and outcome.kills.total() < kills:
            moment = chance.choices(list(MOMENTS), list(MOMENTS.values()))[0]
            _kill_once([*command, str(output)], output, len(expected), moment, chance, outcome)
        if not output.exists():
            subprocess.run([*command, str(output)], check=True, stdout=subprocess.DEVNULL)
        _compare(output.read_bytes(), expected, outcome)
        output.with_name(output.name + ".partial").unlink(missing_ok=True)
        output.unlink()
        if outcome.kills.total() >= kills:
            return outcome


def _kill_once(
    command: list[str], output: Path, size: int, moment: str, chance: random.Random, outcome: Outcome
) -> None:
    """Start a run and kill it; a run that is faster than its killer is no kill."""
    partial = output.with_name(output.name + ".partial")
    before = _whole_records(partial)
    due = _due(partial, output, size, moment, chance)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not due():
            time.sleep(0.0005)
        process.kill()
    if process.returncode == 0:
        return
    if process.returncode != -9:
        raise RuntimeError(f"the run ended with exit code {process.returncode}")
    after = _whole_records(partial)
    outcome.lost += not output.exists() and not set(before) <= set(after)
    outcome.duplicated += len(after) - len(set(after))
    done = "at the end" if output.exists() else "in the middle" if after[1:] else "before any result"
    outcome.kills[done] += 1


def _due(partial: Path, output: Path, size: int, moment: str, chance: random.Random) -> Callable[[], bool]:
    """What says that the random moment has come."""
    if moment == "starting":
        at = time.monotonic() + chance.uniform(0, STARTING_S)
        return lambda: time.monotonic() >= at
    if moment == "completing":  # header and records are all there, perhaps the file of the final order too
        delay = chance.uniform(0, 0.003)
        return lambda: _size(partial) > size and not time.sleep(delay)
    enough = _size(partial) + chance.uniform(0, size / 15)
    return lambda: (_size(partial) >= enough and partial.exists()) or output.exists()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _whole_records(partial: Path) -> list[bytes]:
    """The header and the records that are complete; behind a torn one there is nothing."""
    data = partial.read_bytes() if partial.exists() else b""
    return data.split(b"\n")[:-1]


def _compare(got: bytes, expected: bytes, outcome: Outcome) -> None:
    outcome.batches += 1
    ids = [json.loads(line)["custom_id"] for line in got.splitlines()]
    wanted = {json.loads(line)["custom_id"] for line in expected.splitlines()}
    outcome.lost += len(wanted - set(ids))
    outcome.duplicated += len(ids) - len(set(ids))
    pairs = zip(got.splitlines(), expected.splitlines(), strict=False)
    outcome.different += sum(a != b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    (runtime_dir,) = [path.parent for path in EXAMPLE.glob("tinymoe.plan/runtime/*/runtime.json")]
    lines = (EXAMPLE / "prompts.jsonl").read_text().splitlines()
    bodies = [json.loads(line)["body"] for line in lines]
    prompts = [body["prompt"] for body in bodies if "prompt" in body]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moeplan-durability-") as name:
        folder = Path(name)
        write_requests(folder / "in.jsonl", prompts, options.requests)
        outcome = torture(
            runtime_dir, EXAMPLE / "checkpoint", folder / "in.jsonl", folder, options.kills, options.seed
        )
    moments = ", ".join(f"{count} {moment}" for moment, count in sorted(outcome.kills.items()))
    print(f"{outcome.kills.total()} kills ({moments}) over {outcome.batches} batches of {options.requests}")
    print(f"lost {outcome.lost}, duplicated {outcome.duplicated}, different {outcome.different}")
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(1 if outcome.lost or outcome.duplicated or outcome.different else 0)


if __name__ == "__main__":
    main()
