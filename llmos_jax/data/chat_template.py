"""Chat templates, as transformers runs them: Jinja in a sandbox."""

import datetime
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from llmos_jax.config import UserError


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that `template` makes of `variables`; UserError with its own words where it refuses them."""
    try:
        return _environment().from_string(template).render(variables)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template does not take these messages: {error}") from error


class _Generation(jinja2.ext.Extension):
    """{% generation %}, by which templates mark the model's own words for training: the body as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
