"""A byte tokenizer, so that these tests know every token."""

from dataclasses import dataclass

import pytest


@dataclass
class ByteTokenizer:
    vocab_size: int = 257
    eos_id: int | None = 256
    fingerprint: str = "bytes"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


@pytest.fixture(scope="session")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> type[ByteTokenizer]:
    return ByteTokenizer
