"""Train tinymoe, a Mixtral-architecture language model of a few million parameters, or evaluate it."""

import argparse
import copy
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import split
from tokenization import BOS, EOS, encode, save_tokenizer, train_tokenizer, write_json
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

WINDOW = 256  # tokens, the first of which is <s>
EXCERPT = 4  # the held-out text to keep: the end of Pride and Prejudice
ROPE_THETA = 10_000.0


def new_model(tokenizer: Tokenizer, options: argparse.Namespace) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        router_aux_loss_coef=0.01,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        tie_word_embeddings=False,
    )
    return MixtralForCausalLM(config)


def add_dropout(model: nn.Module, share: float) -> None:
    """Mixtral has no residual dropout of its own."""

    def drop(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return F.dropout(output, share, module.training)

    for name, module in model.named_modules():
        if name.endswith((".embed_tokens", ".o_proj", ".mlp")):
            module.register_forward_hook(drop)


def optimizer_for(model: nn.Module, rate: float) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def schedule(step: int, steps: int, warm_up: int = 100) -> float:
    """A linear warm-up, and a cosine down to a fiftieth."""
    wave = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))
    return min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * wave)


def shuffled_batches(tokens: Tensor, bos: int, batch: int) -> tuple[Tensor, ...]:
    """The text in windows of <s> and 255 tokens, from a random offset and in random order."""
    tokens = tokens[int(torch.randint(WINDOW - 1, ())) :]
    rows = tokens[: len(tokens) // (WINDOW - 1) * (WINDOW - 1)].view(-1, WINDOW - 1)
    return F.pad(rows[torch.randperm(len(rows))], (1, 0), value=bos).split(batch)


def loss_of(model: MixtralForCausalLM, batch: Tensor) -> Tensor:
    """The model's own `loss` balances the experts over all layers together, which lets every layer
    use a few of its experts only; here each layer is balanced by itself."""
    config = model.config
    output = model(batch, output_router_logits=True, use_cache=False)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    for logits in output.router_logits:
        balance = load_balancing_loss_func((logits,), config.num_local_experts, config.num_experts_per_tok)
        loss = loss + config.router_aux_loss_coef * balance
    return loss


def train_epoch(
    model: MixtralForCausalLM,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batches: tuple[Tensor, ...],
) -> float:
    """The mean loss, with the router's share."""
    model.train()
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total += loss.item()
    return total / len(batches)


def train(options: argparse.Namespace) -> None:
    """Keeps the checkpoint of the epoch after which the held-out text was least surprising."""
    torch.manual_seed(options.seed)
    training, held_out = split(options.deb)
    options.excerpt.write_text(held_out[EXCERPT])
    tokenizer = train_tokenizer(training, options.vocabulary)
    tokens = encode(tokenizer, "".join(BOS + chapter + EOS for chapter in training))
    model = new_model(tokenizer, options)
    add_dropout(model, options.dropout)
    optimizer = optimizer_for(model, options.rate)
    steps = options.epochs * (len(tokens) // (WINDOW - 1) // options.batch + 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    print(
        f"{model.num_parameters():,} parameters, {len(tokens):,} training tokens, {steps} steps", flush=True
    )
    best, start = math.inf, time.monotonic()
    for epoch in range(1, options.epochs + 1):
        batches = shuffled_batches(tokens, model.config.bos_token_id, options.batch)
        loss = train_epoch(model, optimizer, scheduler, batches)
        result = evaluate(model, tokenizer, held_out)
        print(
            f"epoch {epoch}, {time.monotonic() - start:.0f} s, loss {loss:.3f}, held out {result}", flush=True
        )
        if result["perplexity"] < best:
            best = result["perplexity"]
            save(model, tokenizer, options.output)


def save(model: MixtralForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """The checkpoint in bfloat16, with the tensor names and the keys of the published Mixtral ones."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id
    )
    rounded.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    older_keys = {"rope_theta": ROPE_THETA, "torch_dtype": "bfloat16"}
    write_json(folder / "config.json", dict(sorted((config | older_keys).items())))
    save_tokenizer(tokenizer, model.config.max_position_embeddings, folder)


@torch.no_grad()
def negative_log_likelihood(model: MixtralForCausalLM, tokens: Tensor) -> tuple[float, Tensor]:
    """In nats, over all tokens; and how many tokens each expert of each layer had."""
    config, total = model.config, 0.0
    load = torch.zeros(config.num_hidden_layers, config.num_local_experts)
    for piece in tokens.split(WINDOW - 1):
        row = F.pad(piece, (1, 0), value=config.bos_token_id)
        output = model(row[None], output_router_logits=True, use_cache=False)
        total += F.cross_entropy(output.logits[0, :-1].double(), row[1:], reduction="sum").item()
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok).indices.flatten()
            load[layer] += torch.bincount(chosen, minlength=config.num_local_experts)
    return total, load


def evaluate(model: MixtralForCausalLM, tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    model.eval()
    token_lists = [encode(tokenizer, text) for text in texts]
    results = [negative_log_likelihood(model, tokens) for tokens in token_lists]
    nats, count = sum(nats for nats, _ in results), sum(map(len, token_lists))
    size = sum(len(text.encode()) for text in texts)
    load = torch.stack([load for _, load in results]).sum(0)
    shares = load / (count * model.config.num_experts_per_tok)
    return {
        "bytes": size,
        "tokens": count,
        "nats": round(nats, 2),
        "perplexity": round(math.exp(nats / count), 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
        "least_used_expert": [round(share, 3) for share in shares.amin(1).tolist()],
        "most_used_expert": [round(share, 3) for share in shares.amax(1).tolist()],
    }


def evaluate_files(options: argparse.Namespace) -> None:
    model = MixtralForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(options.checkpoint / "tokenizer.json"))
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "method": f"windows of {WINDOW} tokens that do not overlap, each of {BOS} and the text's next"
        f" {WINDOW - 1} tokens (the last may be shorter); all but {BOS} are predicted; weights in float32",
    }
    for path in options.text:
        texts = split(path)[1] if path.suffix == ".deb" else [path.read_text()]
        report[path.name] = evaluate(model, tokenizer, texts)
    print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="make a checkpoint")
    training.add_argument("deb", type=Path, help="the package, from `apt-get download r-cran-janeaustenr`")
    training.add_argument("output", type=Path, help="the checkpoint's folder")
    training.add_argument("excerpt", type=Path, help="a file for one of the held-out texts")
    for name, default in {
        "vocabulary": 2048, "hidden": 160, "intermediate": 192, "layers": 4, "heads": 4, "kv-heads": 2,
        "epochs": 8, "batch": 8, "seed": 1, "rate": 3e-3, "dropout": 0.1,
    }.items():  # fmt: skip
        training.add_argument(f"--{name}", type=type(default), default=default, help=f"{default}")
    training.set_defaults(run=train)
    evaluation = commands.add_parser("evaluate", help="print the perplexity of texts as JSON")
    evaluation.add_argument("checkpoint", type=Path)
    evaluation.add_argument(
        "text", type=Path, nargs="+", help="a text, or the package for its held-out parts"
    )
    evaluation.set_defaults(run=evaluate_files)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
