from __future__ import annotations

import builtins
import datetime as dt

import pytest

from edgeadapt.errors import SessionError
from edgeadapt.runtime.chat import render_chat

USER = [{"role": "user", "content": "<b>héllo</b>"}]


def test_blocks_are_trimmed_like_transformers():
    template = """{% for m in messages %}
    {% if m.role == 'user' %}
[{{ m.content }}]
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ bos_token }}>{% endif %}"""
    assert render_chat(template, USER, {"bos_token": "<s>"}) == "[<b>héllo</b>]\n<s>>"


def test_it_equals_transformers_own_rendering():
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index0 > 1 %}{% break %}{% endif %}\n"
        "  {{ m | tojson(indent=2) }}{{ m.content | trim }}\n{% endfor %}{{ strftime_now('%Y') }}"
        "{% generation %}what {{ messages[0].role }} said{% endgeneration %}"
    )
    messages = [*USER, {"role": "assistant", "content": " a "}, {"role": "user", "content": "dropped"}]
    expected, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, bos_token="<s>")
    assert render_chat(template, messages, {"bos_token": "<s>"}) == expected[0]


def test_the_date_is_at_hand():
    year = str(dt.datetime.now(dt.UTC).astimezone().year)
    assert render_chat("{{ strftime_now('%Y') }}", USER, {}) == year


def test_a_template_may_refuse():
    with pytest.raises(SessionError) as caught:
        render_chat("{{ raise_exception('roles must alternate') }}", USER, {})
    assert str(caught.value) == (
        "the bundle's chat template failed: roles must alternate\n"
        "Hint: check the order of roles, or give a plain text prompt"
    )


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for %}"])
def test_a_template_cannot_leave_its_sandbox(template):
    with pytest.raises(SessionError, match="the bundle's chat template failed: "):
        render_chat(template, USER, {})


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "there are no chat messages"),
        ([{"role": "user"}], "chat message 0 is {'role': 'user'}"),
        ([*USER, "hello"], "chat message 1 is 'hello'"),
        ([{"role": 1, "content": "x"}], "chat message 0 is {'role': 1, 'content': 'x'}"),
    ],
)
def test_messages_are_checked(messages, said):
    with pytest.raises(SessionError) as caught:
        render_chat("", messages, {})
    assert str(caught.value) == f'{said}\nHint: give messages such as [{{"role": "user", "content": "Hello"}}]'


def test_without_jinja_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("jinja2"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SessionError) as caught:
        render_chat("", USER, {})
    assert str(caught.value) == "chat templates need jinja2, which is not installed\nHint: pip install jinja2"
