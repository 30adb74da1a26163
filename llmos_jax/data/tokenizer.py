"""Text to tokens and back, chat templates, and text that arrives token by token.

One class for a `tokenizer.json`, a SentencePiece model, the tokenizer inside a GGUF, and a freshly trained BPE.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from llmos_jax.config import ModelConfig, UserError
from llmos_jax.data import json_backend, sentencepiece_backend

END_OF_TEXT = "<|endoftext|>"
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
GgufFields = Callable[[Path], Mapping[str, Any]]


class Backend(Protocol):
    vocab_size: int
    controls: re.Pattern[str]  # the texts of control tokens

    def encode(self, text: str, special: bool) -> list[int]: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, i: int) -> str | None: ...
    def identity(self) -> bytes: ...
    def save(self, folder: Path) -> None: ...


class Tokenizer:
    """`vocab_size` is the highest id plus one; `eos_ids` are all ids that end an answer, `eos_id` the first of them.

    `pad_id` is that of `eos_id` where the tokenizer has none of its own.
    """

    def __init__(
        self,
        backend: Backend,
        special: dict[str, str | None],
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        """`special`: texts by name ("bos_token", ...); `config`: the tokenizer_config.json it came with."""
        self.backend = backend
        self.special = {name: text for name, text in special.items() if text is not None}
        self.vocab_size = backend.vocab_size
        self.bos_id, eos_id, pad_id = (self._id(name) for name in ("bos_token", "eos_token", "pad_token"))
        self.eos_ids = tuple(dict.fromkeys(([] if eos_id is None else [eos_id]) + list(eos_ids)))
        self.eos_id = self.eos_ids[0] if self.eos_ids else None
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.add_bos = add_bos and self.bos_id is not None
        self.chat_template = chat_template
        self.config = config or {}

    def _id(self, name: str) -> int | None:
        text = self.special.get(name)
        return None if text is None else self.backend.token_to_id(text)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of all that decides which tokens a text becomes and which of them ends it."""
        ids = repr((self.bos_id, self.eos_ids, self.pad_id)).encode()
        return hashlib.sha256(self.backend.identity() + ids).hexdigest()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of `text`, with nothing added.

        special: whether "<|im_end|>" and its like in the text become the tokens of that name. By default they are
        plain text, so that no document or user can write a control token.
        """
        return self.backend.encode(text, special)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in parallel threads."""
        return self.backend.encode_batch(texts)

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens a model continues: with BOS in front where the tokenizer's own configuration asks for it."""
        bos = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        return bos + self.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special)

    def token(self, i: int) -> str | None:
        """The text of one token as the vocabulary writes it; None for an id it does not have."""
        return self.backend.id_to_token(i)

    def chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """The tokens of a conversation in the model's own format; see `render_chat`.

        Control tokens come from the template alone: "<|im_end|>" and its like inside a message are plain text.
        """
        held: list[str] = []
        messages, variables = (_without(self.backend.controls, given, held) for given in (messages, variables))
        parts = _HELD.split(self.render_chat(messages, add_generation_prompt, **variables))
        ids = [self.encode(text, special=True) for text in parts[::2]]
        for i, number in enumerate(parts[1::2]):
            ids[i] += self.encode(held[int(number)]) if int(number) < len(held) else []
        return [token for part in ids for token in part]

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as the chat template writes it.

        Args:
          messages: [{"role": "user", "content": "..."}, ...].
          add_generation_prompt: end with what stands before the model's answer.
          variables: further ones for the template, as `tools` or `enable_thinking`.

        Raises UserError without a template, and with the template's own words where it refuses the messages.
        """
        if self.chat_template is None:
            raise UserError("this tokenizer has no chat template; use an instruct model, or give a plain prompt")
        from llmos_jax.data import chat_template  # its library is slow to import, and only conversations need it

        defaults = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        special = dict.fromkeys(_SPECIAL_NAMES, "") | self.special
        return chat_template.render(self.chat_template, defaults | special | variables)

    def stream(self, skip_special: bool = True) -> "StreamDecoder":
        return StreamDecoder(self, skip_special)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files as transformers reads them, with the ids that end an answer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(folder)
        is_json = isinstance(self.backend, json_backend.JsonBackend)
        kind = "PreTrainedTokenizerFast" if is_json else "LlamaTokenizer"
        config = {"tokenizer_class": kind, "clean_up_tokenization_spaces": False, "model_max_length": 10**30}
        config |= {key: value for key, value in self.config.items() if key != "chat_template"}
        config |= self.special | {"add_bos_token": self.add_bos}
        _write_json(folder / "tokenizer_config.json", config)
        ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids) or None, "pad_token_id": self.pad_id}
        _write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


_HELD = re.compile("\U000f5afe(\\d{1,6})\U000f5aff")  # stands for a text that was held back, of private characters


def _without(controls: re.Pattern[str], value: Any, held: list[str]) -> Any:
    """`value` with the texts of control tokens in its strings held back, and marks in their places."""

    def hold(match: re.Match[str]) -> str:
        held.append(match[0])
        return f"\U000f5afe{len(held) - 1}\U000f5aff"

    if isinstance(value, str):
        return controls.sub(hold, value)
    if isinstance(value, Mapping):
        return {key: _without(controls, item, held) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without(controls, item, held) for item in value]
    return value


class StreamDecoder:
    """Text of tokens as they arrive. What is emitted, joined, is the text of all; half a character is never emitted."""

    WINDOW = 3  # a character has at most four bytes, so the last three tokens may hold the start of one

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.ids: list[int] = []  # the last tokens emitted, for context, then those held back
        self.emitted = 0  # how many of `ids` have been emitted

    def add(self, i: int) -> str:
        """The text that token `i` completes: perhaps none."""
        self.ids.append(i)
        text = self._pending(len(self.ids))
        if not text.endswith("\ufffd"):
            return self._emit(len(self.ids))
        # A replacement character may be half of one. If it is not, the tokens before the window are beyond doubt.
        cut = len(self.ids) - self.WINDOW
        return self._emit(cut) if cut > self.emitted else ""

    def finish(self) -> str:
        """The text still held back; a character that never became whole is U+FFFD."""
        return self._emit(len(self.ids))

    def _pending(self, end: int) -> str:
        before = self.tokenizer.decode(self.ids[: self.emitted], self.skip_special)
        return self.tokenizer.decode(self.ids[:end], self.skip_special)[len(before) :]

    def _emit(self, end: int) -> str:
        text = self._pending(end)
        keep = self.emitted if text else 0  # tokens without text are no context: keep what was before them
        self.ids, self.emitted = self.ids[keep:], end - keep
        return text


def load_tokenizer(path: Path | str, gguf_fields: GgufFields | None = None) -> Tokenizer:
    """The tokenizer in a model folder, or of a `.gguf`, `tokenizer.json` or SentencePiece `.model` file.

    gguf_fields: gives a GGUF's metadata by key, each value with `contents()`, as `gguf.GGUFReader.fields`, which is
    the default; that one takes seconds, so whoever has read the file already gives what it found.
    Raises UserError where there is none, or its files are damaged.
    """
    path, gguf_fields = Path(path), gguf_fields or _gguf_fields
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).exists():
                return _from_files(path / name)
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _from_gguf(files[0], gguf_fields(files[0]))
        raise UserError(
            f"{path} has no tokenizer.json, tokenizer.model or single .gguf; give a folder or file that has"
        )
    if not path.exists():
        raise UserError(f"{path} does not exist; give a model folder, a tokenizer.json, a .model or a .gguf file")
    if path.suffix == ".gguf":
        return _from_gguf(path, gguf_fields(path))
    if path.suffix in (".json", ".model"):
        return _from_files(path)
    raise UserError(f"{path} is not a tokenizer; give a model folder, a tokenizer.json, a .model or a .gguf file")


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, learned from `texts`; the first special token ends a document.

    Raises UserError where `vocab_size` is below the 256 bytes and the special tokens.
    """
    backend = json_backend.train(texts, vocab_size, special_tokens)
    return Tokenizer(backend, {"eos_token": special_tokens[0]} if special_tokens else {})


def check_fits(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """UserError where the tokenizer makes ids the model has no embedding for. A larger, padded table is usual."""
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model embeds {model.vocab_size}; use the "
            f"tokenizer that came with the model, or train with model.vocab_size={tokenizer.vocab_size} or more"
        )


def _from_files(path: Path) -> Tokenizer:
    """From a tokenizer.json or .model, with what lies next to it."""
    folder = path.parent
    config = _read_json(folder / "tokenizer_config.json")
    texts = {name: _text(_read_json(folder / "special_tokens_map.json").get(name)) for name in _SPECIAL_NAMES}
    texts |= {name: _text(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
    if path.suffix == ".json":
        backend: Backend = json_backend.read_json_tokenizer(path)
    else:
        decoder = config.get("added_tokens_decoder", {})
        added = {int(i): text for i, token in decoder.items() if (text := _text(token)) is not None}
        special = [int(i) for i, token in decoder.items() if token.get("special")]
        backend = sentencepiece_backend.read_model(path, added, special)
    bos = texts.get("bos_token")
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        if bos and isinstance(backend, json_backend.JsonBackend):
            add_bos = backend.starts_with(backend.token_to_id(bos))
        else:
            add_bos = bool(bos)
    eos = _read_json(folder / "generation_config.json").get("eos_token_id")
    if eos is None:
        eos = _read_json(folder / "config.json").get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return Tokenizer(backend, texts, eos_ids, add_bos, _chat_template(folder, config), config)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        return next((one["template"] for one in template if one.get("name") == "default"), None)
    return template


def _gguf_fields(path: Path) -> Mapping[str, Any]:
    import gguf

    try:
        return gguf.GGUFReader(path).fields
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise UserError(f"{path} is not a GGUF file, or is damaged or cut short ({error}); pull it again") from error


def _from_gguf(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
    def field(name: str, default: Any = None) -> Any:
        return fields[f"tokenizer.{name}"].contents() if f"tokenizer.{name}" in fields else default

    kind, tokens = field("ggml.model"), field("ggml.tokens")
    if tokens is None or kind not in ("gpt2", "llama"):
        raise UserError(f"{path} has no tokenizer that llmos reads (its kind is {kind!r}; llmos reads gpt2 and llama)")
    types = field("ggml.token_type") or [1] * len(tokens)
    if kind == "gpt2":
        backend: Backend = json_backend.from_gguf_lists(
            tokens, field("ggml.merges", []), types, field("ggml.pre", "default")
        )
    else:
        prefix = bool(field("ggml.add_space_prefix", True))
        model = sentencepiece_backend.build_model(tokens, field("ggml.scores", [0.0] * len(tokens)), types, prefix)
        backend = sentencepiece_backend.SentencePieceBackend(model)
    ids = {name: field(f"ggml.{key}_token_id") for name, key in zip(_SPECIAL_NAMES, _GGUF_SPECIAL, strict=True)}
    texts = {name: None if i is None else tokens[i] for name, i in ids.items()}
    eos_ids = [i for i in (ids["eos_token"], field("ggml.eot_token_id")) if i is not None]
    add_bos = bool(field("ggml.add_bos_token", kind == "llama"))
    return Tokenizer(backend, texts, eos_ids, add_bos, field("chat_template"))


_GGUF_SPECIAL = ("bos", "eos", "padding", "unknown")


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); pull the model again") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
