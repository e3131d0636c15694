"""Routed reading: decode reads what routing hit and what was guessed, nothing else, and says the same."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

from moeplan.planner.strategies.routed import entering_passes
from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.layers import Routing
from moeplan.runtime_min.limits import check_numbers
from moeplan.runtime_min.places import Places
from moeplan.runtime_min.plan_file import PlanFileError, load
from moeplan.runtime_min.stream import Engine

from .folders import GREEDY, VOCAB, Shape, make_plan, save_checkpoint, write_plan

SHAPE = Shape(layers=3, experts=16, top=2, hidden=32, inner=40)
NEW = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, MixtralForCausalLM]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, save_checkpoint(folder, SHAPE)


def run(tmp_path, folder, texts, **changes):
    """The generations, the pages read in decode passes by (layer, page), their bytes, and the engine."""
    plan = make_plan(SHAPE, **{"sequences": len(texts), "micro_batch": 2, **changes})
    runtime_dir = write_plan(tmp_path, plan)
    generations = [Generation(text, NEW, GREEDY) for text in texts]
    reads: list[tuple[int, int]] = []
    with Engine(runtime_dir, load(runtime_dir), folder) as engine:
        prefill = SHAPE.layers * (plan.pages.pages_per_layer - plan.pages.resident_pages)
        read = engine._read
        engine._read = lambda *at: (reads.append(at[:2]), read(*at))[1]
        engine.run(generations)
        everything = sum(engine._pages._layouts[at].nbytes for at in reads)
        assert engine.disk.bytes_read == everything
    return [g.tokens for g in generations], reads[prefill:], engine


def texts_of(count: int) -> list[list[int]]:
    source = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (4 + at,), generator=source).tolist() for at in range(count)]


def chosen(reference: MixtralForCausalLM, texts, tokens) -> Counter:
    """The pages that transformers' routing hits in the decode passes of the batch, each once a pass."""
    hit: Counter = Counter()
    each = []
    for text, said in zip(texts, tokens, strict=True):
        with torch.inference_mode():
            out = reference(torch.tensor([[*text, *said[:-1]]]), output_router_logits=True)
        each.append([layer[len(text) :].topk(SHAPE.top).indices for layer in out.router_logits])
    for step in range(NEW - 1):
        for layer in range(SHAPE.layers):
            hit.update({(layer, 1 + int(e)) for experts in each for e in experts[layer][step]})
    return hit


@pytest.mark.parametrize("resident", [0, 1, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_only_what_routing_hits_is_read(batch, resident, checkpoint, tmp_path):
    """Transformers says which experts those are."""
    folder, reference = checkpoint
    texts = texts_of(batch)
    tokens, reads, _ = run(tmp_path, folder, texts, routed=True, slots=3, resident_pages=resident)
    moving = {at: n for at, n in chosen(reference, texts, tokens).items() if at[1] >= resident}
    assert Counter(at for at in reads if at[1] > 0) == moving
    attention = {(layer, 0): NEW - 1 for layer in range(SHAPE.layers)} if resident == 0 else {}
    assert Counter(at for at in reads if at[1] == 0) == attention
    whole = (NEW - 1) * SHAPE.layers * (17 - resident)
    assert len(reads) < whole / 2


@pytest.mark.parametrize(("batch", "guesses"), [(1, 1), (1, 2), (3, 4)])
def test_a_wrong_guess_costs_its_page_and_a_right_one_nothing(batch, guesses, checkpoint, tmp_path):
    folder, reference = checkpoint
    texts = texts_of(batch)
    tokens, reads, engine = run(tmp_path, folder, texts, routed=True, slots=guesses + 1, guesses=guesses)
    counts, hit = engine.model.places.counts, chosen(reference, texts, tokens)
    experts = Counter(at for at in reads if at[1] > 0)
    assert hit <= experts
    assert counts.hit == hit.total()
    assert 0 < counts.right <= counts.guessed <= guesses * SHAPE.layers * (NEW - 1)
    assert experts.total() == counts.hit + counts.guessed - counts.right


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_tokens_are_those_of_whole_pages(batch, checkpoint, tmp_path):
    folder, _ = checkpoint
    texts = texts_of(batch)
    whole, every, _ = run(tmp_path / "whole", folder, texts, slots=4)
    for guesses in (0, 2):
        routed, reads, _ = run(tmp_path / str(guesses), folder, texts, routed=True, slots=4, guesses=guesses)
        assert routed == whole
        assert len(reads) < len(every)


def test_whole_layers_are_read_as_often_as_predicted(checkpoint, tmp_path):
    """Requests of any length end apart, and each prompt that enters makes its pass read whole layers: counted
    bytes are near those predicted, and far from those of passes that all prompts enter together."""
    source, sequences, count = random.Random(1), 4, 60
    lengths = [source.randint(2, 30) for _ in range(count)]
    plan = make_plan(SHAPE, routed=True, slots=3, sequences=sequences, micro_batch=2)
    runtime_dir = write_plan(tmp_path, plan)
    with Engine(runtime_dir, load(runtime_dir), checkpoint[0]) as engine:
        texts = ([source.randrange(VOCAB) for _ in range(4)] for _ in lengths)
        engine.run([Generation(text, n, GREEDY) for text, n in zip(texts, lengths, strict=True)])
        sizes = {at: layout.nbytes for at, layout in engine._pages._layouts.items()}
        counted = engine.disk.bytes_read
    mean = sum(lengths) / count
    decode = count / sequences * (mean - 1) + max(lengths) - mean
    entered = entering_passes(decode, sequences, mean)
    hit = 1 - (1 - SHAPE.top / SHAPE.experts) ** sequences
    whole = sum(sizes.values())
    routed = sum(size * (hit if page else 1) for (_, page), size in sizes.items())
    assert counted == pytest.approx(entered * whole + (decode - entered) * routed, rel=0.1)
    assert counted > 1.08 * (count / sequences * whole + decode * routed)


def routing(*experts: int) -> Routing:
    starts = [sum(e < at for e in experts) for at in range(SHAPE.experts + 1)]
    return Routing(torch.empty(0), torch.empty(0), starts)


def test_right_guesses_are_used_and_the_others_fetched():
    places = Places(make_plan(SHAPE, sequences=2, routed=True, guesses=2, slots=4))
    places.expect(1, torch.tensor([[0.6, 0.4], [0.7, 0.3]]), torch.tensor([[7, 2], [2, 9]]))
    assert [places.guess(1, p) for p in (1, 2)] == [3, 8]  # expert 2 has 1.1 in all, 7 has 0.6, 9 has 0.3
    assert [places.guess(0, p) for p in (1, 2)] == [0, 0]
    places.place(1, routing(4, 7, 9))
    assert places.pages == [0, 8, 5, 10, 0, 0]
    places.place(1, routing(7, 2))
    assert places.pages == [3, 8, 0, 0, 0, 0]


def test_resident_pages_are_neither_guessed_nor_placed():
    places = Places(make_plan(SHAPE, sequences=1, routed=True, guesses=1, slots=4, resident_pages=4))
    places.expect(0, torch.tensor([[0.9, 0.1]]), torch.tensor([[2, 3]]))
    assert places.guess(0, 1) == 4
    places.place(0, routing(0, 2))
    assert places.pages == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"places": 3}, "places do not hold the pages that a batch can hit"),
        ({"routed": True, "guesses": 3, "slots": 3}, "guesses are more than places or slots"),
        ({"guesses": 1}, "guesses are more than places or slots"),
    ],
)
def test_plans_that_cannot_be_executed(tmp_path, changes, message):
    with pytest.raises(PlanFileError, match=message):
        check_numbers(tmp_path, make_plan(SHAPE, **changes))
