"""The trained example model: the runtime's tokens and perplexity are those of the plain model."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import MixtralForCausalLM

from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.paged import prompt_batch
from moeplan.runtime_min.plan_file import load
from moeplan.runtime_min.stream import Engine, Pass

from .folders import GREEDY, Shape, in_memory, make_plan, write_plan

EXAMPLE = Path(__file__).parents[2] / "examples" / "tinymoe"
CHECKPOINT = EXAMPLE / "checkpoint"
WINDOW = 256  # tokens, the first of which is <s>

pytestmark = pytest.mark.skipif(not (CHECKPOINT / "model.safetensors").exists(), reason="no checkpoint")


@pytest.fixture(scope="module")
def shape() -> Shape:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        experts=config["num_local_experts"],
        top=config["num_experts_per_tok"],
        inner=config["intermediate_size"],
        vocab=config["vocab_size"],
        stored=torch.bfloat16,
    )


def test_tokens_equal_transformers(shape, tmp_path):
    """Greedy, in float32, in memory and streamed; prompts of the example's own file."""
    reference = MixtralForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    lines = (EXAMPLE / "prompts.jsonl").read_text().splitlines()
    bodies = [json.loads(line)["body"] for line in lines]
    texts = [body["prompt"] for body in bodies if "prompt" in body][:6]
    for name, changes in (("memory", in_memory(shape)), ("streamed", {"slots": 4, "experts_per_page": 2})):
        runtime_dir = write_plan(tmp_path / name, make_plan(shape, sequences=6, **changes))
        generations = [Generation(tokenizer.encode(text).ids, 24, GREEDY) for text in texts]
        with Engine(runtime_dir, load(runtime_dir), CHECKPOINT) as engine:
            engine.run(generations)
        for generation in generations:
            with torch.inference_mode():
                context = torch.tensor([[*generation.prompt, *generation.tokens[:-1]]])
                scores = reference(context).logits[0, len(generation.prompt) - 1 :]
            assert generation.tokens == scores.argmax(-1).tolist()


@torch.inference_mode()
def perplexity(engine: Engine, tokens: list[int], start: int) -> float:
    """Of all tokens, in windows that do not overlap, each begun with the start token."""
    nats = 0.0
    engine.model.cache.take(0, WINDOW)
    table = engine.model.cache.table(0)
    for first in range(0, len(tokens), WINDOW - 1):
        window = torch.tensor([start, *tokens[first : first + WINDOW - 1]])
        inputs = window[:-1]
        step = Pass(inputs, (prompt_batch(0, [(table, 0, len(inputs))]),), 0, torch.arange(len(inputs)))
        engine.execute(step, following=True)
        nats += F.cross_entropy(engine.model.logits.double(), window[1:], reduction="sum").item()
    return math.exp(nats / len(tokens))


@pytest.mark.skipif(not (EXAMPLE / "perplexity.json").exists(), reason="no recorded perplexity")
def test_held_out_perplexity_is_the_recorded_one(shape, tmp_path):
    """Recomputed with the runtime's own model code on streamed weights."""
    recorded = json.loads((EXAMPLE / "perplexity.json").read_text())["heldout.txt"]["perplexity"]
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    tokens = tokenizer.encode((EXAMPLE / "heldout.txt").read_text(), add_special_tokens=False).ids
    plan = make_plan(shape, sequences=WINDOW, prompt_tokens=WINDOW, context_tokens=WINDOW + 1)
    runtime_dir = write_plan(tmp_path, plan)
    with Engine(runtime_dir, load(runtime_dir), CHECKPOINT) as engine:
        found = perplexity(engine, tokens, tokenizer.token_to_id("<s>"))
    assert found == pytest.approx(recorded, rel=0.005)
