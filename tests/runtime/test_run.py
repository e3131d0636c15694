"""A batch file in, a batch file out: complete, in order, the same however it is cut or interrupted."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeplan.runtime_min import results, run
from moeplan.runtime_min.batch_file import Failure, failure_record
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.plan_file import PlanFileError, load, to_json
from moeplan.runtime_min.report import Report, summary
from moeplan.runtime_min.run import bench_plan, run_plan, show

from .folders import Shape, make_plan, save_checkpoint, save_tokenizer, write_plan

SHAPE = Shape()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "checkpoint"
    save_checkpoint(folder, SHAPE)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}:")
    return folder


@pytest.fixture(scope="module")
def runtime_dir(checkpoint: Path) -> Path:
    """Beside the checkpoint, where the plan expects it."""
    return write_plan(checkpoint.parent, make_plan(SHAPE))


def completion(custom_id: str, prompt: str, **body: object) -> str:
    body = {"prompt": prompt, "max_tokens": 5, "temperature": 0, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})


def chat(custom_id: str, content: str, **body: object) -> str:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 5, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})


LINES = [
    completion("greedy", "Once upon a time"),
    "{",
    chat("chat", "Hello", seed=5, temperature=0.8),
    completion("sampled", "It was", temperature=1.0, top_p=0.9, max_tokens=9),
    completion("too long", "x" * 48),
    completion("greedy", "the same again"),
    completion("short", "I"),
    completion("too many", "I", max_tokens=63),
    completion("list", ["a", "b"]),
    completion("last", "The end of the file", max_tokens=1),
]


def write_input(folder: Path, lines: list[str]) -> Path:
    path = folder / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def read_output(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text_of(record: dict) -> str:
    choice = record["response"]["body"]["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.fixture(scope="module")
def answered(runtime_dir, tmp_path_factory) -> tuple[Path, Path, Report]:
    """Input, output and report of one run over LINES; the checkpoint is found from the plan."""
    folder = tmp_path_factory.mktemp("run")
    source, output = write_input(folder, LINES), folder / "out.jsonl"
    return source, output, run_plan(runtime_dir, None, source, output)


def test_every_line_is_answered_in_order(answered):
    _, output, report = answered
    records = read_output(output)
    assert [r["id"] for r in records] == [f"batch_req_{n}" for n in range(1, len(LINES) + 1)]
    assert [r["custom_id"] for r in records][:3] == ["greedy", None, "chat"]
    codes = [r["error"] and r["error"]["code"] for r in records]
    assert codes == [
        None,
        "invalid_json",
        None,
        None,
        "context_length_exceeded",
        "duplicate_custom_id",
        None,
        "context_length_exceeded",
        "invalid_parameter",
        None,
    ]
    assert (report.answered, report.failed, report.resumed) == (5, 5, 0)
    assert report.stats.generated_tokens == sum(
        r["response"]["body"]["usage"]["completion_tokens"] for r in records if r["response"]
    )
    assert not list(output.parent.glob("*.partial"))
    assert not list(output.parent.glob("*.tmp"))


def test_greedy_text_is_transformers_text(answered, checkpoint):
    from transformers import MixtralForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = MixtralForCausalLM.from_pretrained(checkpoint).eval()
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    said = model.generate(
        ids, max_new_tokens=5, do_sample=False, eos_token_id=None, attention_mask=ids * 0 + 1
    )
    text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    assert text_of(read_output(answered[1])[0]) == text


@pytest.mark.parametrize("sequences", [1, 3])
def test_answers_do_not_depend_on_the_batch(answered, checkpoint, tmp_path, sequences):
    """Greedy and seeded answers alike, alone or with others, in memory or streamed otherwise."""
    source, output, _ = answered
    plan = make_plan(SHAPE, sequences=sequences, micro_batch=1, slots=1, experts_per_page=4)
    run_plan(write_plan(tmp_path, plan), checkpoint, source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == output.read_bytes()


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("records", [0, 2, 6, 9])
def test_an_interrupted_run_goes_on(answered, runtime_dir, tmp_path, monkeypatch, records):
    """Killed after some records, the last torn; then the same bytes as in one go, nothing done twice."""
    source, expected, whole = answered
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    real = results.Results.add

    def killed_after(self, record):
        if len(self.done) == records:
            raise Killed
        real(self, record)

    monkeypatch.setattr(results.Results, "add", killed_after)
    with pytest.raises(Killed):
        run_plan(runtime_dir, None, source, output)
    monkeypatch.undo()
    assert not output.exists()
    with partial.open("ab") as file:
        file.write(b'{"id": "batch_req_1')
    report = run_plan(runtime_dir, None, source, output)
    assert output.read_bytes() == expected.read_bytes()
    assert report.resumed == records
    assert report.resumed + report.answered + report.failed == len(LINES)
    assert report.stats.generated_tokens <= whole.stats.generated_tokens
    assert not partial.exists()


def test_nothing_is_left_to_do(answered, runtime_dir, tmp_path):
    """Interrupted between the last record and the renaming."""
    source, expected, _ = answered
    identity = run._identity(runtime_dir, run._open(runtime_dir, None, False)[1], source)
    left = results.Results(tmp_path / "out.jsonl", identity)
    for record in read_output(expected):
        left.add(record)
    left.close()
    report = run_plan(runtime_dir, None, source, tmp_path / "out.jsonl")
    assert (report.resumed, report.stats.generated_tokens) == (len(LINES), 0)
    assert (tmp_path / "out.jsonl").read_bytes() == expected.read_bytes()


def test_another_input_does_not_continue_it(runtime_dir, tmp_path):
    left = results.Results(tmp_path / "out.jsonl", "another run")
    left.add(failure_record(Failure(1, "a", "code", "message")))
    left.close()
    with pytest.raises(RunError, match=r"out\.jsonl\.partial: belongs to another input, plan or checkpoint"):
        run_plan(runtime_dir, None, write_input(tmp_path, LINES[:1]), tmp_path / "out.jsonl")


def test_two_runs_do_not_share_an_output(runtime_dir, tmp_path):
    other = results.Results(tmp_path / "out.jsonl", "x")
    with pytest.raises(RunError, match="is being written by another run"):
        run_plan(runtime_dir, None, write_input(tmp_path, LINES[:1]), tmp_path / "out.jsonl")
    other.close()


@pytest.mark.parametrize("torn", [b"", b'{"moeplan_par', b'{"moeplan_partial": 1, "run": "x"}'])
def test_a_partial_file_torn_in_its_first_line(tmp_path, torn):
    path = tmp_path / "out.jsonl.partial"
    path.write_bytes(torn)
    fresh = results.Results(tmp_path / "out.jsonl", "x")
    fresh.add(failure_record(Failure(1, "a", "code", "message")))
    fresh.close()
    again = results.Results(tmp_path / "out.jsonl", "x")
    assert again.done == {1}
    again.close()


def test_an_empty_input_gives_an_empty_output(runtime_dir, tmp_path):
    report = run_plan(runtime_dir, None, write_input(tmp_path, []), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert "0 requests" in summary(load(runtime_dir), report)


def test_stop_texts_end_the_answer_before_them(answered, runtime_dir, tmp_path):
    full = text_of(read_output(answered[1])[0])
    stop = full[2:4]
    source = write_input(tmp_path, [completion("a", "Once upon a time", stop=[stop, "never"])])
    run_plan(runtime_dir, None, source, tmp_path / "out.jsonl")
    [record] = read_output(tmp_path / "out.jsonl")
    assert text_of(record) == full[: full.index(stop)]
    assert record["response"]["body"]["choices"][0]["finish_reason"] == "stop"


def test_poisoned_requests_get_error_records(runtime_dir, tmp_path, monkeypatch):
    """Whatever is wrong with a request, the others are answered."""
    from moeplan.runtime_min.prompts import Prompts

    encode = Prompts.encode

    def failing(self, request):
        if request.prompt == "panic":
            raise RuntimeError("no such token")
        return encode(self, request)

    monkeypatch.setattr(Prompts, "encode", failing)
    lines = [
        completion("good", "Once"),
        completion("tokenizer", "panic"),
        completion("huge", "x" * 1_000_000),
        completion("surrogate", "half \ud800"),
        completion("stops", "Once", stop=["y" * 1_000_000, "\u0000", "z", "\U0001f600"]),
        completion("nested", "Once", metadata={"a": 1}).replace("1}", "[" * 50_000 + "]" * 50_000 + "}"),
        completion("number", "Once").replace(": 5", ": 1e999"),
        completion("also good", "Once"),
    ]
    report = run_plan(runtime_dir, None, write_input(tmp_path, lines), tmp_path / "out.jsonl")
    codes = {r["custom_id"]: r["error"] and r["error"]["code"] for r in read_output(tmp_path / "out.jsonl")}
    assert codes == {
        "good": None,
        "tokenizer": "invalid_prompt",
        "huge": "context_length_exceeded",
        "surrogate": "invalid_parameter",
        "stops": None,
        None: "invalid_json",
        "number": "invalid_parameter",
        "also good": None,
    }
    assert (report.answered, report.failed) == (3, 5)


def test_a_template_that_fails_on_one_chat(checkpoint, runtime_dir, tmp_path):
    """Not only in the ways that templates should: this one calls itself without end."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    template = (
        "{% macro f() %}{{ f() }}{% endmacro %}{% if messages[0].content == 'loop' %}{{ f() }}{% endif %}:"
    )
    (copy / "chat_template.jinja").write_text(template)
    source = write_input(tmp_path, [chat("good", "Hello"), chat("endless", "loop"), chat("again", "Hello")])
    report = run_plan(runtime_dir, copy, source, tmp_path / "out.jsonl")
    assert (report.answered, report.failed) == (2, 1)
    assert read_output(tmp_path / "out.jsonl")[1]["error"]["code"] == "invalid_prompt"


def test_show_and_summary(answered, runtime_dir):
    source, output, report = answered
    lines = show(source, output, 3).split("\n")
    assert lines[0].startswith("greedy: Once upon a time >>> ")
    assert "None: error: line 2: is not JSON" in show(source, output, 3)
    text = summary(load(runtime_dir), report)
    assert text.startswith("10 requests, 5 with an error record; ")
    assert "tokens/s, the plan expected 100 (10 to 1,000)" in text
    assert "planned 8.00" in text


def test_progress_reaches_the_end(runtime_dir, tmp_path):
    seen: list[tuple[int, int, int]] = []
    source = write_input(tmp_path, LINES[:4])
    run_plan(runtime_dir, None, source, tmp_path / "o.jsonl", lambda *state: seen.append(state))
    assert seen[-1][:2] == (4, 4)
    assert seen == sorted(seen)


def test_bench_times_full_batches(runtime_dir):
    report = bench_plan(runtime_dir, None, prompt_tokens=8, tokens=4, batches=2)
    stats = report.stats
    assert stats.prompt_tokens == 2 * 4 * 8
    assert (stats.generated_tokens, stats.decode_tokens, stats.decode_passes) == (32, 24, 6)
    assert report.bytes_read > 0
    assert stats.decode_s > 0
    with pytest.raises(RunError, match="8 prompt and 57 new tokens do not fit the plan's 48 and 56"):
        bench_plan(runtime_dir, None, prompt_tokens=8, tokens=57, batches=1)


@pytest.mark.parametrize("item", ["weights", "slots", "kv", "workspace", "budget"])
def test_a_run_that_needs_more_than_planned_is_refused(checkpoint, tmp_path, item):
    """With the numbers, before any weight is read."""
    plan = make_plan(SHAPE)
    short = {f"{item}_bytes": getattr(plan.memory, f"{item}_bytes") // 1000}
    runtime_dir = write_plan(tmp_path, replace(plan, memory=replace(plan.memory, **short)))
    with pytest.raises(PlanFileError, match="more memory than the plan allows: ") as caught:
        run_plan(runtime_dir, checkpoint, write_input(tmp_path, LINES[:1]), tmp_path / "out.jsonl")
    named = "all" if item == "budget" else item
    assert f"{named} " in str(caught.value)
    assert f"{short[f'{item}_bytes']:,} bytes" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("batch", {"micro_batch": 0}, "micro_batch is 0, expected at least 1"),
        ("batch", {"context_tokens": 48}, "context_tokens is not above prompt_tokens"),
        ("pages", {"block_bytes": 1000}, "block_bytes is not a multiple of 4096"),
        ("pages", {"pages_per_layer": 4}, "pages_per_layer does not hold the experts"),
        ("pages", {"slots": 0}, "no slots for pages that move"),
        ("model", {"kv_heads": 3}, "heads are not a multiple of kv_heads"),
        ("model", {"architecture": "gpt2"}, "architecture 'gpt2' is not supported"),
    ],
)
def test_figures_that_cannot_be_executed(checkpoint, tmp_path, part, change, says):
    plan = make_plan(SHAPE)
    runtime_dir = write_plan(tmp_path, plan)
    broken = replace(load(runtime_dir), **{part: replace(getattr(plan, part), **change)})
    (runtime_dir / "runtime.json").write_text(to_json(broken))
    with pytest.raises(PlanFileError, match=rf"runtime\.json: {says}"):
        run_plan(runtime_dir, checkpoint, write_input(tmp_path, []), tmp_path / "out.jsonl")


def test_measured_allocations_stay_within_the_plan(checkpoint, tmp_path):
    """What the engine holds for the whole run: weights, slots, KV cache and the pass's buffers."""
    from moeplan.runtime_min.stream import Engine

    runtime_dir = write_plan(tmp_path, make_plan(SHAPE, resident_pages=1))
    plan = load(runtime_dir)
    with Engine(runtime_dir, plan, checkpoint) as engine:
        model, pages = engine.model, engine._pages
        assert sum(t.nbytes for t in pages.resident.values()) == plan.memory.weights_bytes
        assert sum(t.nbytes for t in pages._slots) == plan.memory.slots_bytes
        assert model.cache.tensor.nbytes == plan.memory.kv_bytes
        held = sum(
            t.nbytes
            for t in (model._hidden, model._normed, model._logits, model._rope._cos, model._rope._sin)
        )
        assert held < plan.memory.workspace_bytes
    assert torch.get_num_threads() == plan.threads


def test_the_input_is_never_the_output(runtime_dir, tmp_path):
    source = write_input(tmp_path, LINES[:2])
    before = source.read_bytes()
    with pytest.raises(RunError, match="is the input"):
        run_plan(runtime_dir, None, source, source)
    assert source.read_bytes() == before


def test_a_checkpoint_that_is_not_there(runtime_dir, tmp_path):
    source = write_input(tmp_path, LINES[:2])
    with pytest.raises(RunError, match="no such checkpoint folder") as caught:
        run_plan(runtime_dir, tmp_path / "absent", source, tmp_path / "o.jsonl")
    assert "--checkpoint" in caught.value.hint


def test_log_probabilities_as_the_api_has_them(checkpoint, runtime_dir, tmp_path):
    """The best token of a greedy answer is its token; texts, bytes and offsets give the answer's text."""
    lines = [
        completion("completion", "Once upon a time", logprobs=2),
        chat("chat", "Hello", logprobs=True, top_logprobs=3, temperature=0),
        chat("alone", "Hello", logprobs=True, temperature=0),
        completion("none", "Once upon a time"),
    ]
    output = tmp_path / "out.jsonl"
    run_plan(runtime_dir, checkpoint, write_input(tmp_path, lines), output)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    said, told, alone, none = (r["response"]["body"]["choices"][0] for r in records)
    scores = said["logprobs"]
    assert none["logprobs"] is None
    assert none["text"] == said["text"]
    assert len(scores["tokens"]) == records[0]["response"]["body"]["usage"]["completion_tokens"]
    for token, logprob, best in zip(
        scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True
    ):
        assert logprob == pytest.approx(max(best.values()))
        assert best[token] == pytest.approx(logprob)
    assert scores["text_offset"][0] == 0
    content = told["logprobs"]["content"]
    text = b"".join(bytes(entry["bytes"]) for entry in content)
    assert text.decode(errors="replace") == told["message"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [3] * len(content)
    assert [entry["top_logprobs"] for entry in alone["logprobs"]["content"]] == [[]] * len(content)
    assert all(entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"]) for entry in content)
