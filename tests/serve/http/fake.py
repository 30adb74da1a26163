"""An engine that answers by script, and a small tokenizer with a chat template that takes tools."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable

import httpx

from llmos_jax.config import ModelConfig
from llmos_jax.data.tokenizer import Tokenizer, train_bpe
from llmos_jax.serve.http.app import Served, build_app
from llmos_jax.serve.http.hooks import NullHooks
from llmos_jax.serve.request import Output, Request, TokenLogprobs

CORPUS = ["The quick brown fox jumps over the lazy dog. It is sunny in Paris, 你好 世界. " * 3] * 20
CHATML = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    "Write <tool_call>{...}</tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tokenizer(template: str | None = CHATML) -> Tokenizer:
    made = train_bpe(CORPUS, 400, special_tokens=("<|im_end|>", "<|im_start|>"))
    made.chat_template = template
    return made


def outputs(text: str, request: Request, index: int = 0, chunk: int = 1, finish: str = "stop") -> list[Output]:
    """`text` as an engine would give it: cut to max_tokens, with a stop id at its end, log-probabilities if asked."""
    tokens = tokenizer().encode(text)
    if finish == "stop":
        tokens = [*tokens, tokenizer().eos_id]
    limit = request.sampling.max_tokens
    if len(tokens) > limit:
        tokens, finish = tokens[:limit], "length"
    parts = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)] or [[]]
    told = []
    for i, part in enumerate(parts):
        entries = ()
        if request.sampling.logprobs is not None:
            entries = tuple(entry(token, request.sampling.logprobs, index) for token in part)
        asked = request.sampling.prompt_logprobs
        prompt = None
        if i == 0 and asked is not None:
            prompt = (None, *(entry(token, asked) for token in request.prompt[1:]))
        end = finish if i == len(parts) - 1 else None
        told.append(
            Output(
                request.id,
                index,
                tuple(part),
                entries,
                end,
                cached_tokens=2 if i == 0 else 0,
                prompt_logprobs=prompt,
                queued=0.25 if i == index == 0 else None,
            )
        )
    return told


def entry(token: int, count: int, index: int = 0) -> TokenLogprobs:
    """Later answers are the more likely ones."""
    top = ((token, -0.5 / (index + 1)), (7, -1.5), (9, -2.0))[:count]
    return TokenLogprobs(token, -0.5 / (index + 1), top)


Script = Callable[[Request], list[Output]]


class FakeClient:
    """Answers each request with what `script` makes of it, an output at a time.

    hang: after the script it neither goes on nor ends. closed: ids of requests whose iterator was closed early.
    """

    def __init__(self, script: Script | str = "Hello there", hang: bool = False, pause: float = 0.0):
        text = script
        self.script: Script = (lambda request: self.all(text, request)) if isinstance(text, str) else script
        self.hang, self.pause = hang, pause
        self.requests: list[Request] = []
        self.closed: list[str] = []
        self.alive = True

    @staticmethod
    def all(text: str, request: Request) -> list[Output]:
        if request.embed:
            return [Output(request.id, finish="stop", embedding=(0.6, 0.8, 0.0, 0.0), queued=0.25)]
        each = [outputs(text, request, index) for index in range(request.n)]
        longest = max(map(len, each))
        return [one[i] for i in range(longest) for one in each if i < len(one)]

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        self.requests.append(request)
        ended = False
        try:
            for output in self.script(request):
                await asyncio.sleep(self.pause)
                yield output
            if self.hang:
                await asyncio.Event().wait()
            ended = True
        finally:
            if not ended:
                self.closed.append(request.id)

    async def stats(self) -> dict:
        if not self.alive:
            raise ConnectionError("no engine")
        return {"running": 0}


class RecordingHooks(NullHooks):
    def __init__(self):
        self.calls: list[tuple] = []

    def admit(self, caller, prompt_tokens, max_tokens):
        self.calls.append(("admit", prompt_tokens, max_tokens))

    def begin(self, caller, request, model):
        self.calls.append(("begin", model))
        return request.id

    def first_token(self, ticket):
        self.calls.append(("first",))

    def token(self, ticket, count, index=0):
        self.calls.append(("token", count, index))

    def end(self, ticket, output_tokens, cached, finish, outputs):
        self.calls.append(("end", output_tokens, cached, finish, outputs))


MODEL = ModelConfig(vocab_size=400, embed_dim=4)


def app(client, hooks=None, template: str | None = CHATML, max_model_len: int = 4096, **options):
    served = Served("m", tokenizer(template), MODEL, max_model_len, {"m-french": "m"})
    return build_app(lambda: {"m": served}, client, hooks, **options)


def call(application, method: str, path: str, **options) -> httpx.Response:
    """One request, in a loop of its own."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(application, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, **options)

    return asyncio.run(go())


def post(application, path: str, body, **options) -> httpx.Response:
    return call(application, "POST", path, json=body, **options)


def data_of(response: httpx.Response) -> list[str]:
    """What stands in the "data:" lines of a stream."""
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
