"""Questions over a one-line table schema and their SQL, from templates and a seed.

The held-out split asks about values that training never shows, about (table, template) pairs that it never shows,
and about one table that it never shows at all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TRAIN_SEED, HELD_OUT_SEED = 11, 12
TRAIN_COUNT = 320


@dataclass(frozen=True)
class Text:
    """A text column with the values that questions mention: `train` in training, `held_out` only in the test."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Number:
    """A numeric column and the thresholds that questions mention."""

    name: str
    low: int
    high: int
    step: int


@dataclass(frozen=True)
class Table:
    """A table: its name (also the plural in questions), the column that names a row, and the columns to ask about."""

    name: str
    key: str
    texts: tuple[Text, ...]
    numbers: tuple[Number, ...]

    @property
    def schema(self) -> str:
        """The table as prompts show it, such as "books(title, author, genre, year, pages)"."""
        columns = [self.key, *(c.name for c in self.texts), *(c.name for c in self.numbers)]
        return f"{self.name}({', '.join(columns)})"


TABLES = (
    Table(
        "employees",
        "name",
        (
            Text("department", ("sales", "finance", "support", "research"), ("marketing", "logistics", "design")),
            Text("city", ("Berlin", "Paris", "Oslo", "Rome", "Madrid"), ("Lisbon", "Vienna", "Dublin")),
        ),
        (Number("salary", 20000, 90000, 1000), Number("age", 20, 60, 1)),
    ),
    Table(
        "products",
        "name",
        (
            Text("category", ("toys", "garden", "kitchen", "sports"), ("office", "lighting", "camping")),
            Text("supplier", ("Acme", "Norden", "Kato", "Bluefin"), ("Helix", "Ostra", "Peak")),
        ),
        (Number("price", 5, 500, 5), Number("stock", 10, 900, 10)),
    ),
    Table(
        "books",
        "title",
        (
            Text("author", ("Orwell", "Austen", "Kafka", "Borges"), ("Woolf", "Tolstoy", "Achebe")),
            Text("genre", ("poetry", "history", "crime", "fantasy"), ("travel", "drama", "horror")),
        ),
        (Number("year", 1900, 2020, 1), Number("pages", 80, 900, 10)),
    ),
    Table(
        "students",
        "name",
        (
            Text("school", ("Hill", "Lake", "North", "Park"), ("River", "Grove", "Valley")),
            Text("subject", ("math", "music", "physics", "art"), ("biology", "latin", "chemistry")),
        ),
        (Number("age", 6, 19, 1), Number("score", 10, 100, 1)),
    ),
    Table(
        "flights",
        "code",
        (
            Text("origin", ("Tokyo", "Cairo", "Lima", "Delhi"), ("Seoul", "Quito", "Accra")),
            Text("airline", ("Condor", "Swift", "Aurora", "Delta"), ("Zephyr", "Polar", "Comet")),
        ),
        (Number("distance", 200, 9000, 100), Number("seats", 40, 400, 10)),
    ),
    Table(
        "movies",
        "title",
        (
            Text("director", ("Kubrick", "Varda", "Nolan", "Lang"), ("Leone", "Ozu", "Welles")),
            Text("country", ("France", "Japan", "Italy", "Spain"), ("Poland", "Brazil", "Kenya")),
        ),
        (Number("rating", 1, 10, 1), Number("minutes", 60, 200, 5)),
    ),
)
UNSEEN_TABLE = Table(
    "cars",
    "model",
    (
        Text("brand", (), ("Fiat", "Volvo", "Mazda", "Tesla")),
        Text("color", (), ("red", "silver", "green", "black")),
    ),
    (Number("price", 5000, 60000, 500), Number("mileage", 1000, 200000, 1000)),
)

# (questions, SQL): {t} table, {key} its key, {x} {y} text columns, {v} a value of x, {n} {m} numeric columns,
# {i} a threshold of n, {k} a small count.
TEMPLATES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("How many {t} have the {x} {v}?", "Count the {t} whose {x} is {v}."),
        "SELECT COUNT(*) FROM {t} WHERE {x} = '{v}';",
    ),
    (
        ("List the {y} of all {t} whose {x} is {v}.", "Show the {y} of {t} with {x} {v}."),
        "SELECT {y} FROM {t} WHERE {x} = '{v}';",
    ),
    (
        ("What is the average {n} of all {t}?", "Give me the mean {n} of {t}."),
        "SELECT AVG({n}) FROM {t};",
    ),
    (
        ("What is the highest {n} among {t} with {x} {v}?", "Find the maximum {n} where {x} is {v}."),
        "SELECT MAX({n}) FROM {t} WHERE {x} = '{v}';",
    ),
    (
        ("Which {t} have a {n} above {i}?", "Name the {t} with {n} greater than {i}."),
        "SELECT {key} FROM {t} WHERE {n} > {i};",
    ),
    (
        ("Which {t} have a {n} below {i}?", "Name the {t} with {n} less than {i}."),
        "SELECT {key} FROM {t} WHERE {n} < {i};",
    ),
    (
        ("Show the {k} {t} with the highest {n}.", "What are the top {k} {t} by {n}?"),
        "SELECT {key} FROM {t} ORDER BY {n} DESC LIMIT {k};",
    ),
    (
        ("Show the {k} {t} with the lowest {n}.", "What are the bottom {k} {t} by {n}?"),
        "SELECT {key} FROM {t} ORDER BY {n} ASC LIMIT {k};",
    ),
    (
        ("How many {t} are there per {x}?", "Count the {t} for each {x}."),
        "SELECT {x}, COUNT(*) FROM {t} GROUP BY {x};",
    ),
    (
        ("What is the average {n} per {x}?", "Give the mean {n} for each {x}."),
        "SELECT {x}, AVG({n}) FROM {t} GROUP BY {x};",
    ),
    (
        ("Count the {t} with {x} {v} and {n} above {i}.", "How many {t} have {x} {v} and a {n} over {i}?"),
        "SELECT COUNT(*) FROM {t} WHERE {x} = '{v}' AND {n} > {i};",
    ),
    (
        ("What is the total {n} of {t} with {x} {v}?", "Add up the {n} of all {t} where {x} is {v}."),
        "SELECT SUM({n}) FROM {t} WHERE {x} = '{v}';",
    ),
    (
        ("Which different {x} values do {t} have?", "List every distinct {x} of {t}."),
        "SELECT DISTINCT {x} FROM {t};",
    ),
)


def examples(split: str, count: int) -> list[dict[str, str]]:
    """The first `count` distinct examples of a split, each {"prompt", "answer"}; the same at every call.

    `split` is "train" or "held_out"; a prompt that training shows (by chance) is left out of the held-out split.
    """
    rng = random.Random(TRAIN_SEED if split == "train" else HELD_OUT_SEED)  # noqa: S311 - a seed, not a secret
    seen = set() if split == "train" else {e["prompt"] for e in examples("train", TRAIN_COUNT)}
    chosen: dict[str, dict[str, str]] = {}
    stream = _stream(rng, split)
    while len(chosen) < count:
        example = next(stream)
        if example["prompt"] not in seen:
            chosen.setdefault(example["prompt"], example)
    return list(chosen.values())


def _stream(rng: random.Random, split: str) -> Iterator[dict[str, str]]:
    tables: Sequence[Table] = TABLES if split == "train" else (*TABLES, UNSEEN_TABLE, UNSEEN_TABLE)
    while True:
        table, template = rng.randrange(len(tables)), rng.randrange(len(TEMPLATES))
        held_out_pair = (table + 2 * template) % 6 == 0
        if split == "train" and held_out_pair:
            continue
        yield _example(rng, tables[table], template, held_out=split != "train")


def _example(rng: random.Random, table: Table, template: int, *, held_out: bool) -> dict[str, str]:
    questions, sql = TEMPLATES[template]
    x, y = rng.sample(table.texts, 2)
    n = rng.choice(table.numbers)
    fields = {
        "t": table.name,
        "key": table.key,
        "x": x.name,
        "y": y.name,
        "n": n.name,
        "v": rng.choice(x.held_out if held_out else x.train),
        "i": str(rng.randrange(n.low, n.high, n.step)),
        "k": str(rng.randrange(2, 10)),
    }
    question = rng.choice(questions)
    return {"prompt": f"Table {table.schema}. {question.format(**fields)}", "answer": sql.format(**fields)}
