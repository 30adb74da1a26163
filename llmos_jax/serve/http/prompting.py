"""A conversation as the model reads it: messages and tools through the chat template, and what tool_choice forces."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmos_jax.config import UserError
from llmos_jax.serve.http.answers import Piece
from llmos_jax.serve.http.errors import bad
from llmos_jax.serve.http.schemas import Message, NamedTool, Tool
from llmos_jax.serve.http.served import Target
from llmos_jax.serve.http.tools import (
    Call,
    CallParser,
    forcing,
    form_of,
    marks_are_special,
    template_takes_tools,
    with_system_text,
)
from llmos_jax.serve.request import Grammar, Token

OURS = {"self", "messages", "add_generation_prompt", "tools"}  # variables of the template that a client cannot set


@dataclass(frozen=True)
class ToolUse:
    """What tools an answer may use. form: how the model writes calls; grammar: where a call is forced."""

    tools: list[dict[str, Any]]
    form: str
    grammar: Grammar | None
    max_calls: int | None
    skip_special: bool

    def reader(self) -> "Reader":
        if not self.tools:
            return Reader(None)
        names = {tool["function"]["name"] for tool in self.tools}
        return Reader(CallParser(self.form, names, self.max_calls))


class Reader:
    """Reads one answer: its texts and calls in order, the same whether its pieces come one by one or at once."""

    def __init__(self, parser: CallParser | None):
        self.parser = parser
        self.finish: str | None = None
        self.text: str | None = None
        self.calls: list[Call] = []

    def read(self, piece: Piece) -> list[str | Call]:
        """What is new. After the last piece, `finish` is "stop", "length" or "tool_calls"."""
        found: list[str | Call]
        if self.parser is None:
            found = [piece.text] if piece.text else []
        else:
            found = self.parser.feed(piece.text) + (self.parser.finish() if piece.finish else [])
        for one in found:
            if isinstance(one, str):
                self.text = (self.text or "") + one
            else:
                self.calls.append(one)
        if piece.finish:
            self.finish = "tool_calls" if self.calls and piece.finish == "stop" else piece.finish
        return found


def tool_use(
    target: Target, tools: Sequence[Tool] | None, choice: str | NamedTool | None, parallel: bool | None
) -> ToolUse:
    """Raises ApiError 400 for a choice that the tools do not have."""
    given = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    name = choice.function.name if isinstance(choice, NamedTool) else None
    if name is not None and all(tool["function"]["name"] != name for tool in given):
        raise bad(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
    if choice == "required" and not given:
        raise bad("tool_choice is required, but there are no tools", "tool_choice")
    if choice == "none" or not given:
        return ToolUse([], "", None, None, True)
    form, several = form_of(target.tokenizer), parallel is not False and name is None
    forced = [tool for tool in given if name in (None, tool["function"]["name"])]
    grammar = forcing(form, forced, several) if name is not None or choice == "required" else None
    return ToolUse(given, form, grammar, None if several else 1, not marks_are_special(target.tokenizer, form))


async def conversation(
    target: Target,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    add_generation_prompt: bool = True,
    variables: dict[str, Any] | None = None,
) -> list[Token]:
    """The tokens of a conversation. Raises ApiError 400 with the template's own words where it refuses it."""
    variables = dict(variables or {})
    taken = OURS & variables.keys()
    if taken:
        raise bad(f"chat_template_kwargs: {min(taken)} is set by the server", "chat_template_kwargs")
    tokenizer = target.tokenizer
    if tools and template_takes_tools(tokenizer):
        variables["tools"] = tools
    elif tools or (_have_calls(messages) and not template_takes_tools(tokenizer)):
        messages = with_system_text(messages, tools)
    try:
        return await asyncio.to_thread(tokenizer.chat, messages, add_generation_prompt, **variables)
    except UserError as error:
        raise bad(str(error), "messages") from None
    except Exception as error:  # a template runs what the client sent: whatever it stumbles over is the client's
        raise bad(f"the chat template does not take these messages: {error!r}", "messages") from None


def _have_calls(messages: list[dict[str, Any]]) -> bool:
    return any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def as_template_takes(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: text as one string, arguments of calls as an object.

    Raises ApiError 400 for a part that is no text.
    """
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _message(message: Message, place: str) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    told: dict[str, Any] = {"role": role, "content": _text(message, place)}
    if message.name is not None:
        told["name"] = message.name
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        told["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": call.function.name, "arguments": arguments(call.function.arguments)},
            }
            | ({"id": call.id} if call.id else {})
            for call in message.tool_calls
        ]
    return told


def _text(message: Message, place: str) -> str:
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    texts = []
    for i, part in enumerate(message.content):
        if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
            raise bad(
                f"{place}.content.{i}: a part of type {part.type!r} is not read; give text parts only", "messages"
            )
        texts.append(part.text)
    return "\n".join(texts)


def arguments(given: str | dict[str, Any] | None) -> Any:
    """The arguments of a call as an object where they are one."""
    if not isinstance(given, str):
        return given or {}
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return value if isinstance(value, dict) else given
