"""Work in threads: the order of the items, and a bounded number of them under way."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.storage.parallel import in_threads


def test_results_keep_the_order_and_items_are_drawn_as_they_are_needed() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            drawn.append(number)
            yield number

    found = []
    for result in in_threads(lambda number: number * number, items(), 3):
        found.append(result)
        assert len(drawn) <= len(found) + 4
    assert found == [number * number for number in range(50)]
