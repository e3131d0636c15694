"""Disk, DRAM, cores: page after page of each layer over all tokens, while the next pages are read.

The text below the mark is part of the emitted schedule.py, word for word.
"""

from __future__ import annotations

from moeplan.planner.programs.order import FIXED, entry, fence, make_log, numbered, part, reads, task, writes

# --- emitted from here ---

LANES = ("compute", "disk")
OPS = ("embed", "read", "attention", "route", "experts", "head")
LANE, OP = numbered(*LANES), numbered(*OPS)
BARRIER_LAYER, BARRIER_TASK = 1, 2


def buffers(s):
    """One per slot, then the hidden states, the routing, the tokens."""
    return s.slots + 3


def room(s, decode, prefill):
    """An empty pass with room for the largest."""
    rows = 4 + s.slots + s.layers * (decode + prefill + 2 * s.pages + 1)
    return make_log(rows, 6 * rows)


@entry
def program(s, log, passes, decode, prefill, following):
    """Issue one pass of `decode` + `prefill` micro-batches; `following` says whether another comes at once.

    `passes` counts the passes, and the pages of all passes whose reading has been issued.
    """
    hidden, routing, tokens = s.slots, s.slots + 1, s.slots + 2
    moving = s.pages - s.resident
    page = passes[0] * s.layers * moving  # pages that move are numbered through all layers of all passes
    end = page + s.layers * moving
    if following > 0 and s.across:
        end += s.lead
    compute(s, log, OP.embed, FIXED.first, FIXED.first, FIXED.none, tokens, hidden)
    for layer in range(s.layers):
        for p in range(s.pages):
            slot = -1
            if p >= s.resident:
                slot = page % s.slots
                read_ahead(s, log, passes, page + s.lead + 1, end)
                page += 1
            if p > 0:
                compute(s, log, OP.experts, layer, p, slot, routing, hidden)
            else:
                for j in range(decode + prefill):
                    compute(s, log, OP.attention, layer, j, slot, hidden, hidden)
                compute(s, log, OP.route, layer, FIXED.first, FIXED.none, hidden, routing)
        if s.barrier == BARRIER_LAYER:
            fence(log)
    compute(s, log, OP.head, s.layers - 1, FIXED.first, FIXED.none, hidden, tokens)
    if s.barrier == BARRIER_LAYER:
        fence(log)
    passes[0] += 1


@part
def read_ahead(s, log, passes, wanted, end):
    """Issue the reading of all pages before `wanted`, and none from `end` on."""
    moving = s.pages - s.resident
    while passes[1] < wanted and passes[1] < end:
        layer, p = passes[1] // moving % s.layers, passes[1] % moving + s.resident
        task(log, OP.read, LANE.disk, layer, p, passes[1] % s.slots)
        writes(log, passes[1] % s.slots)
        passes[1] += 1
        if s.barrier == BARRIER_TASK:
            fence(log)


@part
def compute(s, log, op, layer, item, slot, source, target):
    """A task of the cores; out of the page in `slot` if there is one."""
    task(log, op, LANE.compute, layer, item, slot)
    reads(log, source)
    if slot >= 0:
        reads(log, slot)
    writes(log, target)
    if s.barrier == BARRIER_TASK:
        fence(log)
