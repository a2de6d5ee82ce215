"""The tokenizer of a Keras preset as the files that transformers reads: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.errors import UserError
from jaxft.weights.hub import read_json

# How Llama 3 and Qwen part text into words: they differ in how many digits make one. Keras 3.15 means to do the same with
# Llama 3's for both, but hands the pattern over as a literal, which parts nothing, and its graph of TensorFlow ops parts by
# another; these are the released models' own, so that the ids are those that they were trained with.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# What ends a turn in the instruct models; base models never say it, and Keras does not tell which of them a preset is.
TURN_ENDS = ("<end_of_turn>", "<|eot_id|>", "<|im_end|>")
# SentencePiece's kinds of pieces.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2


@dataclass(frozen=True)
class Tokenizer:
    """`files` by name, and the `ids` that config.json tells: bos, eos and pad."""

    files: Mapping[str, str]
    ids: Mapping[str, Any]


def read_tokenizer(folder: Path) -> Tokenizer:
    """The preset's tokenizer. Raises UserError where files are missing or the tokenizer is of another kind.

    Like the Hub's tokenizers it begins a text with the BOS, which in Keras the preprocessor does.
    """
    file = folder / "tokenizer.json"
    config = read_json(file, "a Keras preset with a tokenizer (save it with the tokenizer's save_to_preset)")
    kind, fields = config.get("class_name"), config.get("config")
    if kind not in KINDS or not isinstance(fields, dict):
        raise UserError(f"{file}: class_name {kind!r} is not supported; supported: {', '.join(KINDS)}")
    for name in ("add_bos", "add_eos", "sequence_length"):
        if fields.get(name):
            raise UserError(f"{file}: {name}: {fields[name]!r} is not supported; supported: None, False")
    build, named = KINDS[kind]
    assets = folder / "assets" / str(fields.get("config_file") or "tokenizer.json").partition(".")[0]
    try:
        tokenizer = build(assets, fields, set(named.values()))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: missing; download the preset again") from error
    return _finish(tokenizer, named, file)


def _finish(tokenizer: Any, named: Mapping[str, str], file: Path) -> Tokenizer:
    """Adds the BOS in front of every text, and names the special tokens."""
    from tokenizers.processors import TemplateProcessing

    ids = {role: tokenizer.token_to_id(token) for role, token in named.items()}
    lost = [named[role] for role, value in ids.items() if value is None]
    if lost:
        raise UserError(f"{file}: the vocabulary has no {', '.join(lost)}")
    bos = named.get("bos_token")
    if bos:
        template = {"single": f"{bos} $A", "pair": f"{bos} $A {bos}:1 $B:1"}
        tokenizer.post_processor = TemplateProcessing(**template, special_tokens=[(bos, ids["bos_token"])])
    # This class reads tokenizer.json as it stands; a family's own would build it anew.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False}
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    ends = [tokenizer.token_to_id(token) for token in TURN_ENDS]
    eos = [ids["eos_token"], *(i for i in ends if i is not None and i != ids["eos_token"])]
    told = {"bos_token_id": ids.get("bos_token"), "pad_token_id": ids.get("pad_token")}
    return Tokenizer(files, {"eos_token_id": eos, **told})


def _llama3(assets: Path, fields: Mapping[str, Any], named: set[str]) -> Any:
    # Some of its words are tokens that no merges lead to.
    return _byte_pairs(assets, fields, named, digits="{1,3}", ignore_merges=True)


def _qwen(assets: Path, fields: Mapping[str, Any], named: set[str]) -> Any:
    from tokenizers import normalizers

    tokenizer = _byte_pairs(assets, fields, named, digits="", ignore_merges=False)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _byte_pairs(assets: Path, fields: Mapping[str, Any], named: set[str], *, digits: str, ignore_merges: bool) -> Any:
    """vocabulary.json and merges.txt, over bytes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = read_json(assets / "vocabulary.json", "the tokenizer")
    lines = (assets / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.rstrip().split(" ")) for line in lines if line.strip() and not line.startswith("#version:")]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=merges, ignore_merges=ignore_merges))
    except Exception as error:  # the library's are plain, for a merge that is no pair as for one out of vocabulary
        raise UserError(f"{assets}: vocabulary.json and merges.txt do not fit: {error}") from error
    # A word that Keras never splits is a token of its own; in its vocabulary they all stand by name.
    whole = {*(fields.get("unsplittable_tokens") or ()), *named, *TURN_ENDS} & set(vocabulary)
    special = [AddedToken(token, normalized=False, special=True) for token in sorted(whole, key=vocabulary.get)]
    tokenizer.add_special_tokens(special)
    words = pre_tokenizers.Split(Regex(WORDS.format(digits=digits)), "isolated")
    spaces = pre_tokenizers.ByteLevel(add_prefix_space=bool(fields.get("add_prefix_space")), use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, spaces])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(assets: Path, fields: Mapping[str, Any], named: set[str]) -> Any:
    """Gemma's: a SentencePiece model of kind BPE with its bytes, which leaves the text as it is but for spaces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    file = assets / "vocabulary.spm"
    pieces = _read_pieces(file)
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    unknown = [piece for piece, _, kind in pieces if kind == UNKNOWN]
    if len(vocabulary) != len(pieces) or len(unknown) != 1:
        raise UserError(f"{file}: pieces repeat, or not one is unknown; download the preset again")
    has_bytes = any(kind == BYTE for _, _, kind in pieces)
    merges = _merges({piece: score for piece, score, kind in pieces if kind == NORMAL})
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown[0], fuse_unk=True, byte_fallback=has_bytes)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    special = [piece for piece, _, kind in pieces if kind in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    # Found in the text once its spaces are marked, as the pieces themselves have them.
    own = [piece for piece, _, kind in pieces if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=True, special=False) for piece in own])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best third first, as SentencePiece joins them."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=scores.get, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


# ---- SentencePiece's file, a protocol buffer: ModelProto in sentencepiece_model.proto


def _read_pieces(file: Path) -> list[tuple[str, float, int]]:
    """`(piece, score, kind)` in the order of their ids. Raises UserError for another kind of model."""
    pieces, trainer, normalizer = [], {}, {}
    try:
        for number, value in _fields(file.read_bytes()):
            if number == 1:
                part = dict(_fields(value))
                score = struct.unpack("<f", part.get(2, bytes(4)))[0]
                pieces.append((part[1].decode(), score, part.get(3, NORMAL)))
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(_fields(value))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error) as error:
        raise UserError(f"{file}: not a SentencePiece model: {type(error).__name__}: {error}") from error
    # Field numbers and defaults of that file; any other value would give other ids.
    found = {
        "model_type": (trainer.get(3, 1), BPE),
        "precompiled_charsmap": (len(normalizer.get(2, b"")), 0),
        "add_dummy_prefix": (normalizer.get(3, 1), 0),
        "remove_extra_whitespaces": (normalizer.get(4, 1), 0),
        "escape_whitespaces": (normalizer.get(5, 1), 1),
    }
    for name, (seen, wanted) in found.items():
        if seen != wanted:
            raise UserError(f"{file}: {name}: {seen} is not supported; Gemma's has {wanted}")
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """`(number, value)` of each field of a message: an int where it is a varint, else its bytes."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            if key & 7 == 2:
                length, at = _varint(data, at)
            else:
                length = {1: 8, 5: 4}[key & 7]
            value, at = data[at : at + length], at + length
            if at > end:
                raise ValueError("truncated")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


# Keras' class -> how its files become a tokenizer, and its special tokens, which Keras has in its code.
KINDS = {
    "GemmaTokenizer": (_sentencepiece, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "Llama3Tokenizer": (_llama3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}),
    "QwenTokenizer": (_qwen, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
}
