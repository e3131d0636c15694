"""What reading only the pages that routing hits is worth: bytes and tokens/s of decode, whole layers beside.

usage: python benchmarks/routed_reading.py [--rounds N]

A random checkpoint of Mixtral's architecture (64 experts, 4 a token, 0.9 GB of bf16, written once under
build/bench) decodes out of page slots, nothing but embeddings, head, norms and routers resident, so that
the disk bounds every pass. Each batch runs under the same program with whole layers, with routed pages, and
with guesses of the next layer's pages. Ways take turns, round by round; a figure is the median pass of all
rounds, its bytes the mean. `right` is the part of the guesses that routing then hit: random weights say
little about it, so it is also measured on the trained examples/tinymoe where that is checked out.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoints import Shape, write_checkpoint
from plans import model_of
from tables import show

from moeplan.codegen.emit.schedule_py import schedule_text
from moeplan.planner import schedules
from moeplan.planner.ir.schedule import StreamConstants
from moeplan.runtime_min import plan_file
from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.plan_file import ModelPlan, Range, RuntimePlan, load
from moeplan.runtime_min.sampling import Sampling
from moeplan.runtime_min.stream import Engine

MODEL = Shape("routed", layers=6, hidden=512, inner=768, kv_heads=4, experts=64, top=4, vocab=8192)
PROMPT, OUTPUT, SLOTS = 16, 17, 4
TINYMOE = Path(__file__).parents[1] / "examples" / "tinymoe" / "checkpoint"


@dataclass
class Way:
    """A way to read, and what was measured of its decode passes."""

    sequences: int
    routed: bool
    guesses: int = 0
    seconds: list[float] = field(default_factory=list)
    read_bytes: list[float] = field(default_factory=list)
    right: float = 0.0

    def __str__(self) -> str:
        if not self.routed:
            return "whole layers"
        return f"routed, {self.guesses} guessed" if self.guesses else "routed"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    write_checkpoint(MODEL)
    rows = []
    for sequences in (1, 2, 8, 32):
        ways = [Way(sequences, False), *(Way(sequences, True, n) for n in (0, 1, 2, 4))]
        for _ in range(options.rounds):
            for way in ways:
                measure(way)
        rows += [figures(way, ways[0]) for way in ways]
    heads = ("batch, reading", "MB/pass", "of whole", "ms/pass", "tokens/s", "x whole", "MB/s", "right")
    show(heads, rows)
    if (TINYMOE / "model.safetensors").exists():
        show(("tinymoe: batch, guesses", "right"), [*guessed_right()])


def measure(way: Way) -> None:
    """One batch."""
    with opened(way, MODEL.folder, PROMPT, OUTPUT) as engine:
        ends = decode(engine, way.sequences, PROMPT, OUTPUT)
        # The first passes still find pages that the prefill read ahead, the last reads none ahead.
        for (t0, b0), (t1, b1) in itertools.pairwise(ends[1:-1]):
            way.seconds.append(t1 - t0)
            way.read_bytes.append(b1 - b0)
        way.right = right_share(engine)


def right_share(engine: Engine) -> float:
    counts = engine.model.places.counts
    return counts.right / counts.guessed if counts.guessed else 0.0


def decode(engine: Engine, sequences: int, prompt: int, output: int) -> list[tuple[float, int]]:
    """The time at the end of each pass, and the bytes read by then."""
    numbers, ends = random.Random(1), list[tuple[float, int]]()
    vocab = engine.plan.model.vocab
    prompts = [numbers.choices(range(3, vocab), k=prompt) for _ in range(sequences)]
    engine.run(
        [Generation(text, output, Sampling(0.0, 1.0, 0)) for text in prompts],
        after_pass=lambda: ends.append((time.perf_counter(), engine.disk.bytes_read)),
    )
    return ends


def figures(way: Way, whole: Way) -> tuple[str, ...]:
    seconds, nbytes = statistics.median(way.seconds), statistics.mean(way.read_bytes)
    return (
        f"{way.sequences:3}, {way}",
        f"{nbytes / 1e6:.1f}",
        f"{nbytes / statistics.mean(whole.read_bytes):.1%}",
        f"{1e3 * seconds:.1f}",
        f"{way.sequences / seconds:.2f}",
        f"{statistics.median(whole.seconds) / seconds:.2f}",
        f"{nbytes / 1e6 / statistics.mean(way.seconds):.0f}",
        f"{way.right:.2f}" if way.guesses else "",
    )


def guessed_right() -> Iterator[tuple[str, ...]]:
    """The trained example's guesses, on prompts of its own vocabulary drawn at random and its answers."""
    for sequences, guesses in ((1, 1), (1, 2), (4, 2), (4, 4)):
        with opened(Way(sequences, True, guesses), TINYMOE, 16, 64) as engine:
            decode(engine, sequences, 16, 64)
            yield f"{sequences}, {guesses}", f"{right_share(engine):.2f}"


@contextmanager
def opened(way: Way, checkpoint: Path, prompt: int, output: int) -> Iterator[Engine]:
    """An engine on a plan written for it."""
    model = model_of(checkpoint)
    plan = plan_of(way, model, prompt, output)
    pages = plan.pages
    constants = StreamConstants(
        model.layers,
        pages.pages_per_layer,
        pages.resident_pages,
        pages.slots,
        pages.places,
        pages.guesses,
        lead=0,
        across=0,
        barrier=0,
        lean=0,
    )
    text = schedule_text(schedules.named(constants, "paged"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "schedule.py").write_text(text)
        schedule = replace(plan.schedule, sha256=digest)
        (folder / "runtime.json").write_text(plan_file.to_json(replace(plan, schedule=schedule)))
        with Engine(folder, load(folder), checkpoint) as engine:
            yield engine


def plan_of(way: Way, model: ModelPlan, prompt: int, output: int) -> RuntimePlan:
    """Nothing resident, memory enough."""
    pages = plan_file.PagePlan(
        pages_per_layer=1 + model.experts,
        experts_per_page=1,
        resident_pages=0,
        slots=SLOTS + way.guesses,
        slot_bytes=0,
        readers=4,
        block_bytes=1 << 20,
        places=0,
        guesses=way.guesses,
    )
    batch = plan_file.BatchPlan(
        sequences=way.sequences,
        micro_batch=way.sequences,
        prefill_tokens=2048,
        prompt_tokens=prompt,
        context_tokens=prompt + output,
        pass_tokens=way.sequences * prompt,
        kv_tokens=way.sequences * plan_file.kv_blocks(prompt + output) * plan_file.KV_BLOCK_TOKENS,
        kv_cache="same",
    )
    places = plan_file.most_places(model, batch, pages) if way.routed else 0
    pages = replace(pages, slot_bytes=plan_file.slot_bytes(model, pages, 2), places=places)
    enough, unsaid = 8 << 30, Range(value=1.0, low=1.0, high=1.0)
    return RuntimePlan(
        format=plan_file.FORMAT,
        name=str(way),
        device="cpu",
        threads=1,
        model=model,
        batch=batch,
        pages=pages,
        offload=plan_file.NO_OFFLOAD,
        memory=plan_file.MemoryPlan(
            budget_bytes=5 * enough,
            weights_bytes=enough,
            slots_bytes=enough,
            kv_bytes=enough,
            workspace_bytes=enough,
            process_bytes=1 << 30,
        ),
        schedule=plan_file.SchedulePlan(kind="stream", format=plan_file.SCHEDULE_FORMAT, sha256=""),
        predicted=plan_file.Predicted(
            prefill_tokens_per_s=unsaid, decode_tokens_per_s=unsaid, generated_tokens_per_s=unsaid
        ),
    )


if __name__ == "__main__":
    main()
