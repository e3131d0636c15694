"""GPU, link, CPU, disk: attention and experts shared by GPU and CPU, weights in pages, over all
micro-batches.

With its parameters the same loops give MoE-Lightning's CGOPipe, FlexGen's schedules, and better ones. The
text below the mark is part of the emitted schedule.py, word for word.
Source: MoE-Lightning (ASPLOS'25), Algorithm 1, its index slips corrected, and Figure 6.
"""

from __future__ import annotations

from moeplan.planner.programs.order import FIXED, entry, fence, make_log, numbered, part, reads, task, writes

# --- emitted from here ---

LANES = ("gpu", "h2d", "d2h", "cpu", "copier", "disk")
OPS = (
    "embed",
    "stage_page",
    "read_page",
    "copy_page",
    "pre_attention",
    "offload_qkv",
    "cpu_attention",
    "load_hidden",
    "load_kv",
    "gpu_attention",
    "store_kv",
    "post_attention",
    "offload_routed",
    "cpu_experts",
    "load_partial",
    "head",
    "load_piece",
    "prefill_layer",
    "store_piece",
    "store_piece_kv",
    "offload_piece",
    "piece_experts",
    "piece_partial",
    "piece_head",
)
LANE, OP = numbered(*LANES), numbered(*OPS)
BARRIER_BATCH, BARRIER_TASK = 1, 2
ACROSS_PAGES, ACROSS_ATTENTION = 1, 2

# Buffers: the pinned pages, two layers' weight pages on the GPU, and then these: one a micro-batch,
MINE = numbered(
    "token",
    "hidden",
    "qkv",
    "qkv_pin",
    "attended_pin",
    "attended",
    "routed",
    "routed_pin",
    "partial_pin",
    "partial",
    "kv",
)
# one a piece of prefill,
PIECE = numbered("parked", "routed_pin", "partial_pin")
# and two of these, used in turn. What is new is of the sequences that a pass prefills.
PAIR = numbered(
    "new_token", "new_kv", "kv_in", "kv_out", "piece_in", "piece_out", "piece_routed", "piece_added"
)


def buffers(s):
    """How many buffers there are."""
    mine = len(MINE) * s.micro_batches
    return s.slots + 2 * s.pages + mine + len(PIECE) * s.pieces + 2 * len(PAIR)


@part
def weights(s, half, page):
    return s.slots + half * s.pages + page


@part
def mine(s, group, j):
    """The buffer of micro-batch j."""
    return s.slots + 2 * s.pages + group * s.micro_batches + j


@part
def piece(s, group, q):
    """The buffer of piece q; where there are more than planned, some share one."""
    return mine(s, len(MINE), 0) + group * s.pieces + q % s.pieces


@part
def pair(s, group, number):
    return piece(s, len(PIECE), 0) + 2 * group + number % 2


def room(s, decode, prefill):
    """An empty pass with room for the largest."""
    rows = 2 * (s.pages + s.lead) + 14 * (decode + s.lookahead) + 2 * prefill
    rows += s.layers * (9 * decode + 8 * prefill + 2 * s.pages)
    return make_log(rows, 6 * rows + s.layers * (decode + prefill) * (s.pages + 2))


@part
def begin(s, log, op, lane, layer, item, slot):
    """A task; where every task is a barrier, after all before it."""
    if s.barrier == BARRIER_TASK and log[0, 0] > 0:
        fence(log)
    task(log, op, lane, layer, item, slot)


# Weight pages form one endless stream through all layers of all passes.


@part
def stage(s, log, page):
    """From host memory or disk to a pinned slot."""
    if s.slots == 0:
        return
    p = page % s.pages
    if p >= s.pages - s.disk_pages:
        begin(s, log, OP.read_page, LANE.disk, page // s.pages % s.layers, p, page % s.slots)
    else:
        begin(s, log, OP.stage_page, LANE.copier, page // s.pages % s.layers, p, page % s.slots)
    writes(log, page % s.slots)


@part
def copy(s, log, page):
    """From the pinned slot to the GPU's weight buffer of the page's layer."""
    half = page // s.pages % 2
    begin(s, log, OP.copy_page, LANE.h2d, page // s.pages % s.layers, page % s.pages, half)
    if s.slots > 0:
        reads(log, page % s.slots)
    writes(log, weights(s, half, page % s.pages))


@part
def stage_ahead(s, log, page, last):
    """Stage a page that is copied later: none that only the next pass moves."""
    if s.across >= ACROSS_PAGES or page < (last + 1) * s.pages:
        stage(s, log, page)


@part
def fill(s, log, layer, last):
    """All pages of the stream's layer `layer`, and the staging lead of the next."""
    if s.pages == 0:
        return
    first = layer * s.pages
    for page in range(first, first + s.pages):
        stage(s, log, page)
        copy(s, log, page)
    for page in range(first + s.pages, first + s.pages + s.lead):
        stage_ahead(s, log, page, last)


@part
def advance(s, log, layer, last, j, places):
    """At place j of `places` of the stream's layer `layer`: the next layer's share of pages, spread or all at
    once. No page is moved for a layer after `last`."""
    first, end = (j * s.pages + places - 1) // places, ((j + 1) * s.pages + places - 1) // places
    if not s.interleave:
        first, end = 0, s.pages if j == 0 else 0
    for p in range(first, end):
        page = (layer + 1) * s.pages + p
        if layer < last:
            copy(s, log, page)
        stage_ahead(s, log, page + s.lead, last)


@part
def reads_weights(s, log, layer):
    for p in range(s.pages):
        reads(log, weights(s, layer % 2, p))


# Decode: one token of every sequence.


@part
def attend(s, log, layer, j, passes):
    """Attention of micro-batch j on the CPU, which may run ahead of the experts."""
    if j >= s.cpu_attended:
        return
    take(s, log, layer, j, passes)
    begin(s, log, OP.pre_attention, LANE.gpu, layer, j, FIXED.none)
    reads_hidden(s, log, layer, j)
    writes(log, mine(s, MINE.qkv, j))
    begin(s, log, OP.offload_qkv, LANE.d2h, layer, j, FIXED.none)
    reads(log, mine(s, MINE.qkv, j))
    writes(log, mine(s, MINE.qkv_pin, j))
    begin(s, log, OP.cpu_attention, LANE.cpu, layer, j, FIXED.none)
    reads(log, mine(s, MINE.qkv_pin, j))
    reads(log, pair(s, PAIR.new_kv, passes[0] + 1))
    writes(log, mine(s, MINE.attended_pin, j))
    writes(log, mine(s, MINE.kv, j))


@part
def load_kv(s, log, layer, j, passes):
    """Copy up the cache of micro-batch j, if it attends over a copy and none is loaded ahead: there are two
    places for copies, used in turn."""
    if s.cpu_attended <= j and j < s.cpu_attended + s.copied_up and passes[2] == passes[3]:
        begin(s, log, OP.load_kv, LANE.h2d, layer, j, passes[2] % 2)
        reads(log, mine(s, MINE.kv, j))
        reads(log, pair(s, PAIR.new_kv, passes[0] + 1))
        writes(log, pair(s, PAIR.kv_in, passes[2]))
        passes[2] += 1


@part
def load_next_kv(s, log, layer, j, decode, passes):
    """After micro-batch j: the cache of the next that attends over a copy, in this layer or the one after."""
    last = s.cpu_attended + s.copied_up - 1 if s.cpu_attended + s.copied_up < decode else decode - 1
    if j < last:
        load_kv(s, log, layer, j + 1, passes)
    elif j == last and s.cpu_attended < decode and s.wrap and layer + 1 < s.layers:
        load_kv(s, log, layer + 1, s.cpu_attended, passes)


@part
def take(s, log, layer, j, passes):
    """The hidden states that attention begins with: of new tokens, or of the layer before and all its
    experts."""
    if layer == 0:
        begin(s, log, OP.embed, LANE.gpu, FIXED.first, j, FIXED.none)
        reads(log, mine(s, MINE.token, j))
        reads(log, pair(s, PAIR.new_token, passes[0] + 1))
        writes(log, mine(s, MINE.hidden, j))
    elif s.decode_cpu_experts:
        load_partial(s, log, layer - 1, j)


@part
def finish_attention(s, log, layer, j, passes):
    """Attention of micro-batch j to where the experts need it: its output from the CPU, or itself on the
    GPU."""
    if j < s.cpu_attended:
        begin(s, log, OP.load_hidden, LANE.h2d, layer, j, FIXED.none)
        reads(log, mine(s, MINE.attended_pin, j))
        writes(log, mine(s, MINE.attended, j))
        return
    take(s, log, layer, j, passes)
    copied = j < s.cpu_attended + s.copied_up
    load_kv(s, log, layer, j, passes)
    turn = passes[3]
    begin(s, log, OP.gpu_attention, LANE.gpu, layer, j, turn % 2 if copied else -1)
    reads_hidden(s, log, layer, j)
    if copied:
        reads(log, pair(s, PAIR.kv_in, turn))
        writes(log, pair(s, PAIR.kv_out, turn))
    writes(log, mine(s, MINE.attended, j))
    if copied:
        begin(s, log, OP.store_kv, LANE.d2h, layer, j, turn % 2)
        reads(log, pair(s, PAIR.kv_out, turn))
        writes(log, mine(s, MINE.kv, j))
        passes[3] += 1


@part
def reads_hidden(s, log, layer, j):
    """The hidden states of micro-batch j, with what the CPU's experts of the layer before add."""
    reads(log, mine(s, MINE.hidden, j))
    if s.decode_cpu_experts and layer > 0:
        reads(log, mine(s, MINE.partial, j))
        writes(log, mine(s, MINE.hidden, j))


@part
def load_partial(s, log, layer, j):
    """What the CPU's experts add, to the GPU: as late as possible, because the link is in order."""
    begin(s, log, OP.load_partial, LANE.h2d, layer, j, FIXED.none)
    reads(log, mine(s, MINE.partial_pin, j))
    writes(log, mine(s, MINE.partial, j))


@part
def post_attention(s, log, layer, j, stream_layer):
    """Output projection, router and experts of micro-batch j; the CPU's experts beside them."""
    begin(s, log, OP.post_attention, LANE.gpu, layer, j, stream_layer % 2)
    reads(log, mine(s, MINE.attended, j))
    reads_weights(s, log, stream_layer)
    writes(log, mine(s, MINE.hidden, j))
    if s.decode_cpu_experts:
        writes(log, mine(s, MINE.routed, j))
        begin(s, log, OP.offload_routed, LANE.d2h, layer, j, FIXED.none)
        reads(log, mine(s, MINE.routed, j))
        writes(log, mine(s, MINE.routed_pin, j))
        begin(s, log, OP.cpu_experts, LANE.cpu, layer, j, FIXED.none)
        reads(log, mine(s, MINE.routed_pin, j))
        writes(log, mine(s, MINE.partial_pin, j))


@part
def head(s, log, j):
    """LM head and sampling of micro-batch j."""
    if s.decode_cpu_experts:
        load_partial(s, log, s.layers - 1, j)
    begin(s, log, OP.head, LANE.gpu, s.layers - 1, j, FIXED.none)
    reads_hidden(s, log, s.layers, j)
    writes(log, mine(s, MINE.token, j))


# Prefill: the prompts of new sequences, in pieces whose hidden states wait on the host.


@part
def prefill_piece(s, log, layer, q, stream_layer, pieces, passes):
    """One layer over piece q; its keys and values go to the host unless all stay on the GPU."""
    turn = layer * pieces + q
    if layer == 0:
        begin(s, log, OP.embed, LANE.gpu, FIXED.first, s.micro_batches + q, turn % 2)
    else:
        begin(s, log, OP.load_piece, LANE.h2d, layer, q, turn % 2)
        reads(log, piece(s, PIECE.parked, q))
    writes(log, pair(s, PAIR.piece_in, turn))
    if s.prefill_cpu_experts and layer > 0:
        piece_partial(s, log, layer - 1, q, turn)
    begin(s, log, OP.prefill_layer, LANE.gpu, layer, q, turn % 2)
    reads(log, pair(s, PAIR.piece_in, turn))
    if s.prefill_cpu_experts and layer > 0:
        reads(log, pair(s, PAIR.piece_added, turn))
    reads_weights(s, log, stream_layer)
    writes(log, pair(s, PAIR.piece_out, turn))
    stored = s.cpu_attended + s.copied_up > 0
    if stored:
        writes(log, pair(s, PAIR.kv_out, turn))
    if s.prefill_cpu_experts:
        writes(log, pair(s, PAIR.piece_routed, turn))
        begin(s, log, OP.offload_piece, LANE.d2h, layer, q, turn % 2)
        reads(log, pair(s, PAIR.piece_routed, turn))
        writes(log, piece(s, PIECE.routed_pin, q))
        begin(s, log, OP.piece_experts, LANE.cpu, layer, q, FIXED.none)
        reads(log, piece(s, PIECE.routed_pin, q))
        writes(log, piece(s, PIECE.partial_pin, q))
    begin(s, log, OP.store_piece, LANE.d2h, layer, q, turn % 2)
    reads(log, pair(s, PAIR.piece_out, turn))
    writes(log, piece(s, PIECE.parked, q))
    if stored:
        begin(s, log, OP.store_piece_kv, LANE.d2h, layer, q, turn % 2)
        reads(log, pair(s, PAIR.kv_out, turn))
        writes(log, pair(s, PAIR.new_kv, passes[0]))


@part
def piece_partial(s, log, layer, q, turn):
    begin(s, log, OP.piece_partial, LANE.h2d, layer, q, turn % 2)
    reads(log, piece(s, PIECE.partial_pin, q))
    writes(log, pair(s, PAIR.piece_added, turn))


@part
def piece_head(s, log, q, pieces, passes):
    """LM head and sampling of the sequences of piece q."""
    turn = s.layers * pieces + q
    begin(s, log, OP.load_piece, LANE.h2d, s.layers, q, turn % 2)
    reads(log, piece(s, PIECE.parked, q))
    writes(log, pair(s, PAIR.piece_in, turn))
    if s.prefill_cpu_experts:
        piece_partial(s, log, s.layers - 1, q, turn)
    begin(s, log, OP.piece_head, LANE.gpu, s.layers - 1, q, turn % 2)
    reads(log, pair(s, PAIR.piece_in, turn))
    if s.prefill_cpu_experts:
        reads(log, pair(s, PAIR.piece_added, turn))
    writes(log, pair(s, PAIR.new_token, passes[0]))


# A pass.


@entry
def program(s, log, passes, decode, prefill, following):
    """Issue one pass over `decode` micro-batches and `prefill` pieces, in every layer the former first.

    `following` micro-batches decode in the pass that comes next, 0 if that is not known to come. `passes`
    counts the passes, the micro-batches of the next whose first attention has been issued, and the copies of
    caches that were loaded and used.
    """
    first = passes[0] * s.layers  # the pass's first layer in the endless stream
    last = first + s.layers - (0 if s.across >= ACROSS_PAGES else 1)
    if passes[0] == 0 or s.across < ACROSS_PAGES:
        fill(s, log, first, last)
    ahead = s.lookahead if s.lookahead < decode else decode - 1
    started = passes[1]
    passes[1] = 0
    for j in range(started, ahead):
        attend(s, log, FIXED.first, j, passes)
    places = decode if decode > prefill else prefill
    for layer in range(s.layers):
        if layer > 0 and not s.wrap:
            for j in range(ahead):
                attend(s, log, layer, j, passes)
        for j in range(places):
            if j < decode:
                if ahead == 0 and (layer > 0 or j >= started):
                    attend(s, log, layer, j, passes)
                finish_attention(s, log, layer, j, passes)
            advance(s, log, first + layer, last, j, places)
            if j < decode:
                post_attention(s, log, layer, j, first + layer)
                if ahead > 0:
                    load_next_kv(s, log, layer, j, decode, passes)
                    if layer > 0 or j + ahead >= started:
                        attend_ahead(s, log, layer, j + ahead, decode, following, passes)
            if j < prefill:
                prefill_piece(s, log, layer, j, first + layer, prefill, passes)
            if s.barrier == BARRIER_BATCH:
                fence(log)
    for j in range(passes[1], decode):
        head(s, log, j)
    for q in range(prefill):
        piece_head(s, log, q, prefill, passes)
    passes[0] += 1


@part
def attend_ahead(s, log, layer, j, decode, following, passes):
    """Attention of micro-batch j; past the last micro-batch that of the next layer, or of the next pass."""
    if j < decode:
        attend(s, log, layer, j, passes)
    elif layer + 1 < s.layers:
        if s.wrap:
            attend(s, log, layer + 1, j - decode, passes)
    elif s.across >= ACROSS_ATTENTION and j - decode < s.lookahead and j - decode < following - 1:
        head(s, log, j - decode)
        passes[0] += 1
        attend(s, log, FIXED.first, j - decode, passes)
        passes[0] -= 1
        passes[1] += 1
