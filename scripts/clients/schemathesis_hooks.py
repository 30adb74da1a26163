"""What schemathesis cannot know from the document: the model's name, and what would end or outlast the check."""

import os

import schemathesis

MODEL, KEY_ID = os.environ["LLMOS_MODEL"], os.environ["LLMOS_KEY_ID"]
MOST = 4  # answers to one prompt: more take time and show nothing else


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
    if case.path_parameters.get("id") == KEY_ID:
        case.path_parameters["id"] = "key-none"
