"""Run or time a plan: the functions behind the commands. Torch is imported when one of them is called."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
    failure,
    failure_record,
    read_requests,
)
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.limits import check_supported
from moeplan.runtime_min.metrics import MetricsFile
from moeplan.runtime_min.plan_file import PlanFileError, RuntimePlan, load
from moeplan.runtime_min.prompts import PromptError, Prompts
from moeplan.runtime_min.report import Counts, Report, make_report
from moeplan.runtime_min.results import Results
from moeplan.runtime_min.trace import Trace

if TYPE_CHECKING:
    from moeplan.runtime_min.engine import Batches, Generation
    from moeplan.runtime_min.ranks import Ranks

Progress = Callable[[int, int, int], None]  # requests done, requests in all, tokens generated


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Files that follow a run: what every lane did when (`trace`), and how far it is (`metrics`)."""

    trace: Path | None = None
    metrics: Path | None = None


def run_plan(
    runtime_dir: Path,
    checkpoint: Path | None,
    input: Path,
    output: Path,
    progress: Progress = lambda done, total, tokens: None,
    rehearse: bool = False,
    watch: Watch = Watch(),
) -> Report:
    """Answer the requests of `input` in `output`, both OpenAI batch files; raises RunError.

    `rehearse` puts the CPU in the place of the accelerator that the plan is for. `progress` is called after
    every pass; what it raises ends the run.

    Interrupted, it leaves OUTPUT.partial, and the next call with the same arguments goes on from there.
    """
    plan, folder = _open(runtime_dir, checkpoint, rehearse)
    counts = Counts(_count_lines(input))
    if output.exists() and output.samefile(input):
        raise RunError(f"{output}: is the input", "name another file for the answers")
    if not output.parent.is_dir():  # said now, not after the weights are loaded
        raise RunError(f"{output}: its folder does not exist")
    with _engine(runtime_dir, plan, folder, rehearse, watch, counts) as engine:
        prompts = Prompts(folder, plan.model.vocab)
        results = Results(output, _identity(runtime_dir, folder, input))
        try:
            _Run(engine, prompts, results, counts, progress).all(read_requests(input))
            results.finish()
        finally:
            results.close()
        return make_report(engine, counts, rehearse)


def bench_plan(
    runtime_dir: Path,
    checkpoint: Path | None,
    prompt_tokens: int,
    tokens: int,
    batches: int,
    rehearse: bool = False,
    watch: Watch = Watch(),
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

    count = plan.batch.sequences * batches
    numbers, counts = random.Random(0), Counts(count)

    def finished(_: Generation) -> None:
        counts.answered += 1

    with _engine(runtime_dir, plan, folder, rehearse, watch, counts) as engine:
        texts = (numbers.choices(range(plan.model.vocab), k=prompt) for _ in range(count))
        engine.run((Generation(text, tokens, Sampling(0.0, 1.0, 0)) for text in texts), finished)
        return make_report(engine, counts, rehearse)


class _Run:
    """Requests to batches, generations to records."""

    def __init__(
        self, engine: Batches, prompts: Prompts, results: Results, counts: Counts, progress: Progress
    ) -> None:
        self._engine, self._prompts, self._results = engine, prompts, results
        self._counts, self._progress = counts, progress
        self._requests: dict[int, Request] = {}  # under way, by their generations
        counts.resumed = len(results.done)

    def all(self, items: Iterator[Request | Failure]) -> None:
        done = self._results.done
        left = (item for item in items if item.line not in done)
        self._tell()
        self._engine.run(self._ready(left), self._record, self._tell)
        self._tell()

    def _ready(self, items: Iterator[Request | Failure]) -> Iterator[Generation]:
        """The requests that can run; the others get their records on the way."""
        for item in items:
            ready = self._prepare(item) if isinstance(item, Request) else item
            if isinstance(ready, Failure):
                self._fail(ready)
            else:
                yield ready

    def _prepare(self, request: Request) -> Generation | Failure:
        from moeplan.runtime_min.engine import Generation
        from moeplan.runtime_min.sampling import Sampling, default_seed

        try:
            prompt = self._prompts.encode(request)
        except RunError:
            raise
        except Exception as error:  # a tokenizer or template may fail in any way; the others go on
            said = str(error) if isinstance(error, PromptError) else f"the prompt cannot be made: {error!r}"
            return failure(request, "invalid_prompt", said)
        batch = self._engine.plan.batch
        room = batch.context_tokens - len(prompt)
        new = room if request.max_tokens is None else request.max_tokens
        if len(prompt) > batch.prompt_tokens or new > room:
            message = (
                f"{len(prompt)} prompt and {new} new tokens do not fit the plan's "
                f"{batch.prompt_tokens} prompt and {batch.context_tokens} context tokens"
            )
            return failure(request, "context_length_exceeded", message)
        seed = default_seed(request.custom_id) if request.seed is None else request.seed
        generation = Generation(
            prompt=prompt,
            max_tokens=new,
            sampling=Sampling(request.temperature, request.top_p, seed),
            ends=self._engine.config.eos,
            stopped=self._stop_test(prompt, request.stop) if request.stop else None,
            top_scored=request.logprobs,
        )
        self._requests[id(generation)] = request
        return generation

    def _stop_test(self, prompt: list[int], stop: tuple[str, ...]) -> Callable[..., bool]:
        def stopped(tokens: list[int]) -> bool:
            text = self._prompts.decode(prompt, tokens)
            return any(word in text for word in stop)

        return stopped

    def _record(self, generation: Generation) -> None:
        request = self._requests.pop(id(generation))
        if generation.finish == "invalid":
            self._fail(failure(request, "invalid_scores", "the model's scores are no numbers"))
            return
        record = answer_record(request, self._answer(request, generation), self._engine.plan.name)
        self._results.add(record)
        self._counts.answered += 1

    def _fail(self, failure: Failure) -> None:
        self._results.add(failure_record(failure))
        self._counts.failed += 1

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
        counts = self._counts
        self._progress(counts.done, counts.requests, self._engine.stats.generated_tokens)


def _open(runtime_dir: Path, given: Path | None, rehearse: bool) -> tuple[RuntimePlan, Path]:
    """A plan that this version can execute, and the checkpoint's folder: as given, or as the plan names it
    from the folder that holds the plan's."""
    plan = load(runtime_dir)
    check_supported(runtime_dir / "runtime.json", plan)
    if plan.device == "accelerator" and not rehearse:
        _check_accelerator(runtime_dir / "runtime.json", plan.offload.gpus)
    if given is None and not plan.model.checkpoint:
        raise RunError(
            f"{runtime_dir}: the plan names no checkpoint", "say where it is with --checkpoint DIR"
        )
    folder = given or runtime_dir.resolve().parents[2] / plan.model.checkpoint
    if not folder.is_dir():
        raise RunError(f"{folder}: no such checkpoint folder", "say where it is with --checkpoint DIR")
    return plan, folder


def _check_accelerator(path: Path, count: int) -> None:
    import torch

    found = torch.accelerator.device_count()
    if found < count:
        plural = "an accelerator" if count == 1 else f"{count} accelerators"
        raise PlanFileError(
            f"{path}: the plan is for {plural}, and torch finds {found or 'none'} here",
            "run it on such a machine, or with --rehearse, which lets the CPU take the accelerator's place",
        )


@contextmanager
def _engine(
    runtime_dir: Path, plan: RuntimePlan, checkpoint: Path, rehearse: bool, watch: Watch, counts: Counts
) -> Iterator[Batches]:
    """The plan's engine with its checkpoint loaded, watched. Its lanes end before the trace does."""
    from moeplan.runtime_min.ranks import started

    with (
        Trace(watch.trace) if watch.trace else nullcontext() as trace,
        started(runtime_dir, plan, checkpoint, rehearse) as ranks,
        _load(runtime_dir, plan, checkpoint, ranks) as engine,
        MetricsFile(watch.metrics, plan, lambda: make_report(engine, counts, rehearse))
        if watch.metrics
        else nullcontext(),
    ):
        engine.lanes.watcher = trace
        yield engine


def _load(runtime_dir: Path, plan: RuntimePlan, checkpoint: Path, ranks: Ranks) -> Batches:
    from moeplan.runtime_min.offload import Offload
    from moeplan.runtime_min.stream import Engine

    if plan.schedule.kind == "stream":
        return Engine(runtime_dir, plan, checkpoint)
    return Offload(runtime_dir, plan, checkpoint, ranks.device, ranks)


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
