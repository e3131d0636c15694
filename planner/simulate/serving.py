"""Requests, engines -> when each request has its tokens: continuous batching, event by event.

An engine runs steps, one after the other. Every step takes each running sequence one token further; where
prompts wait, it also takes as many of their tokens, first come first served, as its budget of tokens, its
places and its cache memory hold. A prompt may be spread over several steps; in the last of them its request
gets a first token and runs. As in vLLM (v1 scheduler, chunked prefill); unlike it, cache is set aside for
prompt and half the output when a request is admitted, its mean over the run, and no request is preempted.
A request goes to the engine with the fewest requests that are not finished, of equals the first.

Steps without prompts are taken many at a time, up to the next event: the end of a sequence or an arrival.

Importing this module imports Numba; the kernels are compiled at their first call and kept in its cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moeplan.planner.ir.attainment import ServingLaw

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_LONGEST_LEG = 128  # steps taken at once: their time is that of the middle one
_GAPS_KEPT = 256  # of each engine, longest first

# Columns of requests, ints: sizes, the next that waits, the step of the first token.
_PROMPT, _OUTPUT, _AFTER, _SINCE = range(4)
# Floats: what comes in, the time of the first token's step, what comes out.
_ARRIVAL, _PREFILL, _OWN, _CACHE, _SINCE_S, _TTFT, _ITL, _GAP, _FINISH = range(9)
# Columns of engines, ints: requests that wait or run, sequences that run, tokens in their caches, steps
# taken, the table's segment of contexts last looked up; steps of the leg under way, how many requests end
# their prefill in it; first and last that wait, how much of the first is prefilled; how many gaps are kept.
# And how many of its requests were late.
_LOAD, _RUNNING, _CONTEXT, _STEPS, _SEGMENT, _LENGTH, _ENTERING, _FIRST, _LAST, _DONE, _GAPS, _LATE = range(
    12
)
# Floats: bytes of cache set aside, seconds in which it steps, the same times the sequences that run; of the
# leg under way: begin, end (infinite where there is none), seconds of each step, the same without prefill.
_HELD, _BUSY, _OCCUPIED, _BEGIN, _END, _STEP, _DECODE = range(7)
# Columns of sequences: a heap by the step in which each ends (when, which request); who enters in this leg.
_WHEN, _WHO, _ENTERED = range(3)
# Of what an engine may hold; of when the simulation may end early.
_SEQUENCES, _STEP_TOKENS, _MEMORY, _FIRST_STEPS, _TTFT_SLO, _ITL_SLO, _MOST_LATE = range(7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """By request, [n]: seconds to the first token, mean seconds between tokens (0 for a single token), the
    longest, when the last token left. By engine: seconds in which it steps, and sequence-seconds."""

    ttft_s: Floats
    itl_s: Floats
    gap_s: Floats
    finish_s: Floats
    busy_s: Floats  # [engines]
    occupied_s: Floats


def serve(
    arrival_s: Floats, prompt_tokens: Ints, output_tokens: Ints, law: ServingLaw, engines: int
) -> Served:
    """Serve requests [n] that arrive at `arrival_s`, sorted, on `engines` equal engines.

    Raises ValueError where arrivals are not sorted, sizes are below 1, there is no engine, or a request's
    cache alone exceeds an engine's memory.
    """
    times, clocks, _ = _run(arrival_s, prompt_tokens, output_tokens, law, engines, (np.inf,) * 3)
    ttft, itl, gap, finish = (times[:, column].copy() for column in (_TTFT, _ITL, _GAP, _FINISH))
    busy, occupied = clocks[:, _BUSY].copy(), clocks[:, _OCCUPIED].copy()
    return Served(ttft_s=ttft, itl_s=itl, gap_s=gap, finish_s=finish, busy_s=busy, occupied_s=occupied)


def keeps_slo(
    arrival_s: Floats,
    prompt_tokens: Ints,
    output_tokens: Ints,
    law: ServingLaw,
    engines: int,
    slo_s: tuple[float, float],
    most_late: int,
) -> bool:
    """Whether at most so many of the requests that `serve` takes come later than `slo_s`, their TTFT and ITL.

    Ends with the first one too many.
    """
    limits = (*slo_s, float(most_late))
    return _run(arrival_s, prompt_tokens, output_tokens, law, engines, limits)[2] <= most_late


def _run(
    arrival_s: Floats,
    prompt_tokens: Ints,
    output_tokens: Ints,
    law: ServingLaw,
    engines: int,
    late: tuple[float, float, float],
) -> tuple[Floats, Floats, int]:
    """Requests' times, engines' clocks, and how many were late; see `serve`."""
    if engines < 1 or (len(arrival_s) and min(prompt_tokens.min(), output_tokens.min()) < 1):
        raise ValueError("there is an engine, and sizes are 1 token or more")
    if (np.diff(arrival_s) < 0).any():
        raise ValueError("arrivals are in order")
    sizes = np.zeros((len(arrival_s), 4), np.int64)
    sizes[:, _PROMPT], sizes[:, _OUTPUT], sizes[:, _AFTER] = prompt_tokens, output_tokens, -1
    times = np.zeros((len(arrival_s), 9))
    times[:, _ARRIVAL] = arrival_s
    times[:, _PREFILL] = np.interp(prompt_tokens, law.prompt_tokens, law.prefill_s)
    times[:, _OWN] = np.interp(prompt_tokens, law.prompt_tokens, law.first_token_s)
    times[:, _CACHE] = np.interp(prompt_tokens + output_tokens / 2, law.context_tokens, law.cache_bytes)
    if times[:, _CACHE].max(initial=0.0) > law.memory_bytes:
        raise ValueError("a request's cache exceeds the memory of an engine")
    counts, clocks = np.zeros((engines, 12), np.int64), np.zeros((engines, 7))
    counts[:, _FIRST], clocks[:, _END] = -1, np.inf
    sequences = np.zeros((engines, law.sequences, 3), np.int64)
    gap_s, gap_step = np.zeros((engines, _GAPS_KEPT)), np.zeros((engines, _GAPS_KEPT), np.int64)
    limits = np.array((law.sequences, law.step_tokens, law.memory_bytes, law.first_token_steps, *late))
    context = np.asarray(law.context_tokens, np.float64)
    _serve(sizes, times, counts, clocks, sequences, gap_s, gap_step, limits, context, _by_batch(law))
    return times, clocks, int(counts[:, _LATE].sum())


def _by_batch(law: ServingLaw) -> Floats:
    """Seconds of a step, [sequences + 1, contexts]; with no sequence running, as with one of no context."""
    table = np.asarray(law.step_s)
    batches = np.arange(law.sequences + 1)
    rows = np.stack([np.interp(batches, law.batch, column) for column in table.T], axis=1)
    rows[0] = rows[1, 0]
    return np.ascontiguousarray(rows)


# The helpers are inlined before types are inferred: as functions of their own they took a third longer.
@njit(cache=True)
def _serve(
    sizes: Any,
    times: Any,
    counts: Any,
    clocks: Any,
    sequences: Any,
    gap_s: Any,
    gap_step: Any,
    limits: Any,
    context: Any,
    step_s: Any,
) -> None:
    """Arrival by arrival: bring all engines up to it, then hand it over. After the last, all come to rest.

    It ends as soon as more requests are late than may be.
    """
    engines, requests = len(counts), len(sizes)
    for request in range(requests + 1):
        now = times[request, _ARRIVAL] if request < requests else np.inf
        chosen, late = 0, 0
        for e in range(engines):
            while clocks[e, _END] <= now and clocks[e, _END] < np.inf:
                _end_leg(sizes, times, counts, clocks, sequences, gap_s, gap_step, limits, e)
                _begin_leg(sizes, times, counts, clocks, sequences, limits, context, step_s, e)
            if counts[e, _LOAD] < counts[chosen, _LOAD]:
                chosen = e
            late += counts[e, _LATE]
        if late > limits[_MOST_LATE]:
            return
        if request < requests:
            _hand_over(sizes, times, counts, clocks, limits, chosen, request, now)


@njit(inline="always")
def _hand_over(
    sizes: Any, times: Any, counts: Any, clocks: Any, limits: Any, e: int, request: int, now: float
) -> None:
    """The request waits at engine `e`: for the step under way, or for an event that is known already."""
    counts[e, _LOAD] += 1
    if counts[e, _FIRST] >= 0:
        sizes[counts[e, _LAST], _AFTER] = request
    else:
        counts[e, _FIRST] = request
        if clocks[e, _END] == np.inf:  # an empty leg, so that the next one begins now
            clocks[e, _BEGIN], clocks[e, _END], counts[e, _LENGTH], counts[e, _ENTERING] = now, now, 0, 0
        elif (
            counts[e, _LENGTH] > 1
            and counts[e, _RUNNING] < limits[_SEQUENCES]
            and clocks[e, _HELD] + times[request, _CACHE] <= limits[_MEMORY]
        ):
            taken = max(1, int(np.ceil((now - clocks[e, _BEGIN]) / clocks[e, _STEP])))
            counts[e, _LENGTH] = min(counts[e, _LENGTH], taken)
            clocks[e, _END] = clocks[e, _BEGIN] + counts[e, _LENGTH] * clocks[e, _STEP]
    counts[e, _LAST] = request


@njit(inline="always")
def _begin_leg(
    sizes: Any,
    times: Any,
    counts: Any,
    clocks: Any,
    sequences: Any,
    limits: Any,
    context: Any,
    step_s: Any,
    e: int,
) -> None:
    """Plan the next steps: one with prompts, or several without, or none where nothing is to do."""
    running = counts[e, _RUNNING]
    budget = int(limits[_STEP_TOKENS]) - running
    prefill, entering, places = 0.0, 0, int(limits[_SEQUENCES]) - running
    while counts[e, _FIRST] >= 0 and budget > 0 and entering < places:
        request = counts[e, _FIRST]
        if counts[e, _DONE] == 0:
            if clocks[e, _HELD] + times[request, _CACHE] > limits[_MEMORY]:
                break
            clocks[e, _HELD] += times[request, _CACHE]
        tokens = min(budget, sizes[request, _PROMPT] - counts[e, _DONE])
        budget -= tokens
        prefill += times[request, _PREFILL] * (tokens / sizes[request, _PROMPT])
        counts[e, _DONE] += tokens
        if counts[e, _DONE] < sizes[request, _PROMPT]:
            break
        sequences[e, entering, _ENTERED] = request
        entering += 1
        counts[e, _FIRST], counts[e, _DONE] = sizes[request, _AFTER], 0
    counts[e, _ENTERING] = entering
    clocks[e, _BEGIN] = clocks[e, _END]
    length = 1
    if entering == 0 and counts[e, _DONE] == 0:
        if running == 0:
            clocks[e, _END] = np.inf
            length = 0
        else:
            length = min(sequences[e, 0, _WHEN] - counts[e, _STEPS], _LONGEST_LEG)
    if length:
        clocks[e, _DECODE] = _step(counts, context, step_s, e, running, length)
        clocks[e, _STEP] = clocks[e, _DECODE] + prefill
        clocks[e, _END] += length * clocks[e, _STEP]
    counts[e, _LENGTH] = length


@njit(inline="always")
def _step(counts: Any, context: Any, step_s: Any, e: int, running: int, length: int) -> float:
    """Seconds of the middle one of `length` steps to come, prompts aside."""
    at = counts[e, _SEGMENT]
    mean = counts[e, _CONTEXT] / max(1, running) + 0.5 * (length - 1)
    while at > 0 and mean < context[at]:
        at -= 1
    while at < len(context) - 2 and mean > context[at + 1]:
        at += 1
    counts[e, _SEGMENT] = at
    share = min(1.0, (mean - context[at]) / (context[at + 1] - context[at]))
    return float(step_s[running, at] * (1.0 - share) + step_s[running, at + 1] * share)


@njit(inline="always")
def _end_leg(
    sizes: Any,
    times: Any,
    counts: Any,
    clocks: Any,
    sequences: Any,
    gap_s: Any,
    gap_step: Any,
    limits: Any,
    e: int,
) -> None:
    """Take the leg's steps: sequences end, and those that entered run."""
    now = clocks[e, _END]
    clocks[e, _BUSY] += now - clocks[e, _BEGIN]
    clocks[e, _OCCUPIED] += (now - clocks[e, _BEGIN]) * counts[e, _RUNNING]
    counts[e, _STEPS] += counts[e, _LENGTH]
    counts[e, _CONTEXT] += counts[e, _RUNNING] * counts[e, _LENGTH]
    steps = counts[e, _STEPS]
    if counts[e, _LENGTH]:
        _keep_gap(counts, clocks, gap_s, gap_step, e)
    while counts[e, _RUNNING] and sequences[e, 0, _WHEN] == steps:
        request = sequences[e, 0, _WHO]
        _pop(counts, sequences, e)
        counts[e, _CONTEXT] -= sizes[request, _PROMPT] + sizes[request, _OUTPUT]
        clocks[e, _HELD] -= times[request, _CACHE]
        counts[e, _LOAD] -= 1
        times[request, _ITL] = (now - times[request, _SINCE_S]) / (sizes[request, _OUTPUT] - 1)
        times[request, _GAP] = _longest_gap(counts, gap_s, gap_step, e, sizes[request, _SINCE])
        times[request, _FINISH] = now
        if times[request, _TTFT] > limits[_TTFT_SLO] or times[request, _ITL] > limits[_ITL_SLO]:
            counts[e, _LATE] += 1
    for place in range(counts[e, _ENTERING]):
        request = sequences[e, place, _ENTERED]
        waited = now - times[request, _ARRIVAL]
        times[request, _TTFT] = waited + times[request, _OWN] + limits[_FIRST_STEPS] * clocks[e, _DECODE]
        if sizes[request, _OUTPUT] == 1:
            clocks[e, _HELD] -= times[request, _CACHE]
            counts[e, _LOAD] -= 1
            times[request, _FINISH] = now
            if times[request, _TTFT] > limits[_TTFT_SLO]:
                counts[e, _LATE] += 1
        else:
            sizes[request, _SINCE], times[request, _SINCE_S] = steps, now
            counts[e, _CONTEXT] += sizes[request, _PROMPT] + 1
            _push(counts, sequences, e, steps + sizes[request, _OUTPUT] - 1, request)
    if counts[e, _LOAD] == 0:
        clocks[e, _HELD] = 0.0  # what rounding left


@njit(inline="always")
def _push(counts: Any, sequences: Any, e: int, when: int, request: int) -> None:
    at = counts[e, _RUNNING]
    counts[e, _RUNNING] += 1
    while at > 0 and sequences[e, (at - 1) // 2, _WHEN] > when:
        above = (at - 1) // 2
        sequences[e, at, _WHEN], sequences[e, at, _WHO] = (
            sequences[e, above, _WHEN],
            sequences[e, above, _WHO],
        )
        at = above
    sequences[e, at, _WHEN], sequences[e, at, _WHO] = when, request


@njit(inline="always")
def _pop(counts: Any, sequences: Any, e: int) -> None:
    """Take out the sequence that ends first."""
    counts[e, _RUNNING] -= 1
    count = counts[e, _RUNNING]
    when, request = sequences[e, count, _WHEN], sequences[e, count, _WHO]
    at, child = 0, 1
    while child < count:
        if child + 1 < count and sequences[e, child + 1, _WHEN] < sequences[e, child, _WHEN]:
            child += 1
        if sequences[e, child, _WHEN] >= when:
            break
        sequences[e, at, _WHEN], sequences[e, at, _WHO] = (
            sequences[e, child, _WHEN],
            sequences[e, child, _WHO],
        )
        at, child = child, 2 * child + 1
    sequences[e, at, _WHEN], sequences[e, at, _WHO] = when, request


@njit(inline="always")
def _keep_gap(counts: Any, clocks: Any, gap_s: Any, gap_step: Any, e: int) -> None:
    """Note the leg's step, and forget those before it that are no longer: what is left is ever shorter."""
    count = counts[e, _GAPS]
    while count and gap_s[e, count - 1] <= clocks[e, _STEP]:
        count -= 1
    if count == _GAPS_KEPT:  # neighbours become one, as long as the longer of them
        count //= 2
        for place in range(count):
            gap_s[e, place], gap_step[e, place] = gap_s[e, 2 * place], gap_step[e, 2 * place + 1]
    gap_s[e, count], gap_step[e, count] = clocks[e, _STEP], counts[e, _STEPS]
    counts[e, _GAPS] = count + 1


@njit(inline="always")
def _longest_gap(counts: Any, gap_s: Any, gap_step: Any, e: int, since: int) -> float:
    """Of the steps after step `since`: the oldest that is kept of them."""
    low, high = 0, counts[e, _GAPS] - 1
    while low < high:
        middle = (low + high) // 2
        if gap_step[e, middle] > since:
            high = middle
        else:
            low = middle + 1
    return float(gap_s[e, low])
