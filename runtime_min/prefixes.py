"""Which blocks of the KV cache hold the beginnings of prompts, so that equal ones are computed once.

Whole blocks only: no sequence writes into one that others read. Keys and values of a token depend on the
tokens up to it, so a block is found by the block before it and by its own tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.plan_file import KV_BLOCK_TOKENS

_Key = tuple[int, tuple[int, ...]]  # the block before, or -1, and the tokens


@dataclass(frozen=True, slots=True)
class _Kept:
    """A block that the sequence `by` at `place` computes, or has computed."""

    block: int
    place: int
    by: Generation


class Prefixes:
    """The blocks of prompts that are in the cache or will be before others read them."""

    def __init__(self) -> None:
        self._kept: dict[_Key, _Kept] = {}
        self._keys: dict[int, _Key] = {}

    def find(self, place: int, prompt: Sequence[int]) -> list[int]:
        """The blocks that a sequence entering at `place` need not compute; one token at least is left to it.

        A pass reads prompts in the order of places, so what an earlier place will have read is there in time.
        """
        found: list[int] = []
        for start in range(0, len(prompt) - KV_BLOCK_TOKENS, KV_BLOCK_TOKENS):
            end = start + KV_BLOCK_TOKENS
            kept = self._kept.get((found[-1] if found else -1, tuple(prompt[start:end])))
            if kept is None or not (kept.place < place or kept.by.cached >= end):
                break
            found.append(kept.block)
        return found

    def keep(self, place: int, by: Generation, blocks: Sequence[int]) -> None:
        """Let others find the whole blocks of the prompt of `by`, which lies in `blocks`."""
        before = -1
        for at, block in zip(range(len(by.prompt) // KV_BLOCK_TOKENS), blocks, strict=False):
            key = before, tuple(by.prompt[at * KV_BLOCK_TOKENS : (at + 1) * KV_BLOCK_TOKENS])
            if self._kept.setdefault(key, _Kept(block, place, by)).block != block:
                return  # others find that one
            self._keys[block] = key
            before = block

    def forget(self, blocks: Iterable[int]) -> None:
        """`blocks` are free."""
        for block in blocks:
            if block in self._keys:
                del self._kept[self._keys.pop(block)]
