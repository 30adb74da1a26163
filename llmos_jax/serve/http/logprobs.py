"""Log-probabilities as OpenAI's two forms write them, with tokens spelled so that no byte is lost."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.serve.http.schemas import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from llmos_jax.serve.request import Token, TokenLogprobs
from llmos_jax.serve.text import token_bytes

_BYTES: WeakKeyDictionary[Tokenizer, list[bytes | None]] = WeakKeyDictionary()
LEAST = -9999.0  # JSON has no minus infinity


def bytes_of(tokenizer: Tokenizer, token: Token) -> bytes | None:
    """The bytes that a token stands for; None for a control token."""
    if tokenizer not in _BYTES:
        _BYTES[tokenizer] = token_bytes(tokenizer)
    known = _BYTES[tokenizer]
    return known[token] if token < len(known) else None


def spelled(tokenizer: Tokenizer, token: Token) -> str:
    """A token as text; where it is a part of a character, its bytes: "bytes:\\xe2\\x82"."""
    raw = bytes_of(tokenizer, token)
    if raw is None:
        return tokenizer.token(token) or f"<unused{token}>"
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _number(value: float) -> float:
    return max(value, LEAST)


def of_chat(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    def one(token: Token, logprob: float) -> dict:
        raw = bytes_of(tokenizer, token)
        return {
            "token": spelled(tokenizer, token),
            "logprob": _number(logprob),
            "bytes": None if raw is None else list(raw),
        }

    return ChatLogprobs(
        content=[
            ChatLogprob(
                **one(entry.token, entry.logprob),
                top_logprobs=[TopLogprob(**one(token, logprob)) for token, logprob in entry.top],
            )
            for entry in entries
        ]
    )


def of_completion(
    tokenizer: Tokenizer, tokens: Sequence[Token], entries: Sequence[TokenLogprobs | None], offset: int = 0
) -> CompletionLogprobs:
    """tokens: those of `entries`, which are None where there is none, as for the first of a prompt.

    The drawn token is among the likeliest ones told, as the one more where it is none of them. offset: where the text
    of the tokens begins.
    """
    texts = [spelled(tokenizer, token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[None if entry is None else _number(entry.logprob) for entry in entries],
        top_logprobs=[None if entry is None else _top(tokenizer, entry) for entry in entries],
        text_offset=offsets,
    )


def _top(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, float]:
    told: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        told.setdefault(spelled(tokenizer, token), _number(logprob))  # of two spelled alike, the likelier
    return told
