"""Chat messages to one text by the model's own jinja template, rendered as transformers renders it."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from edgeadapt.errors import SessionError

Message = Mapping[str, Any]


def render_chat(template: str, messages: Sequence[Message], special_tokens: Mapping[str, str]) -> str:
    """Return the conversation as text, ending where the assistant's answer begins.

    The template comes with the bundle, so it runs in jinja's immutable sandbox.

    Raises:
        SessionError: if a message lacks role or content, or the template is broken or refuses the messages.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise SessionError("chat templates need jinja2, which is not installed", hint="pip install jinja2") from error
    _check_messages(messages)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_tag()]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **special_tokens,
        )
    except TemplateError as error:
        raise SessionError(
            f"the bundle's chat template failed: {error}", hint="check the order of roles, or give a plain text prompt"
        ) from error


def _check_messages(messages: Sequence[object]) -> None:
    hint = 'give messages such as [{"role": "user", "content": "Hello"}]'
    if not messages:
        raise SessionError("there are no chat messages", hint=hint)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise SessionError(f"chat message {index} is {message!r}", hint=hint)


def _generation_tag() -> Any:
    """Return a jinja extension for {% generation %}, which marks the assistant's text in training and shows nothing."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja's own filter escapes HTML, which no model was trained on
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now().astimezone().strftime(pattern)
