"""What `check_reliability.py` asks a server, and how it judges the replies: a bare HTTP client and kinds of requests."""

import asyncio
import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MODEL = "m"  # what the served model is called
Judge = Callable[["Reply"], str]  # "" for a reply that is right, or what is wrong with it


class Reply(NamedTuple):
    """What came back. status: 0 where the connection ended before an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def events(self) -> list[dict[str, Any]]:
        """Raises ValueError where the stream does not end as it should."""
        parts = self.body.decode().split("\n\n")
        if parts[-2:] != ["data: [DONE]", ""]:
            raise ValueError("the stream ended without [DONE]")
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


async def ask(
    port: int, path: str, body: bytes = b"", key: str = "", *, method: str = "POST", leave_after: int | None = None
) -> Reply:
    """One request on a connection of its own, with nothing between us and the bytes.

    leave_after: so many bytes of the answer's body are read before the connection is torn down; 0 does not even wait
    for its head.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json", *([f"Authorization: Bearer {key}"] if key else [])]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        with contextlib.suppress(ConnectionError):  # it may answer before it has read all of a body that is too long
            await writer.drain()
        if leave_after == 0:
            await asyncio.sleep(0.02)
            return Reply(0, {}, b"")
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status, headers = int(head[0].split()[1]), {}
        for line in head[1:-2]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if leave_after is not None:
            return Reply(status, headers, await reader.read(leave_after))
        content = await reader.read(-1)
        return Reply(status, headers, _unchunked(content) if "transfer-encoding" in headers else content)
    except (ConnectionError, asyncio.IncompleteReadError):
        return Reply(0, {}, b"")
    finally:
        writer.transport.abort() if leave_after is not None else writer.close()


def _unchunked(content: bytes) -> bytes:
    """The body of a chunked answer as far as it came."""
    parts, at = [], 0
    while (end := content.find(b"\r\n", at)) >= 0 and (size := int(content[at:end], 16)):
        parts.append(content[end + 2 : end + 2 + size])
        at = end + 4 + size
    return b"".join(parts)


class Answer(NamedTuple):
    """What an answer says: the text of each choice, their finish reasons, and how many tokens they have together."""

    texts: tuple[str, ...]
    finishes: tuple[str, ...]
    tokens: int


def read_answer(reply: Reply, streamed: bool) -> Answer:
    """Raises ValueError or KeyError for what is no full answer."""
    if not streamed:
        told = reply.json()
        choices = sorted(told["choices"], key=lambda choice: choice["index"])
        texts = tuple(one["text"] if "text" in one else one["message"]["content"] for one in choices)
        return Answer(texts, tuple(one["finish_reason"] for one in choices), told["usage"]["completion_tokens"])
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    tokens = -1
    for event in reply.events():
        if "error" in event:
            raise ValueError(f"an error in the stream: {event['error']['message']}")
        for choice in event["choices"]:
            index = choice["index"]
            if index in finishes:
                raise ValueError("news of a choice that had ended")
            piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            texts[index] = texts.get(index, "") + piece
            if choice["finish_reason"]:
                finishes[index] = choice["finish_reason"]
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    order = sorted(texts)
    return Answer(tuple(texts[i] for i in order), tuple(finishes.get(i, "none") for i in order), tokens)


def answers(n: int, max_tokens: int, streamed: bool, same: Answer | None = None, form: str = "") -> Judge:
    """Full answers: as many as asked for, each with its tokens and its end.

    same: the answer of an undisturbed server. form: "" where only the length may end an answer, else the answers that
    a grammar allows, with commas.
    """

    def judge(reply: Reply) -> str:
        if reply.status != 200:
            return f"status {reply.status}: {reply.body[:120]!r}"
        try:
            told = read_answer(reply, streamed)
        except (ValueError, KeyError) as error:
            return f"no full answer: {error}"
        if same is not None:
            return "" if told == same else f"{told} is not {same}"
        if len(told.texts) != n:
            return f"{len(told.texts)} answers of {n}"
        if form:
            return "" if all(text in form.split(",") for text in told.texts) else f"{told.texts} is none of {form}"
        if told.tokens != n * max_tokens or set(told.finishes) != {"length"}:
            return f"{told.tokens} tokens of {n * max_tokens}, ended by {told.finishes}"
        return ""

    return judge


def refused(*statuses: int, says: str = "") -> Judge:
    """An error as OpenAI's API writes it, with one of these statuses."""

    def judge(reply: Reply) -> str:
        try:
            message = reply.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = ""
        if reply.status in statuses and message and says in message:
            return ""
        return f"status {reply.status}, not {' or '.join(map(str, statuses))}: {reply.body[:120]!r}"

    return judge


@dataclass
class Call:
    """One request to be made. busy: it may be refused with 429. leave_after: see `ask`."""

    kind: str
    path: str
    body: bytes
    key: str
    judge: Judge
    busy: bool = True
    leave_after: int | None = None
    tenant: str = ""
    tokens: int = 0  # of its prompt and answer, where it is answered


@dataclass
class Mix:
    """Draws calls. keys: of the tenants. vocab_size: of the model. poison: tokens that break the engine.

    samples: (body, its answer by an undisturbed server), asked again and again among the rest.
    """

    keys: dict[str, str]
    vocab_size: int
    poison: tuple[int, ...]
    seed: int = 0
    longest: int = 1200  # tokens of a prompt
    answer: int = 40  # tokens at most
    samples: list[tuple[dict[str, Any], Answer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._prefixes = [self.tokens(64) for _ in range(8)]
        self._poisoned = [self._poison() for _ in range(8)]

    def tokens(self, count: int) -> list[int]:
        """Random ones, never those of the poison."""
        allowed = range(max(self.poison, default=0) + 1, self.vocab_size)
        return self._random.choices(allowed, k=count)

    def prompt(self) -> list[int]:
        """Mostly short, sometimes long; a third of them begin as others do."""
        count = min(int(self._random.lognormvariate(4.0, 0.9)) + 1, self.longest)
        return [*(self._random.choice(self._prefixes) if self._random.random() < 0.33 else []), *self.tokens(count)]

    def sample(self) -> dict[str, Any]:
        """A body whose answer is the same each time: greedy, or drawn with a seed."""
        how = {"temperature": 0} if self._random.random() < 0.6 else {"temperature": 0.9, "seed": 7}
        return {"model": MODEL, "prompt": self.prompt(), "max_tokens": self.answer, **how}

    def draw(self, tenant: str | None = None) -> Call:
        """Any kind of call, by its share; a tenth of the clients leave."""
        tenant = tenant or self._random.choice(list(self.keys))
        kinds: dict[Callable[[str], Call], float] = {
            self.plain: 0.77,
            self.chat: 0.06,
            self.guided: 0.03,
            self.malformed: 0.05,
            self.bad_schema: 0.03,
            self.too_long: 0.006,
            self.wrong_key: 0.05,
            self.poisoned: 0.004,
        }
        if self.samples:
            kinds[self.repeated] = 0.08
        call = self._random.choices(list(kinds), list(kinds.values()))[0](tenant)
        if call.busy and self._random.random() < 0.115:  # a tenth of all
            call.leave_after = self._random.choice([0, 1, 400, 1200])
        return call

    def plain(self, tenant: str, prompt: int = 0, max_tokens: int = 0) -> Call:
        """A completion, or several to one prompt. prompt, max_tokens: exactly so many tokens."""
        n = 1 if prompt or self._random.random() < 0.95 else 2
        tokens = self.tokens(prompt) if prompt else self.prompt()
        most = max_tokens or self._random.randint(1, self.answer)
        body = {"prompt": tokens, "max_tokens": most, "temperature": self._random.choice([0, 1]), "n": n}
        return self._answered("completion", "/v1/completions", tenant, body, n * most, len(tokens), n)

    def chat(self, tenant: str) -> Call:
        words = " ".join(self._random.choices(["the", "model", "is", "not", "a", "program", "of", "one"], k=12))
        most = self._random.randint(1, self.answer)
        body = {"messages": [{"role": "user", "content": words}], "max_tokens": most}
        return self._answered("chat", "/v1/chat/completions", tenant, body, most, 0)

    def guided(self, tenant: str) -> Call:
        body = {"prompt": self.tokens(20), "max_tokens": 40, "guided_choice": ["yes", "no", "perhaps"]}
        return self._answered("grammar", "/v1/completions", tenant, body, 40, 20, form="yes,no,perhaps")

    def repeated(self, tenant: str) -> Call:
        body, same = self._random.choice(self.samples)
        size = len(body["prompt"])
        return self._answered("known answer", "/v1/completions", tenant, body, same.tokens, size, same=same)

    def _answered(
        self,
        kind: str,
        path: str,
        tenant: str,
        body: dict[str, Any],
        tokens: int,
        prompt: int,
        n: int = 1,
        same: Answer | None = None,
        form: str = "",
    ) -> Call:
        streamed = self._random.random() < 0.6
        body = {"model": MODEL, "ignore_eos": same is None and not form, **body}
        if streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        judge = answers(n, tokens // n, streamed, same, form)
        name = f"{kind}, streamed" if streamed else kind
        return Call(
            name, path, json.dumps(body).encode(), self.keys[tenant], judge, True, None, tenant, prompt + tokens
        )

    def malformed(self, tenant: str) -> Call:
        good = json.dumps({"model": MODEL, "prompt": "x"}).encode()
        bodies = [
            *(b"", b"{", good[:-3], b"[1, 2]", b'"text"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000),
            *(b'{"model": "m"}', b'{"model": "m", "prompt": 5}', b'{"model": "m", "prompt": []}'),
            *(b'{"model": "m", "prompt": "x", "max_tokens": -1}', b'{"model": "m", "prompt": "\\ud800"}'),
            *(b'{"model": "m", "prompt": [999999999]}', b'{"model": "m", "prompt": "x", "temperature": "hot"}'),
            *(b'{"model": "m", "prompt": "x", "n": 100000}', b'{"model": "m", "prompt": "x", "stop": [1]}'),
            b'{"model": "none", "prompt": "x"}',
        ]
        body = self._random.choice(bodies)
        path = self._random.choice(["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"])
        if self._random.random() < 0.02:
            body, path = b'{"prompt": "' + b"x" * (9 << 20) + b'"}', "/v1/completions"
        return Call("malformed", path, body, self.keys[tenant], refused(400, 404, 413), busy=False)

    def bad_schema(self, tenant: str) -> Call:
        forms: list[dict[str, Any]] = [
            {"guided_json": '{"type": "no such type"}'},
            {"guided_json": "{"},
            {"guided_regex": "(unclosed"},
            {"guided_regex": "(?=a)b"},
            {"guided_grammar": "start: missing"},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/none"}}}},
        ]
        body = {"model": MODEL, "prompt": "x", "max_tokens": 4, **self._random.choice(forms)}
        key = self.keys[tenant]
        return Call("bad schema", "/v1/completions", json.dumps(body).encode(), key, refused(400), busy=False)

    def too_long(self, tenant: str) -> Call:
        prompt = " one" * 100_000 if self._random.random() < 0.5 else self.tokens(100_000)
        body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 4}).encode()
        return Call("100,000 tokens", "/v1/completions", body, self.keys[tenant], refused(400), busy=False)

    def wrong_key(self, tenant: str) -> Call:
        """Keys that are no keys: none, another form, a right one with its end changed."""
        key = self._random.choice(["", "secret", "sk-llmos-" + "a" * 43, self.keys[tenant][:-4] + "zzzz"])
        path = self._random.choice(
            ["/v1/completions", "/v1/models", "/metrics", "/admin/stats", "/openapi.json", "/live"]
        )
        body = json.dumps({"model": MODEL, "prompt": WRONG_PROMPT}).encode() if path == "/v1/completions" else b""
        return Call("wrong key", path, body, key, refused(401), busy=False)

    def poisoned(self, tenant: str) -> Call:
        prompt = self._random.choice(self._poisoned) if self._random.random() < 0.5 else self._poison()
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        judge = refused(400, 500, says="the engine fail")
        return Call("poison", "/v1/completions", json.dumps(body).encode(), self.keys[tenant], judge)

    def _poison(self) -> list[int]:
        return [*self.tokens(self._random.randint(0, 60)), *self.poison, *self.tokens(5)]


WRONG_PROMPT = "what nobody without a key may leave behind"


def method(call: Call) -> str:
    return "POST" if call.path.startswith("/v1/") and call.path != "/v1/models" else "GET"
