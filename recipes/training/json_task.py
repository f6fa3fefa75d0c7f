"""A sentence and a list of wanted fields, and the JSON object that answers it, from templates and a seed.

A field that the sentence does not mention is null. The held-out split has other names, places and things, and wants
combinations of fields that training does not show for that sentence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import combinations

TRAIN_SEED, HELD_OUT_SEED = 21, 22
TRAIN_COUNT = 320

# Field -> (values in training, values in the held-out split); whole numbers are answered as JSON numbers.
VALUES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "name": (
        ("Maria Lopez", "John Smith", "Aisha Khan", "Peter Novak", "Yuki Tanaka", "Laura Rossi", "Omar Haddad"),
        ("Ingrid Berg", "Carlos Mendes", "Priya Nair", "Tom Becker", "Mei Chen"),
    ),
    "city": (
        ("Berlin", "Toronto", "Nairobi", "Lyon", "Osaka", "Chicago", "Porto"),
        ("Helsinki", "Bogota", "Prague", "Sydney", "Ghent"),
    ),
    "item": (
        ("lamps", "chairs", "notebooks", "red bikes", "phone cases", "coffee mugs", "tents"),
        ("backpacks", "steel bottles", "keyboards", "wool socks", "clocks"),
    ),
    "company": (
        ("Acme", "Nordwind", "Bluefin Labs", "Hartmann", "Kato Foods", "Silverline"),
        ("Ostra Energy", "Peakline", "Greenfield", "Helix Bio"),
    ),
    "topic": (
        ("the budget", "hiring plans", "the new website", "safety rules", "the spring sale"),
        ("travel costs", "the office move", "data backups", "the user survey"),
    ),
    "weekday": (("Monday", "Tuesday", "Thursday", "Saturday"), ("Wednesday", "Friday", "Sunday")),
    "time": (("9:00", "10:30", "14:15", "16:45", "8:20"), ("11:10", "13:40", "17:05", "7:50")),
    "email": (
        ("m.lopez@acme.com", "info@nordwind.org", "john@mail.net", "aisha.k@kato.jp"),
        ("ingrid@berg.no", "sales@peakline.com", "tom_b@inbox.de"),
    ),
    "quantity": (tuple(str(n) for n in range(2, 60, 3)), tuple(str(n) for n in range(3, 90, 7))),
    "price": (tuple(str(n) for n in range(10, 900, 35)), tuple(str(n) for n in range(15, 900, 44))),
    "room": (tuple(str(n) for n in range(101, 140, 3)), tuple(str(n) for n in range(202, 250, 5))),
}
NUMBERS = ("quantity", "price", "room")

SENTENCES = (
    "{name} from {city} ordered {quantity} {item} for {price} dollars.",
    "Please ship {quantity} {item} to {name} in {city}.",
    "{company} in {city} bought {quantity} {item} from {name}.",
    "On {weekday} at {time} {name} will talk about {topic} in room {room}.",
    "The meeting about {topic} with {company} is on {weekday} at {time}.",
    "{name} works for {company} in {city}, write to {email}.",
    "Contact {email} to get {item} for {price} dollars from {company}.",
    "Room {room} is booked by {name} of {company} for {weekday}.",
)
ABSENT_EVERY = 5  # one example in five also wants a field that the sentence does not mention


def examples(split: str, count: int) -> list[dict[str, str]]:
    """The first `count` distinct examples of a split, each {"prompt", "answer"}; the same at every call.

    `split` is "train" or "held_out"; a prompt that training shows (by chance) is left out of the held-out split.
    """
    rng = random.Random(TRAIN_SEED if split == "train" else HELD_OUT_SEED)  # noqa: S311 - a seed, not a secret
    seen = set() if split == "train" else {e["prompt"] for e in examples("train", TRAIN_COUNT)}
    chosen: dict[str, dict[str, str]] = {}
    stream = _stream(rng, held_out=split != "train")
    while len(chosen) < count:
        example = next(stream)
        if example["prompt"] not in seen:
            chosen.setdefault(example["prompt"], example)
    return list(chosen.values())


def _stream(rng: random.Random, *, held_out: bool) -> Iterator[dict[str, str]]:
    while True:
        sentence = rng.choice(SENTENCES)
        present = [field for field in VALUES if "{" + field + "}" in sentence]
        # Every third combination of fields is kept for the held-out split.
        choices = [c for size in (2, 3, 4) for c in combinations(present, size)]
        kept = [c for i, c in enumerate(choices) if (i % 3 == 0) == held_out]
        wanted = list(rng.choice(kept))
        values = {field: rng.choice(VALUES[field][held_out]) for field in present}
        if rng.randrange(ABSENT_EVERY) == 0:
            wanted.append(rng.choice([field for field in VALUES if field not in present]))
        rng.shuffle(wanted)
        yield {
            "prompt": f"Extract {', '.join(wanted)} as JSON: {sentence.format(**values)}",
            "answer": json.dumps({field: _value(field, values.get(field)) for field in wanted}),
        }


def _value(field: str, text: str | None) -> str | int | None:
    return int(text) if text is not None and field in NUMBERS else text
