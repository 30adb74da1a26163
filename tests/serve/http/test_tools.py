"""Calls in answers: found in every form, the same however the text arrives, and forced by grammars that work."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.serve.http import tools
from llmos_jax.serve.http.tools import HERMES, LLAMA, MISTRAL, Call, CallParser
from llmos_jax.serve.structured import Structure, Vocabulary
from tests.serve.http import fake

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "a } </tool_call> \\" b"}}\n</tool_call>'
ARGUMENTS = {"city": 'a } </tool_call> " b'}


def parsed(form: str, parts: list[str], **options) -> list:
    """What a parser finds: texts joined, and calls as (name, arguments)."""
    parser = CallParser(form, ("weather", "time"), **options)
    found = [one for part in parts for one in parser.feed(part)] + parser.finish()
    joined: list = []
    for one in found:
        if isinstance(one, Call):
            joined.append((one.name, json.loads(one.arguments)))
        elif joined and isinstance(joined[-1], str):
            joined[-1] += one
        else:
            joined.append(one)
    return joined


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (HERMES, HERMES_CALL, [("weather", ARGUMENTS)]),
        (HERMES, f"Let me see.\n\n{HERMES_CALL}\n", ["Let me see.", ("weather", ARGUMENTS)]),
        (HERMES, f"{HERMES_CALL}\n{HERMES_CALL}", [("weather", ARGUMENTS)] * 2),
        (HERMES, f"{HERMES_CALL} Done.", [("weather", ARGUMENTS), " Done."]),
        (HERMES, '<tool_call>{"name": "time", "arguments": {}}', [("time", {})]),
        (HERMES, "<tool_call>{broken}</tool_call>", ["<tool_call>{broken}</tool_call>"]),
        (HERMES, '<tool_call>{"name": "tim', ['<tool_call>{"name": "tim']),
        (HERMES, "a < b <tool and <<tool_call", ["a < b <tool and <<tool_call"]),
        (HERMES, '{"name": "time", "arguments": {}}', ['{"name": "time", "arguments": {}}']),
        (LLAMA, '{"name": "time", "parameters": {"a": 1}}', [("time", {"a": 1})]),
        (LLAMA, '<|python_tag|>{"name": "time", "parameters": {}}', [("time", {})]),
        (LLAMA, '{"name": "time", "parameters": {}}; {"name": "weather", "parameters": {}}', ["time", "weather"]),
        (LLAMA, '{"name": "Ann", "age": 7}', ['{"name": "Ann", "age": 7}']),
        (LLAMA, 'See {"name": "time"}', ['See {"name": "time"}']),
        (MISTRAL, '[TOOL_CALLS] [{"name": "time", "arguments": {}}, {"name": "weather"}]', ["time", "weather"]),
        (MISTRAL, "[TOOL_CALLS] [1, 2]", ["[TOOL_CALLS] [1, 2]"]),
        (MISTRAL, " an [aside] ", [" an [aside] "]),
    ],
)
def test_calls_are_found(form, text, expected):
    expected = [(one, {}) if one in ("time", "weather") else one for one in expected]
    assert parsed(form, [text]) == expected


PIECES = [
    HERMES_CALL,
    "<tool_call>",
    "</tool_call>",
    "<tool",
    " \n",
    "text",
    '{"name": "time", "parameters": {}}',
    ";",
    "[TOOL_CALLS]",
    '[{"name": "time"}]',
    "<|python_tag|>",
    "{",
    "}",
    '"',
    "\\",
]


@given(st.sampled_from([HERMES, LLAMA, MISTRAL]), st.lists(st.sampled_from(PIECES), max_size=8), st.data())
def test_any_split_of_a_text_gives_the_same(form, pieces, data):
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(parts) == text
    assert parsed(form, parts) == parsed(form, [text]) == parsed(form, list(text))


@given(st.text(alphabet="<tol_ca>[]TOOLCALSx \n", max_size=60))
def test_text_without_calls_stays_as_it_is(text):
    for form in (HERMES, MISTRAL, LLAMA):
        assert "".join(parsed(form, list(text))) == text


def test_no_more_calls_than_wanted():
    assert parsed(HERMES, [HERMES_CALL * 3], max_calls=1) == [("weather", ARGUMENTS)]


def test_text_is_not_held_back_longer_than_needed():
    parser = CallParser(HERMES)
    assert parser.feed("Hello") == ["Hello"]
    assert parser.feed(" <tool") == []
    assert parser.feed("box") == [" <toolbox"]


@pytest.mark.parametrize("form", [HERMES, LLAMA, MISTRAL])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_forced_call_is_one_that_the_parser_finds(form, parallel):
    """The grammar admits what the model's form demands, and nothing else; and the parser reads it."""
    grammar = tools.forcing(form, [WEATHER, TIME], parallel)
    key = "parameters" if form == LLAMA else "arguments"
    one = json.dumps({"name": "weather", key: {"city": "Paris"}})
    texts = {
        HERMES: [f"<tool_call>\n{one}\n</tool_call>", "\n"],
        LLAMA: [one, "; "],
        MISTRAL: [f"[TOOL_CALLS] [{one}]", ""],
    }
    text, between = texts[form]
    assert follows(grammar, text)
    assert parsed(form, [text]) == [("weather", {"city": "Paris"})]
    assert not follows(grammar, "Hello")
    assert not follows(grammar, text.replace("weather", "other"))
    if form != MISTRAL:
        assert follows(grammar, text + between + text) is parallel


def follows(grammar, text: str) -> bool:
    structure = Structure(Vocabulary(fake.tokenizer(), 400), grammar)
    try:
        for token in fake.tokenizer().encode(text):
            if structure.is_complete:
                return False
            structure.accept(token)
    except ValueError:
        return False
    return structure.may_end


def test_the_form_follows_from_the_template():
    for template, form in {
        "{{ tools }} <tool_call>": HERMES,
        "[TOOL_CALLS] {{ tools }}": MISTRAL,
        "<|python_tag|> {{ tools }}": LLAMA,
        "{{ messages }}": HERMES,
    }.items():
        assert tools.form_of(fake.tokenizer(template)) == form


def test_tools_become_a_system_text_where_the_template_takes_none():
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": {}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon"},
    ]
    told = tools.with_system_text(messages, [TIME])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.") and '"name": "time"' in told[0]["content"]
    assert parsed(HERMES, [told[2]["content"]]) == [("time", {})]
    assert "noon" in told[3]["content"]
