"""From scores to the next token. Each request draws from its own generator, so its batch does not matter."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """Temperature 0 takes the best token; else the draw is from the smallest set of mass `top_p`."""

    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True)
class Scored:
    """The log-probability of a token, and the best (token, log-probability) of its place, best first."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]


def default_seed(custom_id: str) -> int:
    """A seed of 63 bits for a request that names none: the same for the same request."""
    digest = hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw(scores: Tensor, sampling: Sampling, source: torch.Generator) -> int:
    """One token from float32 scores [vocab]; takes exactly one number from `source`."""
    point = torch.rand((), generator=source)
    relative = (scores - scores.max()) / sampling.temperature  # at most 0, so no temperature overflows
    ordered, tokens = torch.softmax(relative, dim=-1).sort(descending=True, stable=True)
    mass = ordered.cumsum(0)
    kept = int(torch.count_nonzero(mass - ordered < sampling.top_p))
    place = int(torch.searchsorted(mass[:kept], point * mass[kept - 1], right=True))
    return int(tokens[min(place, kept - 1)])


def greedy(scores: Tensor) -> tuple[list[int], list[float]]:
    """The best token of each row of scores [N, vocab], and its score: NaN where any is."""
    values, tokens = scores.max(dim=-1)
    return tokens.tolist(), values.tolist()


def best_scored(scores: Tensor, token: int, top: int) -> Scored:
    """The log-probability of `token`, and the `top` best, of float32 scores [vocab] at temperature 1."""
    logprobs = torch.log_softmax(scores, dim=-1)
    best = logprobs.topk(min(top, len(scores)))
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Scored(token, float(logprobs[token]), pairs)
