"""Rounding the weights of a bipartite graph's edges to 0 or 1, every vertex's sum kept within one.

Each edge becomes 1 with its weight as probability (Gandhi, Khuller, Parthasarathy and Srinivasan,
"Dependent rounding and its applications to approximation algorithms", 2006; in statistics
controlled rounding, Cox 1987).

The walk: from edge to edge that is not rounded yet, until it comes back to a vertex (a cycle) or to
a vertex without another such edge (a path, whose other end must be of that kind as well). Along it
every other edge gains what the rest loses, as far as the first edge becomes 0 or 1; up or down is
drawn so that no weight changes on average. Every turn rounds an edge at least.

Legend: E edges.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.jit import kernel

__all__ = ["ONE", "round_dependently"]

ONE = 1 << 30
"""Weights and random numbers are in these units."""

Ints = NDArray[np.integer[Any]]


@kernel
def round_dependently(weight_E: Ints, ends_2E: Ints, vertices: int, random_E: Ints) -> None:
    """Make every weight 0 or `ONE`.

    Args:
        weight_E: int64, 0 to `ONE`; changed.
        ends_2E: the vertex of each side; those of the second side are numbered after the first's.
            A walk goes on to the next edge of a vertex in their order, or to the one before.
        vertices: of both sides.
        random_E: int64 in [0, `ONE`).
    """
    edges = len(weight_E)
    one = 1 << 30
    # Edges of a vertex that are not rounded are linked in both directions.
    following = np.full((2, edges), -1, np.int64)
    preceding = np.full((2, edges), -1, np.int64)
    last = np.full(vertices, -1, np.int64)
    for edge in range(edges):
        if 0 < weight_E[edge] < one:
            for side in range(2):
                vertex = ends_2E[side, edge]
                before = last[vertex]
                preceding[side, edge] = before
                if before >= 0:
                    following[side, before] = edge
                last[vertex] = edge
    place = np.full(vertices, -1, np.int64)  # of a vertex on the walk
    walked = np.empty(vertices + 1, np.int64)
    walk = np.empty(vertices + 1, np.int64)
    turns = 0
    for first in range(edges):
        while 0 < weight_E[first] < one:
            edge, side, size = first, 1, 0
            walked[0] = ends_2E[0, first]
            place[walked[0]] = 0
            begin, visited = 0, 1
            while True:
                walk[size] = edge
                size += 1
                vertex = ends_2E[side, edge]
                if place[vertex] >= 0:
                    begin, visited = place[vertex], size
                    break
                place[vertex] = size
                walked[size] = vertex
                onward = following[side, edge]
                if onward < 0:
                    onward = preceding[side, edge]
                if onward < 0:
                    start, of = walk[0], (side + size) % 2
                    if following[of, start] < 0 and preceding[of, start] < 0:
                        visited = size + 1
                        break
                    # From this end: it has no other edge.
                    for at in range(size + 1):
                        place[walked[at]] = -1
                    walked[0], size, side = vertex, 0, 1 - side
                    place[vertex] = 0
                    continue
                edge, side = onward, 1 - side
            up = one
            down = one
            for at in range(begin, size):
                weight = weight_E[walk[at]]
                if (at - begin) % 2:
                    weight = one - weight
                up, down = min(up, one - weight), min(down, weight)
            rises = random_E[turns] * (up + down) < down << 30
            change = up if rises else -down
            turns += 1
            for at in range(begin, size):
                edge = walk[at]
                weight_E[edge] += -change if (at - begin) % 2 else change
                if not 0 < weight_E[edge] < one:
                    for of in range(2):
                        after, before = following[of, edge], preceding[of, edge]
                        if after >= 0:
                            preceding[of, after] = before
                        if before >= 0:
                            following[of, before] = after
            for at in range(visited):
                place[walked[at]] = -1
