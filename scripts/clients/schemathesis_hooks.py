"""What schemathesis cannot know from the document: the model and its tokens, and what would end or outlast the check."""

import os

import schemathesis

MODEL, KEY_ID = os.environ["LLMOS_MODEL"], os.environ["LLMOS_KEY_ID"]
MOST = 4  # answers to one prompt: more take time and show nothing else
TOKENS = 1000  # tokens from here on are another model's, perhaps
# Fields that fit the document and yet are refused most of the time, in any combination that was not thought of.
DEMANDING = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "response_format", "text", "tool_choice")
DEMANDING += ("best_of", "suffix", "logit_bias", "stop_token_ids", "top_logprobs", "previous_response_id")


@schemathesis.hook
def before_call(context, case, kwargs) -> None:
    """Bodies name the model that is served, most of the time; the key that the check itself uses is not revoked."""
    body = case.body
    if isinstance(body, dict):
        if isinstance(body.get("model"), str) and not body["model"].startswith("0"):
            body["model"] = MODEL
        for name in ("n", "best_of"):
            if isinstance(body.get(name), int) and MOST < body[name] <= 128:
                body[name] = MOST
        if case.meta is not None and case.meta.generation.mode.is_positive:
            make_answerable(body)
    if case.path_parameters.get("id") == KEY_ID:
        case.path_parameters["id"] = "key-none"


def make_answerable(body: dict) -> None:
    """Half of the bodies that fit ask for nothing hard, so that the answers are tested and not the refusals alone."""
    for name in ("prompt", "input", "tokens"):
        if isinstance(body.get(name), list):
            body[name] = known(body[name])
    if len(str(body)) % 2:
        for name in DEMANDING:
            body.pop(name, None)


def known(tokens: list) -> list:
    return [
        known(one) if isinstance(one, list) else one % TOKENS if type(one) in (int, float) else one for one in tokens
    ]
