"""The predictor's timeline told again rank by rank, in plain Python, from the rules of DESIGN and scheduler alone.

Slow, recursive and scalar on purpose: nothing is shared with `fusedfog.plan` but the descriptions of its inputs (and, for
all-reduces, the formula of their cost, which has closed-form tests of its own).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from fusedfog.algorithms import TABLE
from fusedfog.plan import Method, Network, Workload, allreduce_seconds
from fusedfog.topology import named


def slow_finish_times(workload: Workload, network: Network, method: Method, pace: np.ndarray) -> np.ndarray:
    n, local = network.ranks, network.local
    ddp = method.algorithm == "ddp"
    row = {**TABLE["Adam"], **TABLE["SGD"]}["allreduce" if ddp else method.algorithm]
    buckets = method.buckets(workload)
    count, width = len(buckets), len(row.messages)
    forward, backward = (sum(getattr(layer, key) for layer in workload.layers) for key in ("forward_s", "backward_s"))
    places = network.machines if method.mesh else n
    averages = method.mesh and method.inside == "gradients" and local > 1 and row.exchanges == "parameters"
    early_passes = method.fused_backward and not averages
    graph = named(str(method.topology), places) if row.exchanges == "parameters" and n > 1 else None
    every = method.communicate_every

    def edges(t: int) -> list[tuple[int, int]]:
        """(sender, receiver) of step t, read from the mixing matrix."""
        assert graph is not None
        w = graph.matrix(t // every)
        return [(j, i) for i in range(places) for j in range(places) if i != j and w[i, j] != 0]

    def cost(t: int, edge: tuple[int, int], size: float) -> float:
        machine = (lambda r: r) if method.mesh else (lambda r: r // local)
        out = machine(edge[0]) != machine(edge[1])
        link = network.across if out else network.inside or network.across
        if out:
            leaving = sum(machine(a) == machine(edge[0]) != machine(b) for a, b in edges(t))
            coming = sum(machine(b) == machine(edge[1]) != machine(a) for a, b in edges(t))
        else:
            leaving = sum(a == edge[0] and machine(a) == machine(b) for a, b in edges(t))
            coming = sum(b == edge[1] and machine(a) == machine(b) for a, b in edges(t))
        return link.latency_s + max(leaving, coming) * size / link.bandwidth

    def exchanging(t: int) -> bool:
        return graph is not None and (t + 1) % every == 0

    def moved(size: float, tensors: float) -> float:
        return size * tensors / workload.memory_bandwidth

    def inbox(t: int, i: int) -> int:
        return width * (1 if method.mesh else sum(b == i for _, b in edges(t)))

    posted: dict[tuple[int, int, int], float] = {}

    @cache
    def begin(t: int, b: int, i: int) -> float:
        before = (t, b - 1) if b else (t - every, count - 1)
        return max(posted[t, b, i], done(*before, i) if before[0] >= 0 else 0.0)

    @cache
    def done(t: int, b: int, i: int) -> float:
        size = buckets[b].size * width
        if not method.mesh:
            own = [begin(t, b, i)]
            own += [max(begin(t, b, e[0]), begin(t, b, e[1])) + cost(t, e, size) for e in edges(t) if i in e]
            return max(own)
        within = 0.0
        if local > 1:
            assert network.inside is not None
            within = (local - 1) / local * size / network.inside.bandwidth + network.inside.latency_s
        first = 0.0 if averages else within  # Equal tensors need not be collected.
        ready = [max(begin(t, b, m * local + k) for k in range(local)) + first for m in range(places)]
        mine = i // local
        met = [max(ready[e[0]], ready[e[1]]) + cost(t, e, size) for e in edges(t) if mine in e]
        return max([ready[mine], *met]) + within

    def computed(now: list[float], pace: np.ndarray) -> list[float]:
        """Forward and backward, which averages gradients inside machines where they do."""
        if not averages:
            return [clock + f * (forward + backward) for clock, f in zip(now, pace, strict=True)]
        graded = workload.buckets(method.bucket_mb, graded=True)
        inside = Network(local, network.inside or network.across)
        ended = []
        for i in range(n):
            mates = range(i // local * local, i // local * local + local)
            end = 0.0
            for b, bucket in enumerate(graded):
                packed = sum(moved(one.size, 2) for one in graded[: b + 1])
                here = max(now[k] + pace[k] * (forward + bucket.ready_s) + packed for k in mates)
                end = max(end, here) + allreduce_seconds(inside, bucket.size)
            own = now[i] + pace[i] * (forward + backward) + moved(workload.size, 2)
            ended.append(max(own, end) + moved(workload.size, 2))
        return ended

    steps = len(pace)
    finish = np.zeros((steps, n))
    now = [0.0] * n
    early = row.before is None
    if early and exchanging(0):
        posted.update({(0, b, i): 0.0 for b in range(count) for i in range(n)})
    for t in range(steps):
        reduces = row.exchanges == "gradients" and n > 1
        ends: list[list[float]] = [[] for _ in range(count)]
        through = computed(now, pace[t])
        for i in range(n):
            f = pace[t, i]
            if reduces or (not early and graph is not None):
                lead = 2 if reduces else workload.optimizer_tensors
                clock, at = now[i] + f * forward, 0.0
                overlap = reduces or early_passes
                for b, bucket in enumerate(buckets):
                    if overlap:
                        clock += f * (bucket.ready_s - at) + moved(bucket.size, lead)
                        at = bucket.ready_s
                        ends[b].append(clock)
                clock += f * (backward - at)
                if not overlap:
                    clock = through[i]
                    for b, bucket in enumerate(buckets):
                        clock += moved(bucket.size, lead)
                        ends[b].append(clock)
                now[i] = clock
            else:
                clock, at, passed = now[i] + f * forward, 0.0, 0
                tensors = workload.optimizer_tensors + (inbox(t, i) if exchanging(t) else 0)
                points = [*buckets] if early_passes else []
                for number, bucket in enumerate(points):
                    clock += f * (bucket.ready_s - at)
                    at = bucket.ready_s
                    while passed <= number and (not exchanging(t) or done(t, passed, i) <= clock):
                        clock += moved(buckets[passed].size, tensors)
                        ends[passed].append(clock)
                        passed += 1
                clock = clock + f * (backward - at) if early_passes else through[i]
                for b in range(passed, count):
                    clock = max(clock, done(t, b, i)) if exchanging(t) else clock
                    clock += moved(buckets[b].size, tensors)
                    ends[b].append(clock)
                now[i] = clock
        if reduces:
            end = 0.0
            for b, bucket in enumerate(buckets):
                end = max(end, *ends[b]) + allreduce_seconds(network, bucket.size, method.collective)
            after = workload.optimizer_tensors + 2
            now = [max(clock, end) + moved(workload.size, after) for clock in now]
        elif early and exchanging(t + 1):
            posted.update({(t + 1, b, i): ends[b][i] for b in range(count) for i in range(n)})
        elif not early and exchanging(t):
            posted.update({(t, b, i): ends[b][i] for b in range(count) for i in range(n)})
            for i in range(n):
                for b, bucket in enumerate(buckets):
                    now[i] = max(now[i], done(t, b, i)) + moved(bucket.size, 2 + inbox(t, i))
        finish[t] = now
    return finish
