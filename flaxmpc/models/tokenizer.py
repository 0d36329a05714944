"""The tokenizer of a model folder: read as transformers' AutoTokenizer reads it, and written as it writes it.

transformers follows what the files of a folder say: to other files, into its own constructors. So it is given a folder
of our own, with those files and fields that decide about the ids of a text, checked.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flaxmpc import files
from flaxmpc.errors import brief, failing_as, unknown
from flaxmpc.models.config import MOST_TOKENS, no_model_folder
from flaxmpc.models.tokenizer_file import MOST_ADDED, MOST_SPECIAL, check_id, check_text, checked, checked_model

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What `save_tokenizer` writes, and all that a tokenizer is."""

# The files of a vocabulary without tokenizer.json.
_VOCABULARIES = (("vocab.txt",), ("vocab.json", "merges.txt"))

_MOST_BYTES = 32 << 20  # of a vocabulary: a quarter of a million tokens, indented, are 17 MB

# Those that add nothing to a tokenizer.json but the roles of its tokens. Of SentencePiece's, transformers 5 would make
# another tokenizer of it: without its normalizer, and with a post-processor of the class.
_PLAIN = ("AlbertTokenizer", "CamembertTokenizer", "PreTrainedTokenizer", "TokenizersBackend", "XLMRobertaTokenizer")

# Those whose fields are known, see `_FIELDS`; each also with "Fast".
_CLASSES = (
    *("BartTokenizer", "BertTokenizer", "ConvBertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"),
    *("GPT2Tokenizer", "LayoutLMTokenizer", "MPNetTokenizer", "MobileBertTokenizer", "RobertaTokenizer"),
    *("SqueezeBertTokenizer", *_PLAIN),
)

# The tokens that have a role of their own in these families.
_ROLES = {
    "bos_token": ("<s>",),
    "eos_token": ("</s>",),
    "unk_token": ("[UNK]", "<unk>"),
    "sep_token": ("[SEP]", "</s>"),
    "pad_token": ("[PAD]", "<pad>"),
    "cls_token": ("[CLS]", "<s>"),
    "mask_token": ("[MASK]", "<mask>"),
}

# What BertTokenizerFast is told about its normalizer, by the names in tokenizer.json.
_NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a folder: what AutoTokenizer gives of its files alone.

    A folder that names no class is one of BERT's vocab.txt, or of a tokenizer.json, which needs no class. What
    tokenizer_config.json does not say of BERT's normalizer is as tokenizer.json has it, where AutoTokenizer would take
    its defaults and lower-case a cased one. What no file says of the roles of tokens, their names tell.

    Raises:
        FileNotFoundError: no such folder, or no tokenizer in it.
        ValueError: a file is damaged, a link or too large, names files elsewhere, asks for a tokenizer that is not
            known, or for one that takes more memory or time than any published one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise no_model_folder(folder)
    whole = _read(folder / "tokenizer.json", checked)
    vocabularies = {} if whole else _vocabularies(folder)
    said = _read(folder / "tokenizer_config.json", _checked_fields)
    # transformers would take any field from here, such as vocab_file.
    special = _read(folder / "special_tokens_map.json", _checked_tokens)
    added = _read(folder / "added_tokens.json", _checked_added)
    # One that names no class is BERT's, unless tokenizer.json says it all.
    named = said.get("tokenizer_class") or (_class_of_config(folder) or ("" if whole else "BertTokenizer"))
    if not named or (whole and named.removesuffix("Fast") in _PLAIN):
        roles = {role: token for role, token in _roles(whole).items() if role not in special}
        said = {**roles, **said, "tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        said = {**_normalizer(whole), **said, "tokenizer_class": named}
    # Without torch, transformers says that it has only tokenizers; that is all it is here for.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    with tempfile.TemporaryDirectory() as directory, failing_as(f"{folder} cannot be read as a tokenizer"):
        own = Path(directory)
        contents = {"tokenizer.json": whole, "tokenizer_config.json": said}
        contents |= {"special_tokens_map.json": special, "added_tokens.json": added}
        for name, fields in contents.items():
            if fields:
                (own / name).write_text(json.dumps(fields), "utf-8")
        for name, content in vocabularies.items():
            (own / name).write_bytes(content)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            own,
            config=transformers.BertConfig(),  # else it looks for the class of a config.json, and asks the hub for one
            local_files_only=True,
            trust_remote_code=False,  # else it asks on the terminal
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder} has a {type(tokenizer).__name__}; only fast tokenizers (tokenizer.json) are supported"
        )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Writes `FILES`, of which `load_tokenizer` makes the same tokenizer."""
    as_text(tokenizer)
    tokenizer.save_pretrained(folder, legacy_format=False)


def as_text(tokenizer: Any) -> str:
    """All that decides about a tokenizer's ids."""
    tokenizer.backend_tokenizer.no_truncation()  # what the last call asked for is no part of it
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer.backend_tokenizer.to_str()


def _read(path: Path, check: Callable[[dict[str, Any]], Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of a JSON file; empty if there is no such file. A link to nothing is refused."""
    if not path.is_file() and not path.is_symlink():
        return {}
    large = path.name in ("tokenizer.json", "vocab.json")
    fields = files.read_object(path, _MOST_BYTES if large else files.JSON_BYTES)
    try:
        return dict(check(fields))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _vocabularies(folder: Path) -> dict[str, bytes]:
    """The files of a vocabulary. FileNotFoundError: there are none."""
    names = next((names for names in _VOCABULARIES if (folder / names[0]).is_file()), None)
    if names is None:
        raise FileNotFoundError(f"{folder} has no tokenizer: tokenizer.json or vocab.txt is needed")
    contents = {name: files.read(folder / name, _MOST_BYTES) for name in names}
    for name, content in contents.items():
        if (lines := content.count(b"\n")) > MOST_TOKENS:
            raise ValueError(f"{folder / name} has {lines} lines; at most {MOST_TOKENS} are allowed")
        if name == "vocab.json":
            _read(folder / name, lambda vocabulary: checked_model({"vocab": vocabulary}))
    return contents


def _class_of_config(folder: Path) -> str | None:
    path = folder / "config.json"
    return _class(files.read_object(path).get("tokenizer_class")) if path.is_file() else None


def _roles(whole: Mapping[str, Any]) -> dict[str, str]:
    """The roles of those tokens that tokenizer.json calls special."""
    special = {token["content"] for token in whole["added_tokens"] if token.get("special")}
    found = {role: [name for name in names if name in special] for role, names in _ROLES.items()}
    return {role: names[0] for role, names in found.items() if names}


def _normalizer(whole: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer.json says of BERT's normalizer."""
    normalizer = whole.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer":
        return {}
    return {ours: normalizer[theirs] for ours, theirs in _NORMALIZER.items() if theirs in normalizer}


# ------------------------------------------------------------------------------------------ the fields that are kept


def _class(name: Any) -> str | None:
    """ValueError: a tokenizer_class that is not known."""
    if name is not None and (not isinstance(name, str) or name.removesuffix("Fast") not in _CLASSES):
        raise unknown("tokenizer_class", name, _CLASSES)
    return name


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, type(None))):
        raise ValueError(f"{name} is {brief(value)}, not true, false or null")


def _number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float, type(None))):
        raise ValueError(f"{name} is {brief(value)}, not a number")


def _side(name: str, value: Any) -> None:
    if value not in ("left", "right"):
        raise ValueError(f"{name} is {brief(value)}, neither 'left' nor 'right'")


def _token(name: str, value: Any) -> None:
    """A string, or an object of one with flags: how spaces around it are taken, and so on."""
    if value is None:
        return
    if isinstance(value, dict):
        for field, flag in value.items():
            if field not in ("content", "__type"):
                _flag(f"{name} {brief(field)}", flag)
        value = value.get("content")
    check_text(name, value)


def _tokens(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, list) or len(value) > MOST_SPECIAL):
        raise ValueError(f"{name} is {brief(value)}; a list of at most {MOST_SPECIAL} tokens is allowed")
    for token in value or ():
        _token(name, token)


def _decoder(name: str, value: Any) -> None:
    if not isinstance(value, dict) or len(value) > MOST_ADDED:
        raise ValueError(f"{name} is {brief(value)}; an object of at most {MOST_ADDED} tokens by their ids is allowed")
    for id_, token in value.items():
        check_id(f"{name} id", int(id_) if id_.isdecimal() and len(id_) < 10 else id_)
        if not isinstance(token, dict):
            raise ValueError(f"{name} has {brief(token)}, not an object with content")
        _token(name, token)


_SPECIAL = {
    **dict.fromkeys((f"{each}_token" for each in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")), _token),
    "additional_special_tokens": _tokens,
}

# The fields of tokenizer_config.json that decide about ids, and what they may be. All else is left out: the bundle of a
# model shows nothing that it does not need.
_FIELDS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys((*_NORMALIZER, "do_basic_tokenize", "add_prefix_space", "trim_offsets"), _flag),
    **dict.fromkeys(("remove_space", "keep_accents", "split_special_tokens", "clean_up_tokenization_spaces"), _flag),
    **dict.fromkeys(("padding_side", "truncation_side"), _side),
    **_SPECIAL,
    "added_tokens_decoder": _decoder,
    "model_max_length": _number,
    "tokenizer_class": lambda _, value: _class(value),
}


def _checked_fields(said: dict[str, Any]) -> dict[str, Any]:
    for field, value in said.items():
        # The place of the special tokens when it was saved stands in many published configs; nothing reads it.
        if field.endswith(("_file", "_files")) and field != "special_tokens_map_file" and value:
            raise ValueError(
                f"has {field}={brief(value)}: a tokenizer's files stand in its folder under their own names; "
                "remove the field"
            )
    return _kept(said, _FIELDS)


def _checked_tokens(special: dict[str, Any]) -> dict[str, Any]:
    if strange := sorted(set(special) - set(_SPECIAL)):
        raise unknown("special token", strange[0], _SPECIAL)
    return _kept(special, _SPECIAL)


def _checked_added(added: dict[str, Any]) -> dict[str, Any]:
    if len(added) > MOST_ADDED:
        raise ValueError(f"has {len(added)} tokens; at most {MOST_ADDED} are allowed")
    for token, id_ in added.items():
        check_text("a token", token)
        check_id(f"the id of {brief(token)}", id_)
    return added


def _kept(fields: Mapping[str, Any], checks: Mapping[str, Callable[[str, Any], Any]]) -> dict[str, Any]:
    for field in checks.keys() & fields.keys():
        checks[field](field, fields[field])
    return {field: value for field, value in fields.items() if field in checks}
