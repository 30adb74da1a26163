"""The names and layouts of published weights: one table a family, read in both directions.

An `Entry` says under which name and in which layout a Hugging Face file holds one of our parameters. From it come the
reading, the writing (the inverse is derived), and, through the `gguf` package's own table, the names in a GGUF.

Layouts are written like "(N H) D -> D N H": the axes in the file, then ours. Letters: D embed, N query heads, K KV
heads, H head dim, F mlp, M mlp of one expert, V vocab, P learned positions. An entry with {expert} in its name
describes one expert; our array has all of them along a leading E.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from llmos_jax.config import ModelConfig, UserError

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]


@dataclass(frozen=True)
class Layout:
    """Axes of the file, each a group of letters, and the order of the letters in our array."""

    file: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Of the tensor in the file."""
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.file)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        order = [self.ours.index(letter) for group in self.file for letter in group]
        sizes = dict(zip(self.ours, array.shape, strict=True))
        return array.transpose(order).reshape(self.shape(sizes))

    def read(self, read: Read, index: Index, sizes: dict[str, int]) -> np.ndarray:
        """The part `index` of our array, through `read`, which takes a part of the tensor in the file.

        Only the part is read, except where it cuts a later letter of a group: then that axis is read whole.
        """
        wanted = {
            letter: slice(*part.indices(sizes[letter])[:2]) for letter, part in zip(self.ours, index, strict=True)
        }
        parts: list[slice] = []
        left_over: dict[str, slice] = {}
        local: dict[str, int] = {}
        for first, *inner in self.file:
            if all(wanted[letter] == slice(0, sizes[letter]) for letter in inner):
                stride = math.prod(sizes[letter] for letter in inner)
                parts.append(slice(wanted[first].start * stride, wanted[first].stop * stride))
                local |= {first: wanted[first].stop - wanted[first].start, **{x: sizes[x] for x in inner}}
            else:
                parts.append(slice(0, math.prod(sizes[letter] for letter in (first, *inner))))
                local |= {letter: sizes[letter] for letter in (first, *inner)}
                left_over |= {letter: wanted[letter] for letter in (first, *inner)}
        letters = [letter for group in self.file for letter in group]
        array = read(tuple(parts)).reshape([local[letter] for letter in letters])
        array = array.transpose([letters.index(letter) for letter in self.ours])
        return array[tuple(left_over.get(letter, slice(None)) for letter in self.ours)]


@functools.cache
def parse_layout(text: str) -> Layout:
    """ "(N H) D -> D N H" as a Layout."""
    file, ours = text.split("->")
    groups = re.findall(r"\(([^)]*)\)|(\w)", file)
    return Layout(tuple(tuple((group or letter).split()) for group, letter in groups), tuple(ours.split()))


@dataclass(frozen=True)
class Entry:
    """One parameter. `ours` starts with "*." where it belongs to a layer; `part`: (place, count) along the last axis
    of a tensor in the file that holds several of our parameters side by side."""

    ours: str
    hf: str
    layout_text: str
    part: tuple[int, int] | None = None

    @property
    def layout(self) -> Layout:
        return parse_layout(self.layout_text)

    @property
    def has_experts(self) -> bool:
        return "{expert}" in self.hf

    def name(self, layer: int | None, expert: int | None = None) -> str:
        return self.hf.format(layer=layer, expert=expert)

    def file_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        *outer, last = self.layout.shape(sizes)
        return (*outer, last * (self.part[1] if self.part else 1))

    def read(self, read: Read, index: Index, sizes: dict[str, int]) -> np.ndarray:
        """As Layout.read, from the whole tensor in the file, of which this entry may be a part."""
        if self.part is None:
            return self.layout.read(read, index, sizes)
        start = self.part[0] * self.layout.shape(sizes)[-1]
        return self.layout.read(
            lambda parts: read((*parts[:-1], slice(parts[-1].start + start, parts[-1].stop + start))), index, sizes
        )


@dataclass(frozen=True)
class FamilyNames:
    entries: tuple[Entry, ...]
    aliases: tuple[tuple[str, str], ...] = ()  # other spellings in published files: pattern, replacement
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)  # in published files, but not of use

    def canonical(self, name: str) -> str:
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def is_ignored(self, name: str, model: ModelConfig) -> bool:
        tied = model.tie_embeddings and name == "lm_head.weight"
        return tied or any(re.search(pattern, name) for pattern in self.ignored)


_L = "model.layers.{layer}."
_TOP = (
    Entry("embed.table", "model.embed_tokens.weight", "V D -> V D"),
    Entry("final_norm.scale", "model.norm.weight", "D -> D"),
    Entry("head.kernel", "lm_head.weight", "V D -> D V"),
)
_ATTENTION = (
    Entry("*.attention_norm.scale", _L + "input_layernorm.weight", "D -> D"),
    Entry("*.attention.q", _L + "self_attn.q_proj.weight", "(N H) D -> D N H"),
    Entry("*.attention.k", _L + "self_attn.k_proj.weight", "(K H) D -> D K H"),
    Entry("*.attention.v", _L + "self_attn.v_proj.weight", "(K H) D -> D K H"),
    Entry("*.attention.o", _L + "self_attn.o_proj.weight", "D (N H) -> N H D"),
    Entry("*.attention.q_bias", _L + "self_attn.q_proj.bias", "(N H) -> N H"),
    Entry("*.attention.k_bias", _L + "self_attn.k_proj.bias", "(K H) -> K H"),
    Entry("*.attention.v_bias", _L + "self_attn.v_proj.bias", "(K H) -> K H"),
    Entry("*.attention.o_bias", _L + "self_attn.o_proj.bias", "D -> D"),
    Entry("*.attention.q_norm.scale", _L + "self_attn.q_norm.weight", "H -> H"),
    Entry("*.attention.k_norm.scale", _L + "self_attn.k_norm.weight", "H -> H"),
)
_MLP = (
    Entry("*.mlp.gate", _L + "mlp.gate_proj.weight", "F D -> D F"),
    Entry("*.mlp.up", _L + "mlp.up_proj.weight", "F D -> D F"),
    Entry("*.mlp.down", _L + "mlp.down_proj.weight", "D F -> F D"),
)
_MLP_NORM = (Entry("*.mlp_norm.scale", _L + "post_attention_layernorm.weight", "D -> D"),)
_SANDWICH_NORMS = (
    Entry("*.attention_out_norm.scale", _L + "post_attention_layernorm.weight", "D -> D"),
    Entry("*.mlp_norm.scale", _L + "pre_feedforward_layernorm.weight", "D -> D"),
    Entry("*.mlp_out_norm.scale", _L + "post_feedforward_layernorm.weight", "D -> D"),
)


def _moe(block: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    expert = _L + block + ".experts.{expert}."
    return (
        Entry("*.moe.router", _L + block + ".gate.weight", "E D -> D E"),
        Entry("*.moe.gate", f"{expert}{gate}.weight", "M D -> D M"),
        Entry("*.moe.up", f"{expert}{up}.weight", "M D -> D M"),
        Entry("*.moe.down", f"{expert}{down}.weight", "D M -> M D"),
    )


_G = "transformer.h.{layer}."
_GPT2 = (
    Entry("embed.table", "transformer.wte.weight", "V D -> V D"),
    Entry("embed.positions", "transformer.wpe.weight", "P D -> P D"),
    Entry("final_norm.scale", "transformer.ln_f.weight", "D -> D"),
    Entry("final_norm.bias", "transformer.ln_f.bias", "D -> D"),
    Entry("head.kernel", "lm_head.weight", "V D -> D V"),
    Entry("*.attention_norm.scale", _G + "ln_1.weight", "D -> D"),
    Entry("*.attention_norm.bias", _G + "ln_1.bias", "D -> D"),
    Entry("*.attention.q", _G + "attn.c_attn.weight", "D (N H) -> D N H", part=(0, 3)),
    Entry("*.attention.k", _G + "attn.c_attn.weight", "D (K H) -> D K H", part=(1, 3)),
    Entry("*.attention.v", _G + "attn.c_attn.weight", "D (K H) -> D K H", part=(2, 3)),
    Entry("*.attention.o", _G + "attn.c_proj.weight", "(N H) D -> N H D"),
    Entry("*.attention.q_bias", _G + "attn.c_attn.bias", "(N H) -> N H", part=(0, 3)),
    Entry("*.attention.k_bias", _G + "attn.c_attn.bias", "(K H) -> K H", part=(1, 3)),
    Entry("*.attention.v_bias", _G + "attn.c_attn.bias", "(K H) -> K H", part=(2, 3)),
    Entry("*.attention.o_bias", _G + "attn.c_proj.bias", "D -> D"),
    Entry("*.mlp_norm.scale", _G + "ln_2.weight", "D -> D"),
    Entry("*.mlp_norm.bias", _G + "ln_2.bias", "D -> D"),
    Entry("*.mlp.up", _G + "mlp.c_fc.weight", "D F -> D F"),
    Entry("*.mlp.up_bias", _G + "mlp.c_fc.bias", "F -> F"),
    Entry("*.mlp.down", _G + "mlp.c_proj.weight", "F D -> F D"),
    Entry("*.mlp.down_bias", _G + "mlp.c_proj.bias", "D -> D"),
)

_DENSE = FamilyNames(_TOP + _ATTENTION + _MLP_NORM + _MLP)
_GEMMA = _TOP + _ATTENTION + _SANDWICH_NORMS + _MLP

FAMILY_NAMES: dict[str, FamilyNames] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "gemma2": FamilyNames(_GEMMA),
    "gemma3": FamilyNames(
        _GEMMA,
        aliases=(
            (r"^(language_model\.model|model\.language_model)\.", "model."),
            (r"^language_model\.lm_head", "lm_head"),
        ),
        ignored=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
    ),
    "gpt2": FamilyNames(
        _GPT2, aliases=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),), ignored=(r"\.attn\.(masked_)?bias$",)
    ),
    "mixtral": FamilyNames(_TOP + _ATTENTION + _MLP_NORM + _moe("block_sparse_moe", "w1", "w3", "w2")),
    "qwen3_moe": FamilyNames(_TOP + _ATTENTION + _MLP_NORM + _moe("mlp", "gate_proj", "up_proj", "down_proj")),
}


@dataclass(frozen=True)
class Slot:
    """Where one of our parameters comes from: its entry, and the layers along its leading axis (None: no such axis)."""

    path: str
    entry: Entry
    layers: tuple[int, ...] | None

    def file_names(self, model: ModelConfig) -> Iterable[str]:
        experts = range(model.num_experts) if self.entry.has_experts else (None,)
        for layer in self.layers or (None,):
            for expert in experts:
                yield self.entry.name(layer, expert)


def sizes(model: ModelConfig) -> dict[str, int]:
    """The size each letter of a layout stands for."""
    return {
        "D": model.embed_dim,
        "N": model.num_heads,
        "K": model.num_kv_heads,
        "H": model.head_dim,
        "F": model.mlp_dim,
        "M": model.expert_mlp_dim,
        "E": model.num_experts,
        "V": model.vocab_size,
        "P": model.max_seq_len,
    }


def family_names(model: ModelConfig) -> FamilyNames:
    if model.family not in FAMILY_NAMES:
        raise UserError(f"model.family={model.family!r} has no name map; use one of {', '.join(FAMILY_NAMES)}")
    return FAMILY_NAMES[model.family]


def slots(model: ModelConfig, paths: Iterable[str]) -> list[Slot]:
    """The slot of each parameter, in the order of `paths`; UserError where the family's files have no place for it."""
    entries = {entry.ours: entry for entry in family_names(model).entries}
    layers: dict[tuple[int, int], list[int]] = {}
    for layer in range(model.num_layers):
        layers.setdefault(model.layer_slot(layer)[:2], []).append(layer)
    found = []
    for path in paths:
        match = re.fullmatch(r"segments\.(\d+)\.(\d+)\.(.+)", path)
        ours = f"*.{match[3]}" if match else path
        if ours not in entries:
            raise UserError(
                f"{model.family} files have no place for the parameter {path}; choose a family that has one"
            )
        where = tuple(layers[int(match[1]), int(match[2])]) if match else None
        found.append(Slot(path, entries[ours], where))
    return found
