"""Disk, DRAM, cores: page after page of each layer over all tokens, while the next pages are read.

A routed schedule reads all pages in passes with prefill. In a pass of decode alone, each layer has
`places` for the pages that routing will hit, and before them one for each of `guesses`: likely pages are read
there while the layer before is computed, and once the layer is routed, the others into the places. (Not over
wrong guesses: several threads read, so that the two would be under way together.) Guesses follow the layer
before's own reads, so that they delay none of them. Source: Eliseev and Mazur, Fast Inference of
Mixture-of-Experts Language Models with Offloading (2023), section 3.2: a layer's hidden states, given to the
next layer's router, tell most of the experts that it will choose.

The text below the mark is part of the emitted schedule.py, word for word.
"""

from __future__ import annotations

from moeplan.planner.programs.order import FIXED, entry, fence, make_log, numbered, part, reads, task, writes

# --- emitted from here ---

LANES = ("compute", "disk")
OPS = ("embed", "read", "attention", "route", "experts", "head", "expect", "guess", "place", "fetch", "hit")
LANE, OP = numbered(*LANES), numbered(*OPS)
BARRIER_LAYER, BARRIER_TASK = 1, 2
# Buffers behind the slots. The guesses for even and for odd layers are held apart.
STATE = numbered("hidden", "routing", "tokens", "placed", "likely", "likely_odd")


def buffers(s):
    """One per slot, then STATE."""
    return s.slots + 6


def room(s, decode, prefill):
    """An empty pass with room for the largest."""
    rows = 4 + s.slots + s.layers * (decode + prefill + 2 * s.pages + 2 * (s.places + s.guesses) + 5)
    return make_log(rows, 6 * rows)


@entry
def program(s, log, passes, decode, prefill, following):
    """Issue one pass of `decode` + `prefill` micro-batches; `following` says whether another comes at once.

    `passes` has the place in the ring of slots at which the pass begins, and how many of its pages have been
    read ahead.
    """
    compute(s, log, OP.embed, FIXED.first, FIXED.first, FIXED.none, s.slots + STATE.tokens, s.slots)
    if s.places > 0 and prefill == 0:
        routed_layers(s, log, passes, decode, following)
    else:
        whole_layers(s, log, passes, decode + prefill, following)
    compute(s, log, OP.head, s.layers - 1, FIXED.first, FIXED.none, s.slots, s.slots + STATE.tokens)
    if s.barrier == BARRIER_LAYER:
        fence(log)


@part
def whole_layers(s, log, passes, micro_batches, following):
    """All pages of all layers."""
    page = 0  # pages that move are numbered through all layers
    end = s.layers * (s.pages - s.resident)
    total = end
    if following > 0 and s.across:
        end += ahead(s)
    for layer in range(s.layers):
        for p in range(s.pages):
            slot = -1
            if p >= s.resident:
                slot = (passes[0] + page) % s.slots
                read_ahead(s, log, passes, page + s.lead + 1, end)
                page += 1
            if p == 0:
                attend(s, log, layer, micro_batches, slot)
            else:
                compute(s, log, OP.experts, layer, p, slot, s.slots + STATE.routing, s.slots)
        if s.barrier == BARRIER_LAYER:
            fence(log)
    passes[0] += total
    passes[1] -= total


@part
def ahead(s):
    """Pages of the next pass that may be read in this one: whether it is routed is not known yet."""
    if s.places > 0:
        return min(s.lead, max(0, 1 - s.resident))
    return s.lead


@part
def attend(s, log, layer, micro_batches, slot):
    """A layer's attention and routing, out of the page in `slot`."""
    for j in range(micro_batches):
        compute(s, log, OP.attention, layer, j, slot, s.slots, s.slots)
    compute(s, log, OP.route, layer, FIXED.first, FIXED.none, s.slots, s.slots + STATE.routing)


@part
def read_ahead(s, log, passes, wanted, end):
    """Issue the reading of all pages before `wanted`, and none from `end` on."""
    moving = s.pages - s.resident
    while passes[1] < wanted and passes[1] < end:
        layer, p = passes[1] // moving % s.layers, passes[1] % moving + s.resident
        fill(s, log, OP.read, layer, p, passes[0] + passes[1], FIXED.none)
        passes[1] += 1


@part
def routed_layers(s, log, passes, micro_batches, following):
    """The pages that routing hits, and that of attention."""
    at = passes[0]  # the next place in the ring
    moving = max(0, 1 - s.resident)  # pages of attention per layer
    if moving > passes[1]:
        fill(s, log, OP.read, FIXED.first, FIXED.first, at, FIXED.none)
    passes[1] = 0
    expect(s, log, FIXED.first)
    guess(s, log, FIXED.first, at + moving)
    for layer in range(s.layers):
        attend(s, log, layer, micro_batches, at % s.slots if moving else -1)
        at += moving
        route_places(s, log, layer)
        for p in range(1, s.resident):
            compute(s, log, OP.experts, layer, p, FIXED.none, s.slots + STATE.routing, s.slots)
        for p in range(1, s.guesses + s.places + 1):
            use_place(s, log, layer, p, at)
            at += 1
        last = layer + 1 == s.layers
        if moving and (not last or following * s.across * s.lead > 0):
            fill(s, log, OP.read, (layer + 1) % s.layers, FIXED.first, at, FIXED.none)
            passes[1] = 1 if last else 0
        if not last:
            guess(s, log, layer + 1, at + moving)
        if s.barrier == BARRIER_LAYER:
            fence(log)
    passes[0] = at


@part
def route_places(s, log, layer):
    """The pages that are hit get their places; then the next layer's are guessed."""
    task(log, OP.place, LANE.compute, layer, FIXED.first, FIXED.none)
    reads(log, s.slots + STATE.routing)
    if s.guesses > 0:
        reads(log, s.slots + STATE.likely + layer % 2)
    writes(log, s.slots + STATE.placed)
    if s.barrier == BARRIER_TASK:
        fence(log)
    if layer + 1 < s.layers:
        expect(s, log, layer + 1)


@part
def expect(s, log, layer):
    """Which pages the hidden states at hand make likely for `layer`."""
    if s.guesses > 0:
        likely = s.slots + STATE.likely + layer % 2
        compute(s, log, OP.expect, layer, FIXED.first, FIXED.none, s.slots, likely)


@part
def guess(s, log, layer, at):
    """Read those."""
    for p in range(1, s.guesses + 1):
        fill(s, log, OP.guess, layer, p, at + p - 1, s.slots + STATE.likely + layer % 2)


@part
def use_place(s, log, layer, p, at):
    """Read the page of place `p`, unless it is a guess's; compute with it if it is hit."""
    placed, slot = s.slots + STATE.placed, at % s.slots
    if p > s.guesses:
        fill(s, log, OP.fetch, layer, p, at, placed)
    task(log, OP.hit, LANE.compute, layer, p, slot)
    reads(log, s.slots + STATE.routing)
    reads(log, placed)
    reads(log, slot)
    writes(log, s.slots)
    if s.barrier == BARRIER_TASK:
        fence(log)


@part
def fill(s, log, op, layer, item, at, source):
    """A task of the disk, which reads into the slot of place `at` in the ring; what, `source` says if any."""
    slot = at % s.slots
    task(log, op, LANE.disk, layer, item, slot)
    if source >= 0:
        reads(log, source)
    writes(log, slot)
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
