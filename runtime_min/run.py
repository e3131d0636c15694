"""Run or time a plan: the functions behind the commands. Torch is imported when one of them is called."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from moeplan.runtime_min.batch_file import (
    Answer,
    Failure,
    Place,
    Request,
    TokenScore,
    answer_record,
    failure_record,
    read_requests,
)
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.limits import check_supported
from moeplan.runtime_min.plan_file import PlanFileError, Range, RuntimePlan, load
from moeplan.runtime_min.prompts import PromptError, Prompts
from moeplan.runtime_min.results import Results

if TYPE_CHECKING:
    from moeplan.runtime_min.engine import Batches, Generation, Stats

Progress = Callable[[int, int, int], None]  # requests done, requests in all, tokens generated


@dataclass(frozen=True, slots=True, kw_only=True)
class FullBatches:
    """The fullest batches of a run, all of one number of `sequences`, and the sums over them. A batch goes on
    while requests take the places of others.

    `warm`: without the first batch of the run, which waits for caches and threads to come up.
    """

    sequences: int
    batches: int
    warm: bool
    sums: Stats

    def figures(self) -> dict[str, float]:
        """Measured rates and latencies, by the names that a profile has for them."""
        sums = self.sums
        figures = {
            "prefill_tokens_per_s": sums.prefilled_tokens / sums.prefill_s,
            "requests_per_s": sums.requests / sums.seconds,
            "ttft_s": sums.first_tokens_s / sums.requests,
        }
        if sums.decode_passes:
            figures["decode_tokens_per_s"] = sums.decoded_tokens / sums.decode_s
            figures["itl_s"] = sums.decode_s / sums.decode_passes
        return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run did. Passes that read prompts beside decoding are mixed: `mixed_s` is in no other time, and
    their tokens are among the `generated_tokens` alone.

    `stalls_s` says how long each lane waited for others; the first computes. `rehearsed`: the CPU took the
    accelerator's place.
    """

    answered: int
    failed: int
    resumed: int
    prompt_tokens: int
    generated_tokens: int
    decode_tokens: int
    decode_passes: int
    prefill_s: float
    decode_s: float
    mixed_s: float
    stalls_s: dict[str, float]
    bytes_read: int
    peak_bytes: int
    full: FullBatches | None
    rehearsed: bool


def run_plan(
    runtime_dir: Path,
    checkpoint: Path | None,
    input: Path,
    output: Path,
    progress: Progress = lambda done, total, tokens: None,
    rehearse: bool = False,
) -> Report:
    """Answer the requests of `input` in `output`, both OpenAI batch files; raises RunError.

    `rehearse` puts the CPU in the place of the accelerator that the plan is for.

    Interrupted, it leaves OUTPUT.partial, and the next call with the same arguments goes on from there.
    """
    plan, folder = _open(runtime_dir, checkpoint, rehearse)
    total = _count_lines(input)
    if output.exists() and output.samefile(input):
        raise RunError(f"{output}: is the input", "name another file for the answers")
    if not output.parent.is_dir():  # said now, not after the weights are loaded
        raise RunError(f"{output}: its folder does not exist")
    with _load(runtime_dir, plan, folder, rehearse) as engine:
        prompts = Prompts(folder, plan.model.vocab)
        results = Results(output, _identity(runtime_dir, folder, input))
        try:
            run = _Run(engine, prompts, results, total, progress)
            run.all(read_requests(input))
            results.finish()
        finally:
            results.close()
        return _report(engine, run.answered, run.failed, run.resumed, rehearse)


def bench_plan(
    runtime_dir: Path,
    checkpoint: Path | None,
    prompt_tokens: int,
    tokens: int,
    batches: int,
    rehearse: bool = False,
) -> Report:
    """Time `batches` full batches of random prompts, `tokens` generated for each; raises RunError."""
    plan, folder = _open(runtime_dir, checkpoint, rehearse)
    prompt = prompt_tokens or plan.batch.prompt_tokens
    if not 0 < prompt <= plan.batch.prompt_tokens or not 0 < tokens <= plan.batch.context_tokens - prompt:
        raise RunError(
            f"{runtime_dir}: {prompt} prompt and {tokens} new tokens do not fit the plan's "
            f"{plan.batch.prompt_tokens} and {plan.batch.context_tokens - prompt}"
        )
    from moeplan.runtime_min.engine import Generation
    from moeplan.runtime_min.sampling import Sampling

    numbers = random.Random(0)
    with _load(runtime_dir, plan, folder, rehearse) as engine:
        count = plan.batch.sequences * batches
        texts = (numbers.choices(range(plan.model.vocab), k=prompt) for _ in range(count))
        engine.run(Generation(text, tokens, Sampling(0.0, 1.0, 0)) for text in texts)
        return _report(engine, plan.batch.sequences * batches, 0, 0, rehearse)


class _Run:
    """Requests to batches, generations to records."""

    def __init__(
        self, engine: Batches, prompts: Prompts, results: Results, total: int, progress: Progress
    ) -> None:
        self._engine, self._prompts, self._results = engine, prompts, results
        self._total, self._progress = total, progress
        self.answered, self.failed, self.resumed = 0, 0, len(results.done)

    def all(self, items: Iterator[Request | Failure]) -> None:
        done = self._results.done
        requests: dict[int, Request] = {}

        def generations() -> Iterator[Generation]:
            for request, generation in self._ready(item for item in items if item.line not in done):
                requests[id(generation)] = request
                yield generation

        def finished(generation: Generation) -> None:
            self._record(requests.pop(id(generation)), generation)

        self._tell()
        self._engine.run(generations(), finished, self._tell)
        self._tell()

    def _ready(self, items: Iterator[Request | Failure]) -> Iterator[tuple[Request, Generation]]:
        """The requests that can run; the others get their records on the way."""
        for item in items:
            ready = self._prepare(item) if isinstance(item, Request) else item
            if isinstance(item, Request) and not isinstance(ready, Failure):
                yield item, ready
            elif isinstance(ready, Failure):
                self._results.add(failure_record(ready))
                self.failed += 1

    def _prepare(self, request: Request) -> Generation | Failure:
        from moeplan.runtime_min.engine import Generation
        from moeplan.runtime_min.sampling import Sampling, default_seed

        try:
            prompt = self._prompts.encode(request)
        except PromptError as error:
            return Failure(request.line, request.custom_id, "invalid_prompt", f"line {request.line}: {error}")
        batch = self._engine.plan.batch
        room = batch.context_tokens - len(prompt)
        new = room if request.max_tokens is None else request.max_tokens
        if len(prompt) > batch.prompt_tokens or new > room:
            message = (
                f"line {request.line}: {len(prompt)} prompt and {new} new tokens do not fit the plan's "
                f"{batch.prompt_tokens} prompt and {batch.context_tokens} context tokens"
            )
            return Failure(request.line, request.custom_id, "context_length_exceeded", message)
        seed = default_seed(request.custom_id) if request.seed is None else request.seed
        return Generation(
            prompt=prompt,
            max_tokens=new,
            sampling=Sampling(request.temperature, request.top_p, seed),
            ends=self._engine.config.eos,
            stopped=self._stop_test(prompt, request.stop) if request.stop else None,
            top_scored=request.logprobs,
        )

    def _stop_test(self, prompt: list[int], stop: tuple[str, ...]) -> Callable[..., bool]:
        def stopped(tokens: list[int]) -> bool:
            text = self._prompts.decode(prompt, tokens)
            return any(word in text for word in stop)

        return stopped

    def _record(self, request: Request, generation: Generation) -> None:
        if generation.finish == "invalid":
            message = f"line {request.line}: the model's scores are no numbers"
            failure = Failure(request.line, request.custom_id, "invalid_scores", message)
            self._results.add(failure_record(failure))
            self.failed += 1
            return
        record = answer_record(request, self._answer(request, generation), self._engine.plan.name)
        self._results.add(record)
        self.answered += 1

    def _answer(self, request: Request, generation: Generation) -> Answer:
        said = [token for token in generation.tokens if token not in generation.ends]
        text = self._prompts.decode(generation.prompt, said)
        ends = [at for at in (text.find(word) for word in request.stop) if at >= 0]
        end = min(ends, default=len(text))
        return Answer(
            text=text[:end],
            finish="length" if generation.finish == "length" else "stop",
            prompt_tokens=len(generation.prompt),
            completion_tokens=len(generation.tokens),
            places=None if request.logprobs is None else self._places(generation, end),
        )

    def _places(self, generation: Generation, end: int) -> tuple[Place, ...]:
        """The scores of the tokens whose text begins before `end`."""
        places, said = [], b""
        for scored in generation.scored:
            offset = len(said.decode(errors="ignore"))
            if scored.token in generation.ends or offset >= end:
                break
            best = tuple(self._scored(*pair) for pair in scored.best)
            places.append(Place(self._scored(scored.token, scored.logprob), offset, best))
            said += places[-1].token.utf8
        return tuple(places)

    def _scored(self, token: int, logprob: float) -> TokenScore:
        utf8 = self._prompts.token_bytes(token)
        return TokenScore(utf8.decode(errors="replace"), utf8, logprob)

    def _tell(self) -> None:
        done = self.answered + self.failed + self.resumed
        self._progress(done, self._total, self._engine.stats.generated_tokens)


def _open(runtime_dir: Path, given: Path | None, rehearse: bool) -> tuple[RuntimePlan, Path]:
    """A plan that this version can execute, and the checkpoint's folder: as given, or as the plan names it
    from the folder that holds the plan's."""
    plan = load(runtime_dir)
    check_supported(runtime_dir / "runtime.json", plan)
    if plan.device == "accelerator" and not rehearse:
        _check_accelerator(runtime_dir / "runtime.json")
    if given is None and not plan.model.checkpoint:
        raise RunError(
            f"{runtime_dir}: the plan names no checkpoint", "say where it is with --checkpoint DIR"
        )
    folder = given or runtime_dir.resolve().parents[2] / plan.model.checkpoint
    if not folder.is_dir():
        raise RunError(f"{folder}: no such checkpoint folder", "say where it is with --checkpoint DIR")
    return plan, folder


def _check_accelerator(path: Path) -> None:
    import torch

    if not torch.accelerator.is_available():
        raise PlanFileError(
            f"{path}: the plan is for an accelerator, and torch finds none here",
            "run it on such a machine, or with --rehearse, which lets the CPU take the accelerator's place",
        )


def _load(runtime_dir: Path, plan: RuntimePlan, checkpoint: Path, rehearse: bool) -> Batches:
    """The plan's engine with its checkpoint loaded."""
    import torch

    from moeplan.runtime_min.offload import Offload
    from moeplan.runtime_min.stream import Engine

    if plan.schedule.kind == "stream":
        return Engine(runtime_dir, plan, checkpoint)
    device = None if rehearse else torch.accelerator.current_accelerator()
    return Offload(runtime_dir, plan, checkpoint, device or torch.device("cpu"))


def _count_lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None


def _identity(runtime_dir: Path, checkpoint: Path, input: Path) -> str:
    """A digest of all that the records depend on; of the weights only names and sizes."""
    digest = hashlib.sha256()
    for path in (
        input,
        runtime_dir / "runtime.json",
        checkpoint / "config.json",
        checkpoint / "tokenizer.json",
    ):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for path in sorted(checkpoint.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _report(engine: Batches, answered: int, failed: int, resumed: int, rehearse: bool) -> Report:
    stats = engine.stats
    return Report(
        answered=answered,
        failed=failed,
        resumed=resumed,
        prompt_tokens=stats.prefilled_tokens,
        generated_tokens=stats.generated_tokens,
        decode_tokens=stats.decoded_tokens,
        decode_passes=stats.decode_passes,
        prefill_s=stats.prefill_s,
        decode_s=stats.decode_s,
        mixed_s=stats.mixed_s,
        stalls_s=engine.lanes.stalls_s,
        bytes_read=engine.disk.bytes_read,
        peak_bytes=_peak_bytes(),
        full=_full_batches(engine.batches),
        rehearsed=rehearse and engine.plan.device == "accelerator",
    )


def _full_batches(batches: Sequence[tuple[int, Stats]]) -> FullBatches | None:
    """The batches with the most sequences, summed; the last one of a run is often smaller."""
    if not batches:
        return None
    most = max(sequences for sequences, _ in batches)
    warm = sum(sequences == most for sequences, _ in batches[1:]) > 0
    full = [stats for sequences, stats in batches[int(warm) :] if sequences == most]
    sums = functools.reduce(lambda all_before, stats: all_before.plus(stats), full)
    return FullBatches(sequences=most, batches=len(full), warm=warm, sums=sums)


def _peak_bytes() -> int:
    """The most memory this process has held. Not getrusage: there a process inherits its parent's peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def summary(plan: RuntimePlan, report: Report) -> str:
    """The run in lines of text, its speeds beside those that the plan expects."""
    expected = plan.predicted
    all_s = report.prefill_s + report.decode_s + report.mixed_s
    speeds = (
        ("prefill", report.prompt_tokens, report.prefill_s, expected.prefill_tokens_per_s),
        ("decode", report.decode_tokens, report.decode_s, expected.decode_tokens_per_s),
        ("generated", report.generated_tokens, all_s, expected.generated_tokens_per_s),
    )
    resumed = f" ({report.resumed} from the interrupted run)" if report.resumed else ""
    failed = f", {report.failed} with an error record" if report.failed else ""
    planned = plan.memory.budget_bytes + plan.offload.budget_bytes * report.rehearsed  # one memory for both
    lines = [
        f"{report.answered + report.failed + report.resumed} requests{resumed}{failed}; "
        f"{report.generated_tokens:,} tokens generated in {all_s:.1f} s",
        *(_speed(*speed) for speed in speeds if speed[2] > 0),
        f"  memory     {_gib(report.peak_bytes)} GiB at peak, planned {_gib(planned)}",
    ]
    if report.bytes_read:
        lines.append(f"  pages      {_gib(report.bytes_read)} GiB read")
    waited = [f"{name} {seconds:.1f} s" for name, seconds in report.stalls_s.items() if seconds > 0]
    if waited:
        lines.append(f"  waiting    {', '.join(waited)} for other lanes")
    if report.rehearsed:
        lines.append("  rehearsal: the CPU took the accelerator's place, so no speed above is the plan's")
        return "\n".join(lines)
    if all_s > 0 and report.generated_tokens / all_s < expected.generated_tokens_per_s.low:
        lines.append(f"  slower than planned: {_SLOWER}")
    return "\n".join(lines)


_SLOWER = "a busy machine, a batch that was not full, or a model so small that calls outweigh arithmetic"


def _speed(name: str, tokens: int, seconds: float, plan: Range) -> str:
    interval = f"{plan.low:,.0f} to {plan.high:,.0f}"
    return f"  {name:9}  {tokens / seconds:,.0f} tokens/s, the plan expected {plan.value:,.0f} ({interval})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def show(input: Path, output: Path, count: int) -> str:
    """The first `count` prompts of `input`, each with what `output` has for it."""
    texts = []
    with output.open(encoding="utf-8") as file:
        for item, line in islice(zip(read_requests(input), file, strict=True), count):
            record = json.loads(line)
            if isinstance(item, Failure) or record["error"]:
                texts.append(f"{record['custom_id']}: error: {record['error']['message']}")
                continue
            prompt = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
            choice = record["response"]["body"]["choices"][0]
            answer = choice["text"] if "text" in choice else choice["message"]["content"]
            texts.append(f"{item.custom_id}: {prompt} >>> {answer}")
    return "\n".join(texts)
