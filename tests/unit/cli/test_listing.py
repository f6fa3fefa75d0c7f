from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    ("topic", "known"),
    [("kinds", "lora"), ("schemes", "int8"), ("devices", "raspberry-pi-5"), ("recipes", "smollm2-chat")],
)
def test_each_topic_lists_names_with_summaries(invoke, topic, known):
    as_json = invoke("list", topic, "--json")
    assert (as_json.exit_code, as_json.stderr) == (0, "")
    rows = json.loads(as_json.stdout)
    assert known in [row["name"] for row in rows]
    assert all(row["summary"] for row in rows)
    plain = invoke("list", topic)
    assert [line.split()[0] for line in plain.stdout.splitlines()] == [row["name"] for row in rows]
    assert plain.stderr == ""
