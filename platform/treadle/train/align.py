"""The shortest edit between two label sequences."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["align"]


def align(reference: Sequence[int], answer: Sequence[int]) -> list[tuple[int | None, int | None]]:
    """Pairs (wanted, answered) of a shortest edit script; None stands for a missing side.

    The number of unequal pairs is the Levenshtein distance. Substitutions are preferred to an
    insertion beside a deletion.

    Source: Wagner and Fischer 1974.
    Cost: len(reference) x len(answer), both short here; equal sequences are seen at once.
    """
    if tuple(reference) == tuple(answer):
        return [(label, label) for label in reference]
    rows, columns = len(reference), len(answer)
    cost = [list(range(columns + 1))]
    for i, want in enumerate(reference, start=1):
        above, line = cost[-1], [i]
        for j, got in enumerate(answer, start=1):
            line.append(min(above[j - 1] + (want != got), above[j] + 1, line[j - 1] + 1))
        cost.append(line)
    pairs: list[tuple[int | None, int | None]] = []
    i, j = rows, columns
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (reference[i - 1] != answer[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((reference[i], answer[j]))
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            pairs.append((reference[i], None))
        else:
            j -= 1
            pairs.append((None, answer[j]))
    return pairs[::-1]
