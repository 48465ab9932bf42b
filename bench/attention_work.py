"""How much work an attention call is: the fewest bytes it must move and the operations of its two products.

Shares of a ceiling are these numbers over the measured time, so what is counted is what no kernel can avoid: each input
read once, each result written once, nothing for scores, for keys read twice, for partial results of a split, or for the
exponentials.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

LSE_BYTES = 4  # fp32, one a row and query head


class Request(NamedTuple):
    rows: int
    keys: int


def visible_keys(request: Request, left: int, right: int) -> list[int]:
    """Keys that each query row sees: bottom-right aligned, `left` and `right` neighbours, -1 for no limit.

    Image blocks are not counted: what they add is a few rows of one picture.
    """
    counts = []
    for row in range(request.rows):
        token = request.keys - request.rows + row
        first = 0 if left < 0 else max(0, token - left)
        last = request.keys - 1 if right < 0 else min(request.keys - 1, token + right)
        counts.append(max(0, last - first + 1))
    return counts


def keys_read(request: Request, left: int, right: int) -> int:
    """Keys that at least one row sees."""
    if request.rows == 0:
        return 0
    first_token, last_token = request.keys - request.rows, request.keys - 1
    first = 0 if left < 0 else max(0, first_token - left)
    last = last_token if right < 0 else min(request.keys - 1, last_token + right)
    return max(0, last - first + 1)


def bytes_moved(
    requests: Iterable[Request], left: int, right: int, *, query_heads: int, head_dim: int, itemsize: int,
    key_bytes: int, new_rows: int = 0,
) -> int:  # fmt: skip
    """q read + out written + lse written + keys and values (`key_bytes` for a key) that any row sees, read once for all
    the query heads that share them + rows that the call itself appends, read and written."""
    total = 0
    for request in requests:
        per_row = 2 * query_heads * head_dim * itemsize + query_heads * LSE_BYTES
        total += request.rows * per_row + (keys_read(request, left, right) + 2 * new_rows) * key_bytes
    return total


def operations(requests: Iterable[Request], left: int, right: int, query_heads: int, head_dim: int) -> int:
    """4 x head_dim for each pair of a query row and a key it sees, in each query head: one multiplication and one addition
    per element in q k^T, and again in p v."""
    return sum(4 * head_dim * query_heads * sum(visible_keys(request, left, right)) for request in requests)
