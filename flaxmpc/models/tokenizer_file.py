"""tokenizer.json of somebody else: what of it is kept, and what it may not ask of a machine that encodes texts.

A few bytes of it can make a text of ten characters a million tokens, or let a pattern search for hours.
"""

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from typing import Any

from flaxmpc.errors import brief, unknown
from flaxmpc.models.config import MOST_TOKENS

MOST_ADDED, MOST_SPECIAL = 20_000, 1_000
"""Tokens that are added to a vocabulary; and those of them with a role of their own, which transformers compares."""

MOST_CHARACTERS = 1_000
"""Of a token."""

_LARGEST_ID = MOST_TOKENS - 1
_MOST_COMPONENTS = 16
_MOST_GROWTH = 16  # of a text, in bytes
_MOST_TEMPLATE = 16
_SHORT = 100

_COMPONENTS = {
    "normalizer": (
        *("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend"),
        *("Replace", "Sequence", "Strip", "StripAccents"),
    ),
    "pre_tokenizer": (
        *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Sequence"),
        *("Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
    ),
    "post_processor": ("BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"),
    "decoder": (
        *("BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip", "WordPiece"),
    ),
}
_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")

# Regular expressions that published tokenizers have. Others may backtrack without end, so they are refused.
_PATTERNS = (" {2,}", r"\s+")


def checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer is of the content of its tokenizer.json; how texts were cut and padded last is left out.

    Raises:
        ValueError: a component or a value that is not known, or that takes more memory or time than any published
            tokenizer; names it, and what is allowed.
    """
    kept: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    kept["added_tokens"] = _added(fields.get("added_tokens"))
    growth = 1.0
    for kind in _COMPONENTS:
        kept[kind] = fields.get(kind)
        components = list(_flat(kind, kept[kind]))
        if len(components) > _MOST_COMPONENTS:
            raise ValueError(f"{kind} has {len(components)} components; at most {_MOST_COMPONENTS} are allowed")
        growth *= math.prod(_check_component(kind, component) for component in components)
        if kind != "decoder" and growth > _MOST_GROWTH:
            raise ValueError(f"{kind} makes a text {growth:.3g} times longer; at most {_MOST_GROWTH} times is allowed")
    kept["model"] = checked_model(fields.get("model"))
    return kept


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {brief(value)}, not an object")
    return value


def _list(name: str, value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        what = f"a list of {len(value)}" if isinstance(value, list) else brief(value)
        raise ValueError(f"{name} is {what}; a list of at most {most} is allowed")
    return value


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {brief(value)}, not a whole number in {low}..{high}")


def check_text(name: str, value: Any, most: int = MOST_CHARACTERS) -> None:
    """ValueError: no string, an empty one, or one of more characters."""
    if not isinstance(value, str) or not 0 < len(value) <= most:
        raise ValueError(f"{name} is {brief(value)}, not a string of 1 to {most} characters")


def check_id(name: str, value: Any) -> None:
    """ValueError: no token's id."""
    _whole(name, value, 0, _LARGEST_ID)


def _flat(kind: str, component: Any) -> Iterator[Mapping[str, Any]]:
    """The components of a sequence, and those of the sequences in it."""
    if component is None:
        return
    type_ = _object(kind, component).get("type")
    if type_ not in _COMPONENTS[kind]:
        raise unknown(kind, type_, _COMPONENTS[kind])
    if type_ != "Sequence":
        yield component
        return
    for name in _SEQUENCES:
        for inner in _list(f"{kind} {name}", component.get(name, []), _MOST_COMPONENTS):
            yield from _flat(kind, inner)


def _check_component(kind: str, component: Mapping[str, Any]) -> float:
    """How many times longer a text may get; ValueError for a value that is not allowed."""
    type_ = component["type"]
    special = _SPECIAL.get(type_, {}) | ({"pattern": _pattern} if "pattern" in component else {})
    for field, value in component.items():
        name = f"{kind} {type_}: {field}"
        if field in special:
            special[field](name, value)
        elif isinstance(value, (list, dict)) or (isinstance(value, str) and len(value) > _SHORT):
            raise ValueError(f"{name} is {brief(value)}, not a short string, a number, true or false")
    if type_ == "Replace":
        pattern = component.get("pattern", {})
        return max(1.0, len(str(component.get("content")).encode()) / len(pattern.get("String", " ").encode()))
    return 2.0 if type_ == "ByteLevel" and kind != "post_processor" else 1.0


def _pattern(name: str, value: Any) -> None:
    pattern = _object(name, value)
    if set(pattern) == {"String"}:
        check_text(name, pattern["String"], _SHORT)
    elif set(pattern) != {"Regex"} or pattern["Regex"] not in _PATTERNS:
        allowed = ", ".join(map(repr, _PATTERNS))
        raise ValueError(f"{name} is {brief(value)}; a String is allowed, and of regular expressions {allowed}")


def _charsmap(name: str, value: Any) -> None:
    """SentencePiece's table of normal forms: a trie, and the strings that it leads to, each ending in NUL."""
    try:
        content = base64.b64decode(value or "", validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"{name} is no base64: {error}") from error
    end = 4 + int.from_bytes(content[:4], "little")
    longest = max(map(len, content[end:].split(b"\0")))
    if len(content) < end or longest > _SHORT:
        raise ValueError(f"{name} is damaged, or makes {longest} bytes of a character; at most {_SHORT} are allowed")


def _template(name: str, value: Any) -> None:
    texts = []
    for piece in _list(name, value, _MOST_TEMPLATE):
        for what, place in _object(name, piece).items():
            check_text(name, _object(name, place).get("id"))
            _whole(f"{name} type_id", place.get("type_id"), 0, 127)
            texts += [place["id"]] * (what == "Sequence")
    if len(set(texts)) < len(texts):
        raise ValueError(f"{name} has a text twice: {brief(texts)}")


def _template_tokens(name: str, value: Any) -> None:
    if len(_object(name, value)) > _MOST_TEMPLATE:
        raise ValueError(f"{name} has {len(value)} tokens; at most {_MOST_TEMPLATE} are allowed")
    for token in value.values():
        for each in _list(f"{name} ids", _object(name, token).get("ids"), _MOST_TEMPLATE):
            check_id(f"{name} id", each)
        for each in _list(f"{name} tokens", token.get("tokens"), _MOST_TEMPLATE):
            check_text(f"{name} token", each)


def _token_and_id(name: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{name} is {brief(value)}, not a token and its id")
    check_text(name, value[0])
    check_id(name, value[1])


# Fields of components that are no short strings or numbers.
_PROCESSING = {"sep": _token_and_id, "cls": _token_and_id}
_SPECIAL = {
    "Precompiled": {"precompiled_charsmap": _charsmap},
    "BertProcessing": _PROCESSING,
    "RobertaProcessing": _PROCESSING,
    "TemplateProcessing": {"single": _template, "pair": _template, "special_tokens": _template_tokens},
}


def _added(tokens: Any) -> list[Any]:
    """The tokens beside the vocabulary."""
    tokens = _list("added_tokens", [] if tokens is None else tokens, MOST_ADDED)
    for token in tokens:
        check_text("content of added_tokens", _object("one of added_tokens", token).get("content"))
        check_id("id of added_tokens", token.get("id"))
    return tokens


def checked_model(model: Any) -> Mapping[str, Any]:
    """A WordPiece, BPE, Unigram or WordLevel, as it is. ValueError: see `checked`."""
    vocabulary = _object("model", model).get("vocab")
    if isinstance(vocabulary, (dict, list)) and len(vocabulary) > MOST_TOKENS:
        raise ValueError(f"model vocab has {len(vocabulary)} tokens; at most {MOST_TOKENS} are allowed")
    if isinstance(vocabulary, dict):
        for token, id_ in vocabulary.items():
            if len(token) > MOST_CHARACTERS or type(id_) is not int or not 0 <= id_ <= _LARGEST_ID:
                raise ValueError(
                    f"model vocab has {brief(token)}: {brief(id_)}; tokens of up to {MOST_CHARACTERS} characters with "
                    f"ids in 0..{_LARGEST_ID} are allowed"
                )
    elif isinstance(vocabulary, list):
        for piece in vocabulary:
            right = isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str)
            if not right or len(piece[0]) > MOST_CHARACTERS or not isinstance(piece[1], (int, float)):
                raise ValueError(
                    f"model vocab has {brief(piece)}; pieces of up to {MOST_CHARACTERS} characters with a number are "
                    "allowed"
                )
    else:
        raise ValueError(f"model vocab is {brief(vocabulary)}, neither an object nor a list")
    if "max_input_chars_per_word" in model:
        _whole("model max_input_chars_per_word", model["max_input_chars_per_word"], 1, MOST_CHARACTERS)
    if model.get("dropout"):
        raise ValueError(f"model dropout is {brief(model['dropout'])}: only tokenizers that do not draw are supported")
    for field, value in model.items():
        if field not in ("vocab", "merges") and not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"model {field} is {brief(value)}, not a string, a number, true or false")
        if isinstance(value, str) and len(value) > _SHORT:
            raise ValueError(f"model {field} is {brief(value)}; at most {_SHORT} characters are allowed")
    return model
