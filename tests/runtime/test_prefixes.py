"""Prompts that begin alike: their beginnings are computed once, and the answers are those without sharing."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.paged import PagedCache
from moeplan.runtime_min.plan_file import KV_BLOCK_TOKENS, load
from moeplan.runtime_min.prefixes import Prefixes
from moeplan.runtime_min.report import summary
from moeplan.runtime_min.run import run_plan
from moeplan.runtime_min.stream import Engine

from .architectures import MODELS, plan_of, save
from .folders import GREEDY, VOCAB, Shape, make_plan, save_checkpoint, write_plan
from .test_models import Model, check

NAMES = ("mixtral, window", "deepseek_v3", "gpt_oss", "llama4_text")  # windows, latents, sinks, chunks
WAYS: dict[str, dict[str, Any]] = {
    "all at once": {"sequences": 9, "micro_batch": 4},
    "some at a time": {"sequences": 3, "micro_batch": 2},
    "prompts in parts": {"sequences": 5, "micro_batch": 2, "pass_tokens": 30, "kv_tokens": 640},
}


def texts() -> list[list[int]]:
    """Beginnings of two blocks and more, of one block, of none; two equal prompts of whole blocks."""
    source = torch.Generator().manual_seed(11)

    def some(count: int) -> list[int]:
        found: list[int] = torch.randint(0, VOCAB, (count,), generator=source).tolist()
        return found

    start = some(70)
    branches = [start + some(20), start[:40] + some(9), start[:64], start[:64], start[:31] + some(40)]
    return [some(5), *branches, some(33), start + some(3), start[:65]]


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, save(folder, MODELS[request.param]), plan_of(folder)


def run(folder: Path, runtime_dir: Path) -> tuple[list[Generation], Engine]:
    batch = [Generation(text, 2 + at % 4, GREEDY, top_scored=1) for at, text in enumerate(texts())]
    with Engine(runtime_dir, load(runtime_dir), folder) as engine:
        engine.run(batch)
    return batch, engine


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_without_sharing(
    model: Model, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference, counted = model
    fitting = {"prompt_tokens": 96, "context_tokens": 112, "slots": 2}
    changes = fitting | {"pass_tokens": 96 * 9, "kv_tokens": 128 * 9} | WAYS[way]
    runtime_dir = write_plan(tmp_path, make_plan(Shape(), model=counted, **changes))
    batch, engine = run(folder, runtime_dir)
    monkeypatch.setattr(Prefixes, "find", lambda *_: [])
    alone, unshared = run(folder, runtime_dir)
    check(reference, batch)
    assert [g.tokens for g in batch] == [g.tokens for g in alone]
    both = zip(batch, alone, strict=True)
    assert all(abs(a.scored[0].logprob - b.scored[0].logprob) < 1e-4 for a, b in both)
    whole = sum(map(len, texts()))
    assert unshared.stats.prompt_tokens == whole
    assert engine.stats.prompt_tokens + engine.stats.shared_tokens == whole
    if way == "all at once":  # 32 of four, 64 of two: at least a token is read of each
        assert engine.stats.shared_tokens == 32 + 32 + 32 + 64 + 64
    assert engine.stats.shared_tokens > 0
    cache = engine.model.cache
    assert sorted(cache._free) == list(range(len(cache._holders)))
    assert not engine._prefixes._kept
    assert not engine._prefixes._keys


def test_what_is_found_is_there_in_time() -> None:
    """Sequences come and go at random, and read as passes do: a block found holds the prompt's own tokens,
    and whoever computes them has, or comes earlier in every pass."""
    source = random.Random(0)
    starts = [[source.randrange(3) for _ in range(200)] for _ in range(2)]
    cache, prefixes = PagedCache(1, 1, 2, 40 * KV_BLOCK_TOKENS, torch.float32), Prefixes()
    held: dict[int, tuple[Generation, list[int]]] = {}
    owner: dict[int, tuple[list[int], int, Generation]] = {}  # block -> tokens up to its end, place, sequence
    found = 0
    for _ in range(3000):
        place = source.randrange(8)
        if place not in held:
            prompt = source.choice(starts)[: source.randrange(1, 150)]
            if source.random() < 0.3:
                prompt = [*prompt, *(source.randrange(3) for _ in range(40))]
            generation = Generation(prompt, 3, GREEDY)
            if not cache.room([generation.most_tokens]):
                continue
            shared = prefixes.find(place, prompt)
            assert len(shared) * KV_BLOCK_TOKENS < len(prompt)
            for at, block in enumerate(shared):
                tokens, where, by = owner[block]
                assert tokens == prompt[: (at + 1) * KV_BLOCK_TOKENS]
                assert where < place or by.cached >= len(tokens)
            blocks = cache.take(place, generation.most_tokens, shared)
            assert len(set(blocks)) == len(blocks)
            for at, block in enumerate(blocks[len(shared) :], len(shared)):
                owner[block] = prompt[: (at + 1) * KV_BLOCK_TOKENS], place, generation
            prefixes.keep(place, generation, blocks)
            generation.cached = len(shared) * KV_BLOCK_TOKENS
            held[place], found = (generation, blocks), found + len(shared)
        elif held[place][0].cached >= len(held[place][0].prompt):
            prefixes.forget(cache.give_back(place))
            del held[place]
        room = 60
        for _, (generation, _) in sorted(held.items()):
            step = min(room, len(generation.prompt) - generation.cached)
            generation.cached, room = generation.cached + step, room - step
        assert set(cache._free).isdisjoint(block for _, blocks in held.values() for block in blocks)
    assert found > 100


def test_the_report_counts_them_and_a_resumed_run_answers_alike(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_checkpoint(folder, Shape())
    changes = {"prompt_tokens": 96, "context_tokens": 112, "pass_tokens": 400, "kv_tokens": 512}
    runtime_dir = write_plan(tmp_path, make_plan(Shape(), **changes))
    body = {"max_tokens": 4, "temperature": 0}
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": text, **body}}
        for i, text in enumerate([f"{'You are brief. ' * 5}Count to {i}" for i in range(6)])
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run_plan(runtime_dir, None, source, out)
    shared, read = report.stats.shared_tokens, report.stats.prompt_tokens
    assert shared == (3 + 1) * 64  # of waves of four and of two
    assert f"{shared:,} of {read + shared:,} prompt tokens" in summary(load(runtime_dir), report)
    whole = out.read_bytes()
    out.unlink()

    def stop(done: int, total: int, tokens: int) -> None:
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(runtime_dir, None, source, out, stop)
    assert run_plan(runtime_dir, None, source, out).resumed >= 3
    assert out.read_bytes() == whole
