"""What the checks of one client share: where the server is, and one line for each check. Standard library only."""

import sys
import traceback
from collections.abc import Callable

URL, KEY, MODEL = (sys.argv[1:4] + [""] * 3)[:3]  # of the API, with /v1
MESSAGES = [{"role": "user", "content": "Name a colour of the rainbow."}]
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOL = {"type": "function", "function": WEATHER}


def tell(client: str, checks: list[Callable[[], str | None]]) -> int:
    """Runs each check, of which one that raises has failed; 1 if any did."""
    failed = 0
    for check in checks:
        name = f"{client}: {check.__name__.replace('_', ' ')}"
        try:
            print(f"ok      {name} {check() or ''}".rstrip(), flush=True)
        except Exception as error:
            failed = 1
            last = traceback.extract_tb(error.__traceback__)[1:2]
            where = f" (line {last[0].lineno})" if last else ""
            print(f"failed  {name}{where}: {type(error).__name__}: {' '.join(str(error).split())[:400]}", flush=True)
    return failed
