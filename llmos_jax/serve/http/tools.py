"""Tool calls: how they are asked for, forced by a grammar, and found in an answer, whether streamed or whole."""

import json
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.serve.request import Grammar

HERMES, LLAMA, MISTRAL = "hermes", "llama", "mistral"
_MARKS = {HERMES: ("<tool_call>",), LLAMA: ("<|python_tag|>",), MISTRAL: ("[TOOL_CALLS]",)}
_CLOSE = "</tool_call>"

_SYSTEM = """You may call these functions; each is described by a JSON object:
<tools>
{tools}
</tools>
To call a function, answer with its name and arguments as JSON between these tags, once for each call:
<tool_call>
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Call:
    id: str
    name: str
    arguments: str  # JSON


def form_of(tokenizer: Tokenizer) -> str:
    """How the model writes calls, by its chat template; Hermes' form where the template tells nothing."""
    template = tokenizer.chat_template or ""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" not in template and ("<|python_tag|>" in template or '"parameters"' in template):
        return LLAMA
    return HERMES


def template_takes_tools(tokenizer: Tokenizer) -> bool:
    return re.search(r"\btools\b", tokenizer.chat_template or "") is not None


def marks_are_special(tokenizer: Tokenizer, form: str) -> bool:
    """Whether the mark of a call is a control token, which decoding would leave out."""
    ids = [tokenizer.backend.token_to_id(mark) for mark in _MARKS[form]]
    return any(i is not None and not tokenizer.decode([i]) for i in ids)


def with_system_text(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For a template that takes no tools: they stand in the system text, and calls and results are text too."""
    text = _SYSTEM.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    rest = messages[1:] if first else messages
    if first and first.get("content"):
        text = f"{first['content']}\n\n{text}"
    return [{"role": "system", "content": text}, *(_as_text(message) for message in rest)]


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = ["<tool_call>\n" + json.dumps(call["function"], ensure_ascii=False) + f"\n{_CLOSE}" for call in calls]
    return {"role": message["role"], "content": "\n".join(filter(None, [message.get("content"), *written]))}


def forcing(form: str, tools: Sequence[dict[str, Any]], parallel: bool) -> Grammar:
    """The grammar of an answer that is one call of one of `tools`, or, if parallel, one or more."""
    key = "parameters" if form == LLAMA else "arguments"
    schemas = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, key: _parameters(tool["function"])},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if form == MISTRAL:
        items = {"type": "array", "items": schema, "minItems": 1} | ({} if parallel else {"maxItems": 1})
        return Grammar("lark", f'start: "[TOOL_CALLS] " calls\ncalls: %json {json.dumps(items)}\n')
    if form == LLAMA:
        more = ' ("; " call)*' if parallel else ""
        return Grammar("lark", f"start: call{more}\ncall: %json {json.dumps(schema)}\n")
    more = ' ("\\n" call)*' if parallel else ""
    call = f'call: "<tool_call>\\n" body "\\n{_CLOSE}"'
    return Grammar("lark", f"start: call{more}\n{call}\nbody: %json {json.dumps(schema)}\n")


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    given = function.get("parameters") or {"properties": {}}
    return given if "type" in given or "$ref" in given or "anyOf" in given else {"type": "object", **given}


class CallParser:
    """Finds the calls in an answer, character by character, so that it finds the same however the text arrives.

    `feed` and `finish` return what is certain by then: texts and calls in order. A call is given when its JSON is
    complete. What looks like a call and is none (its JSON is broken, or it names nothing) is text. White space around
    calls is dropped.

    names: the functions there are. A call without a mark, which only Llama's form has, must name one of them, and must
    begin the answer.
    """

    def __init__(self, form: str, names: Collection[str] = (), max_calls: int | None = None):
        self.form, self._names, self._marks = form, names, _MARKS[form]
        self._max_calls = max_calls
        self.calls: list[Call] = []
        self._state = "start"  # start | text | lead (after a mark) | json | after (a call)
        self._held = ""  # not given out yet: white space and perhaps the beginning of a mark; or the call so far
        self._lead = ""  # what stood before the call: white space and a mark
        self._json = _JsonEnd()
        self._found: list[str | Call] = []

    def feed(self, text: str) -> list[str | Call]:
        for character in text:
            self._step(character)
        return self._take()

    def finish(self) -> list[str | Call]:
        if self._state == "after":
            # What may stand after a call, whole or broken off, is no text.
            rest = self._held.strip()
            if rest and not any(one.startswith(rest) for one in (_CLOSE, ";", ",")):
                self._say(self._held.lstrip())
        elif not (self.calls and self._held.isspace()):
            self._say(self._lead + self._held if self._state == "json" else self._held)
        self._held = ""
        return self._take()

    def _take(self) -> list[str | Call]:
        found: list[str | Call] = []
        for one in self._found:
            if isinstance(one, str) and found and isinstance(found[-1], str):
                found[-1] += one
            else:
                found.append(one)
        self._found = []
        return found

    def _say(self, text: str) -> None:
        if text:
            self._found.append(text)

    def _step(self, character: str) -> None:
        getattr(self, f"_in_{self._state}")(character)

    def _in_start(self, character: str) -> None:
        """Before the first character that is not white space."""
        if character.isspace():
            self._held += character
        elif self.form == LLAMA and character == "{":
            self._open(character)
        else:
            self._state = "text"
            self._in_text(character)

    def _in_text(self, character: str) -> None:
        self._held += character
        mark = self._held.lstrip()
        if mark in self._marks:
            self._state = "lead"
            return
        # Keep back the longest end that is white space and the beginning of a mark.
        keep = _possible(self._held, self._marks)
        self._say(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]

    def _in_lead(self, character: str) -> None:
        if character.isspace():
            self._held += character
        elif character in "{[":
            self._open(character)
        else:
            self._no_call(character)

    def _open(self, character: str) -> None:
        self._lead, self._held = self._held, ""
        self._state, self._json = "json", _JsonEnd()
        self._in_json(character)

    def _in_json(self, character: str) -> None:
        self._held += character
        if self._json.step(character):
            return
        calls = self._calls_in(self._held)
        if calls is None:
            text, self._held, self._state = self._lead + self._held, "", "text"
            self._say(text)
            return
        room = len(calls) if self._max_calls is None else self._max_calls - len(self.calls)
        self.calls += calls[: max(0, room)]
        self._found += calls[: max(0, room)]
        self._held, self._state = "", "after"

    def _in_after(self, character: str) -> None:
        self._held += character
        rest = self._held.strip()
        if not rest:
            return
        if self.form == HERMES and _CLOSE.startswith(rest):
            if rest == _CLOSE:
                self._held, self._state = "", "text"
            return
        if self.form == LLAMA and rest in (";", ","):
            return
        if self.form == LLAMA and rest[-1] == "{" and rest[:-1].strip() in (";", ",", ""):
            self._held = self._held[:-1]
            self._open(character)
            return
        text, self._held, self._state = self._held.lstrip(), "", "text"
        for one in text:
            self._in_text(one)

    def _no_call(self, character: str) -> None:
        text, self._held, self._state = self._held, "", "text"
        self._say(text)
        self._in_text(character)

    def _calls_in(self, text: str) -> list[Call] | None:
        try:
            value = json.loads(text, strict=False, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
        values = value if isinstance(value, list) else [value]
        calls = [self._call(one) for one in values]
        found = [call for call in calls if call is not None]
        return found if found and len(found) == len(calls) else None

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
            return None
        marked = any(mark in self._lead for mark in self._marks) or bool(self.calls)
        if not marked and value["name"] not in self._names:
            return None
        arguments: Any = next((value[key] for key in ("arguments", "parameters") if key in value), {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return Call(new_call_id(self.form), value["name"], text)


class _JsonEnd:
    """Where a JSON object or list ends."""

    def __init__(self) -> None:
        self.depth, self.in_text, self.escaped = 0, False, False

    def step(self, character: str) -> bool:
        """Whether the value goes on after `character`."""
        if self.in_text:
            if self.escaped:
                self.escaped = False
            elif character == "\\":
                self.escaped = True
            elif character == '"':
                self.in_text = False
        elif character == '"':
            self.in_text = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
        return self.depth > 0


def new_call_id(form: str = HERMES) -> str:
    """Mistral's templates insist on nine letters or digits."""
    return secrets.token_hex(5)[:9] if form == MISTRAL else f"call_{secrets.token_hex(12)}"


def _possible(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` are white space followed by the beginning of a mark."""
    longest = max(
        (size for mark in marks for size in range(1, len(mark)) if text.endswith(mark[:size])),
        default=0,
    )
    before = text[: len(text) - longest]
    return longest + len(before) - len(before.rstrip())


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
