"""Tables to ask a model about: a CSV file, or a generated one. Used by the benchmarks `order` and `sql_real`."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import TypeAlias, TypeVar

from benchmarks.harness import words

Table: TypeAlias = list[dict[str, str]]
T = TypeVar("T")

_ROWS_PER_PRODUCT, _ROWS_PER_SELLER, _ROWS_PER_BUYER = 16, 50, 4


def read_table(path: Path) -> Table:
    """Raises SystemExit if that is no CSV file with a header."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{name: value or "" for name, value in row.items() if name} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path}: {error}") from error
    if not rows:
        raise SystemExit(f"{path}: no rows")
    return rows


def orders_table(num_rows: int, seed: int) -> Table:
    """Fifteen columns of shop orders in no order: what is told of a product, a seller and a buyer repeats with it."""
    rng = random.Random(seed)
    products = [
        (f"P-{i:05}", words(4, rng), f"Category {i % 25}", words(rng.randint(40, 90), rng))
        for i in range(num_rows // _ROWS_PER_PRODUCT + 1)
    ]
    sellers = [
        (f"Seller {i}", f"Region {i % 12}", words(rng.randint(15, 40), rng))
        for i in range(num_rows // _ROWS_PER_SELLER + 1)
    ]
    buyers = [(f"C{i:06}", words(2, rng).title(), f"Segment {i % 5}") for i in range(num_rows // _ROWS_PER_BUYER + 1)]
    offers = [(product, seller) for product in products for seller in rng.choices(sellers, k=rng.randint(1, 3))]
    rows: Table = []
    for number in range(num_rows):
        (product, seller), buyer = _skewed(offers, rng), _skewed(buyers, rng)
        rows.append(
            {
                "day": f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
                "channel": rng.choice(["web", "shop", "phone"]),
                "order_id": str(100_000 + number),
                "buyer_id": buyer[0],
                "buyer": buyer[1],
                "segment": buyer[2],
                "product_id": product[0],
                "product": product[1],
                "category": product[2],
                "description": product[3],
                "seller": seller[0],
                "region": seller[1],
                "terms": seller[2],
                "rating": str(rng.choices([1, 2, 3, 4, 5], [1, 1, 2, 4, 8])[0]),
                "comment": words(rng.randint(3, 20), rng),
            }
        )
    rng.shuffle(rows)
    return rows


def _skewed(kind: list[T], rng: random.Random) -> T:
    """Few of them are common, most are rare."""
    return kind[int(len(kind) * rng.random() ** 2)]
