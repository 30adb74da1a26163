"""POST /v1/embeddings."""

import base64
import struct
from contextlib import aclosing

from starlette.requests import Request

from llmos_jax.serve.http import served
from llmos_jax.serve.http.answers import Answers
from llmos_jax.serve.http.errors import ApiError, bad
from llmos_jax.serve.http.hooks import Caller
from llmos_jax.serve.http.schemas import Embedding, EmbeddingBody, Embeddings, EmbeddingUsage
from llmos_jax.serve.http.served import Service
from llmos_jax.serve.http.streams import while_connected
from llmos_jax.serve.request import Sampling


async def embed(service: Service, caller: Caller, body: EmbeddingBody, http: Request) -> Embeddings:
    """Vectors of length one, the last token's hidden state. Raises ApiError for a request that cannot be answered."""
    target = service.target(body.model)
    size = target.served.model.embed_dim
    if body.dimensions is not None and body.dimensions > size:
        raise bad(f"dimensions={body.dimensions} is more than the model's {size}", "dimensions")
    prompts = await served.prompts(target, body.input, "input")
    for prompt in prompts:
        served.room(target, prompt, 1, "input")
    how = Sampling(max_tokens=1, temperature=0.0)
    requests = [served.request(caller, target, prompt, how, embed=True) for prompt in prompts]
    answers = Answers(service, caller, body.model, requests, target.tokenizer)
    vectors = await while_connected(http, _vectors(answers))
    return Embeddings(
        object="list",
        model=body.model,
        data=[
            Embedding(object="embedding", index=i, embedding=_written(_cut(vector, body.dimensions), body))
            for i, vector in enumerate(vectors)
        ],
        usage=EmbeddingUsage(prompt_tokens=answers.prompt_tokens, total_tokens=answers.prompt_tokens),
    )


async def _vectors(answers: Answers) -> list[tuple[float, ...]]:
    found: dict[int, tuple[float, ...]] = {}
    async with aclosing(answers.pieces()) as pieces:
        async for piece in pieces:
            if piece.embedding is not None:
                found[piece.prompt] = piece.embedding
    if len(found) != len(answers.requests):
        raise ApiError(500, "the engine gave no vector for a prompt")
    return [found[number] for number in range(len(found))]


def _cut(vector: tuple[float, ...], dimensions: int | None) -> tuple[float, ...]:
    """The first dimensions, of length one again."""
    if dimensions is None or dimensions == len(vector):
        return vector
    cut = vector[:dimensions]
    norm = max(sum(value * value for value in cut) ** 0.5, 1e-12)
    return tuple(value / norm for value in cut)


def _written(vector: tuple[float, ...], body: EmbeddingBody) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)
