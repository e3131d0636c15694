"""The runtime says what transformers says, however the plan moves its weights."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FunctionType

import numba
import pytest
import torch
from transformers import MixtralForCausalLM

from moeplan.runtime_min.engine import Generation, pack
from moeplan.runtime_min.layers import round_rows
from moeplan.runtime_min.plan_file import RuntimePlan, load
from moeplan.runtime_min.stream import Engine

from .folders import GREEDY, VOCAB, Shape, in_memory, make_plan, save_checkpoint, write_plan

LENGTHS = (5, 48, 1, 7, 7, 30, 2)  # mixed, some equal, the longest the plan allows
NEW = 6

SHAPES = {
    "plain": Shape(),
    "odd sizes, sharded": Shape(hidden=37, inner=19, head_dim=6, heads=6, kv_heads=3, shard="20KB"),
    "three experts, one each": Shape(layers=3, experts=3, top=1, heads=3, kv_heads=1),
    "sixteen experts, four each": Shape(experts=16, top=4, hidden=16, inner=12),
    "no shared keys, tied": Shape(heads=4, kv_heads=4, head_dim=8, tied=True),
    "stored as bf16": Shape(stored=torch.bfloat16, hidden=33, inner=17),
    "stored as fp16": Shape(stored=torch.float16, top=3, experts=5),
}
PLANS = {
    "in memory": lambda shape: in_memory(shape),
    "all streamed": lambda shape: {"slots": 2},
    "one slot, pages of experts": lambda shape: {"slots": 1, "experts_per_page": 3},
    "half resident, many slots": lambda shape: {"resident_pages": 2, "slots": 7, "experts_per_page": 2},
}


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=source).tolist() for length in lengths]


def generate(
    engine: Engine, texts: Sequence[Sequence[int]], new: int = NEW
) -> list[tuple[list[int], torch.Tensor]]:
    """Greedy tokens of each prompt and the scores [new, vocab] they were taken from."""
    generations = [Generation(text, new, GREEDY) for text in texts]
    scores: list[torch.Tensor] = []
    engine.run(generations, after_pass=lambda: scores.append(engine.model.logits.clone()))
    batch = engine.plan.batch
    places = pack([len(text) for text in texts], {}, batch.sequences, batch.micro_batch)
    rows = {places.index(place): row for row, place in enumerate(sorted(places))}
    return [(g.tokens, torch.stack([s[rows[at]] for s in scores])) for at, g in enumerate(generations)]


def assert_same(
    reference: MixtralForCausalLM, text: Sequence[int], said: tuple[list[int], torch.Tensor]
) -> None:
    """Each token is the reference's best after those before it, by the same scores."""
    tokens, scores = said
    with torch.inference_mode():
        expected = reference(torch.tensor([[*text, *tokens[:-1]]])).logits[0, len(text) - 1 :]
    assert tokens == expected.argmax(-1).tolist()
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, MixtralForCausalLM]]:
    saved = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        folder = tmp_path_factory.mktemp(f"checkpoint{number}")
        saved[name] = folder, save_checkpoint(folder, shape, seed=number)
    return saved


@pytest.fixture
def engine_for(tmp_path: Path):
    """Open an engine on a plan written for it; closed after the test."""
    engines: list[Engine] = []

    def open_engine(checkpoint: Path, plan: RuntimePlan) -> Engine:
        runtime_dir = write_plan(tmp_path / str(len(engines)), plan)
        engines.append(Engine(runtime_dir, load(runtime_dir), checkpoint))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.__exit__(None, None, None)


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_scores_equal_transformers(shape, checkpoints, engine_for):
    """Every odd shape, seven sequences of mixed lengths, every way to hold the weights."""
    folder, reference = checkpoints[shape]
    texts = prompts(LENGTHS)
    for changes in PLANS.values():
        plan = make_plan(SHAPES[shape], sequences=7, micro_batch=3, **changes(SHAPES[shape]))
        for text, said in zip(texts, generate(engine_for(folder, plan), texts), strict=True):
            assert_same(reference, text, said)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_batch_size_does_not_matter(size, checkpoints, engine_for):
    """Several batches after another, the pages read ahead across the boundary."""
    folder, reference = checkpoints["plain"]
    texts = prompts(LENGTHS, seed=1)
    engine = engine_for(folder, make_plan(SHAPES["plain"], sequences=size, micro_batch=2))
    for start in range(0, len(texts), size):
        batch = texts[start : start + size]
        generations = [Generation(text, NEW, GREEDY) for text in batch]
        engine.run(generations)
        for generation in generations:
            expected = reference.generate(
                torch.tensor([generation.prompt]),
                attention_mask=torch.ones(1, len(generation.prompt), dtype=torch.int64),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
            )
            assert [*generation.prompt, *generation.tokens] == expected[0].tolist()


def test_sequences_leave_when_they_are_done(checkpoints, engine_for):
    """Different lengths of answers: those that go on keep their places in the cache."""
    folder, reference = checkpoints["plain"]
    texts = prompts(LENGTHS, seed=2)
    engine = engine_for(folder, make_plan(SHAPES["plain"], sequences=7, micro_batch=3))
    generations = [Generation(text, 1 + 5 * at % 7, GREEDY) for at, text in enumerate(texts)]
    done: list[Generation] = []
    engine.run(generations, done.append)
    assert sorted(map(id, done)) == sorted(map(id, generations))
    for generation in generations:
        assert generation.tokens == reference_tokens(reference, generation)
        assert len(generation.tokens) == generation.max_tokens
        assert generation.finish == "length"


def reference_tokens(reference: MixtralForCausalLM, generation: Generation) -> list[int]:
    """The reference's best token after each of the tokens before."""
    with torch.inference_mode():
        context = torch.tensor([[*generation.prompt, *generation.tokens[:-1]]])
        best: list[int] = reference(context).logits[0, len(generation.prompt) - 1 :].argmax(-1).tolist()
    return best


@pytest.mark.parametrize("pass_tokens", [7, 20, 48 * 3])
def test_sequences_enter_as_others_leave(pass_tokens, checkpoints, engine_for):
    """Three at a time of seven: prompts are read beside decoding, long ones in parts, and the answers are
    those of the sequences alone. The cache has room for two of the longest."""
    folder, reference = checkpoints["plain"]
    changes = {"pass_tokens": pass_tokens, "kv_tokens": 128, "slots": 2}
    engine = engine_for(folder, make_plan(SHAPES["plain"], sequences=3, micro_batch=2, **changes))
    texts = prompts(LENGTHS, seed=4)
    generations = [Generation(text, 2 + 5 * at % 7, GREEDY) for at, text in enumerate(texts)]
    under_way: list[int] = []
    left = iter(generations)
    engine.run(left, lambda g: under_way.append(sum(h.cached > 0 and not h.finish for h in generations)))
    assert all(g.tokens == reference_tokens(reference, g) for g in generations)
    assert all(len(g.tokens) == g.max_tokens for g in generations)
    assert max(under_way) >= 1  # others went on when one left
    stats = engine.stats
    assert stats.requests == len(texts)
    assert stats.prompt_tokens == sum(map(len, texts))
    assert stats.generated_tokens == sum(g.max_tokens for g in generations)
    assert stats.mixed_s > 0
    assert engine.model.cache.room([64] * 9) == 2  # all blocks came back


def test_log_probabilities_are_the_references(checkpoints, engine_for):
    folder, reference = checkpoints["plain"]
    [text] = prompts([9])
    generation = Generation(text, NEW, GREEDY, top_scored=3)
    engine_for(folder, make_plan(SHAPES["plain"])).run([generation])
    with torch.inference_mode():
        scores = reference(torch.tensor([[*text, *generation.tokens[:-1]]])).logits[0, len(text) - 1 :]
    for scored, token, expected in zip(
        generation.scored, generation.tokens, scores.log_softmax(-1), strict=True
    ):
        assert scored.token == token
        assert scored.logprob == pytest.approx(float(expected[token]), abs=1e-4)
        assert [t for t, _ in scored.best] == expected.topk(3).indices.tolist()
        assert [p for _, p in scored.best] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)


def test_scores_that_are_no_numbers_end_one_request(checkpoints, engine_for):
    """Its neighbours' answers are not touched."""
    folder, reference = checkpoints["plain"]
    engine = engine_for(folder, make_plan(SHAPES["plain"]))
    scores = engine.model.scores

    def poisoned(hidden: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        scores(hidden, rows, out)
        out[0, 5] = torch.nan

    engine.model.scores = poisoned
    generations = [Generation(text, 1, GREEDY) for text in prompts([9, 5])]
    engine.run(generations)
    assert [g.finish for g in generations] == ["invalid", "length"]
    assert generations[0].tokens == []
    assert generations[1].tokens == reference_tokens(reference, generations[1])


def test_an_end_token_stops(checkpoints, engine_for):
    folder, _ = checkpoints["plain"]
    engine = engine_for(folder, make_plan(SHAPES["plain"]))
    [(tokens, _)] = generate(engine, prompts([9]))
    generation = Generation(prompts([9])[0], NEW, GREEDY, ends=frozenset([tokens[2]]))
    engine.run([generation])
    assert generation.tokens == tokens[: tokens.index(tokens[2]) + 1]
    assert generation.finish == "stop"


def test_plain_python_schedule_gives_the_same_tokens(checkpoints, engine_for, monkeypatch):
    """Numba only makes the same loops faster."""
    folder, _ = checkpoints["plain"]
    texts = prompts(LENGTHS)[:4]
    plain = engine_for(folder, make_plan(SHAPES["plain"]))
    said = [tokens for tokens, _ in generate(plain, texts)]
    monkeypatch.setitem(sys.modules, "numba", numba)
    jitted = engine_for(folder, make_plan(SHAPES["plain"]))
    assert isinstance(plain.lanes._schedule.program, FunctionType)
    assert not isinstance(jitted.lanes._schedule.program, FunctionType)
    assert [tokens for tokens, _ in generate(jitted, texts)] == said


def test_every_pass_reads_each_streamed_page_once(checkpoints, engine_for):
    """Bytes read are those of the pages times the passes; a resident page is never read again."""
    folder, _ = checkpoints["plain"]
    engine = engine_for(folder, make_plan(SHAPES["plain"], resident_pages=2))
    generate(engine, prompts([5, 9]), new=4)
    pages = sum(layout.nbytes for layout in engine._pages._layouts.values())
    assert engine.disk.bytes_read == 4 * pages


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_near_float32(dtype, checkpoints, engine_for):
    """Scores of the first token; later ones follow different tokens where two are nearly equal."""
    folder, reference = checkpoints["plain"]
    engine = engine_for(folder, make_plan(SHAPES["plain"], compute_dtype=dtype))
    for text, (_, scores) in zip(prompts([5, 30]), generate(engine, prompts([5, 30])), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([text])).logits[0, -1]
        assert (scores[0] - expected).norm() < 0.05 * expected.norm()


def test_two_threads_give_the_same_tokens(checkpoints, engine_for):
    folder, reference = checkpoints["plain"]
    plan = replace(make_plan(SHAPES["plain"]), threads=2)
    text = prompts([12])[0]
    assert_same(reference, text, generate(engine_for(folder, plan), [text])[0])
    torch.set_num_threads(1)


def test_products_in_half_precision_have_few_row_counts():
    """Rounded up by less than a third beyond a few tiles, and never down."""
    counts = {rows: round_rows(rows) for rows in range(1, 1025)}
    assert all(rows <= rounded for rows, rounded in counts.items())
    assert all(rounded < 4 / 3 * rows for rows, rounded in counts.items() if rows > 48)
    assert len(set(counts.values())) == 24
