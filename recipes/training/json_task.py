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


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Parts of names and addresses: many, so that copying is learned and not a list; (training, held out).
FIRST = (
    _words("Maria John Aisha Peter Yuki Laura Omar Nina Felix Sofia Ravi Emma Jorge Hana Liam Chloe Ivan Zara Paul"),
    _words("Ingrid Carlos Priya Tom Mei Oskar Leila Bruno Anya Diego"),
)
LAST = (
    _words(
        "Lopez Smith Khan Novak Tanaka Rossi Haddad Weber Moreau Silva Patel Larsen Kim Okafor Fischer Young Petrov Ali"
    ),
    _words("Berg Mendes Nair Becker Chen Kowalski Farah Costa Dubois Marsh"),
)
DOMAINS = (
    _words("acme.com nordwind.org mail.net kato.jp silver.io lab.edu shop.eu post.fr north.ca fastmail.uk"),
    _words("peakline.com inbox.de berg.no ostra.se green.co"),
)
BOXES = (_words("info sales office help team orders"), _words("support press hello"))


def _names(held_out: int) -> tuple[str, ...]:
    return tuple(f"{first} {last}" for first in FIRST[held_out] for last in LAST[held_out])


def _emails(held_out: int) -> tuple[str, ...]:
    boxes = [*BOXES[held_out], *(first.lower() for first in FIRST[held_out]), *(x.lower() for x in LAST[held_out])]
    return tuple(f"{box}@{domain}" for box in boxes for domain in DOMAINS[held_out])


# Field -> (values in training, values in the held-out split); whole numbers are answered as JSON numbers.
VALUES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "name": (_names(0), _names(1)),
    "city": (
        _words("Berlin Toronto Nairobi Lyon Osaka Chicago Porto Delhi Lima Oslo Boston Cairo Milan Perth Hanoi"),
        _words("Helsinki Bogota Prague Sydney Ghent Denver Tunis"),
    ),
    "item": (
        (
            *_words("lamps chairs notebooks tents shirts mirrors batteries carpets pens helmets cables boots shelves"),
            *("red bikes", "phone cases", "coffee mugs", "wooden spoons", "garden hoses", "blue towels"),
        ),
        ("backpacks", "steel bottles", "keyboards", "wool socks", "clocks", "paper bags", "umbrellas"),
    ),
    "company": (
        (
            *_words("Acme Nordwind Hartmann Silverline Orbit Castor Delphin Vertex Lumen Rivera Quanta"),
            *("Bluefin Labs", "Kato Foods", "Stone Bank", "Alpine Air", "Maple Works"),
        ),
        ("Ostra Energy", "Peakline", "Greenfield", "Helix Bio", "Nova Print"),
    ),
    "topic": (
        (
            *("the budget", "hiring plans", "the new website", "safety rules", "the spring sale", "data privacy"),
            *("summer hours", "the test results", "shipping delays", "the annual report", "solar panels"),
        ),
        ("travel costs", "the office move", "data backups", "the user survey", "winter tires"),
    ),
    "weekday": (("Monday", "Tuesday", "Thursday", "Saturday"), ("Wednesday", "Friday", "Sunday")),
    "time": (
        tuple(f"{hour}:{minute}" for hour in (8, 9, 10, 14, 16, 18) for minute in ("00", "15", "20", "30", "45")),
        tuple(f"{hour}:{minute}" for hour in (7, 11, 13, 17) for minute in ("05", "10", "40", "50")),
    ),
    "email": (_emails(0), _emails(1)),
    "quantity": (tuple(str(n) for n in range(2, 99, 3)), tuple(str(n) for n in range(3, 99, 3))),
    "price": (tuple(str(n) for n in range(10, 900, 7)), tuple(str(n) for n in range(12, 900, 14))),
    "room": (tuple(str(n) for n in range(101, 600, 3)), tuple(str(n) for n in range(102, 600, 3))),
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
