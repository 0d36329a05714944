"""The tokenizer of a model folder: read as transformers' AutoTokenizer reads it, and written as it writes it."""

import json
import os
from pathlib import Path
from typing import Any

from flaxmpc.models.config import no_model_folder

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What `save_tokenizer` writes, and all that a tokenizer is."""

# Files that hold a vocabulary: one of them makes a tokenizer.
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")

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
    its defaults and lower-case a cased one.

    Raises:
        FileNotFoundError: no such folder, or no tokenizer in it.
        ValueError: a file is damaged, names files elsewhere, or asks for a tokenizer that transformers does not have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise no_model_folder(folder)
    vocabulary = next((folder / name for name in _VOCABULARIES if (folder / name).is_file()), None)
    if vocabulary is None:
        raise FileNotFoundError(f"{folder} has no tokenizer: tokenizer.json or vocab.txt is needed")
    said = _fields(folder / "tokenizer_config.json")
    _refuse_paths(folder, said)
    whole = _fields(folder / "tokenizer.json")
    named = said.get("tokenizer_class") or _fields(folder / "config.json").get("tokenizer_class")
    # Without torch, transformers says that it has only tokenizers; that is all it is here for.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    try:
        if whole and not named:
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            folder,
            config=transformers.BertConfig(tokenizer_class=named),  # else it asks the hub where there is no config.json
            local_files_only=True,
            trust_remote_code=False,  # else it asks on the terminal
            **_unsaid(said, whole),
        )
    except Exception as error:  # tokenizers raises Exception itself
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{vocabulary} cannot be read as a tokenizer: {reason}") from error
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


def _fields(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object")
    return fields


def _refuse_paths(folder: Path, said: dict[str, Any]) -> None:
    """Of a folder that somebody gave, no other file is read than its own: transformers would."""
    for field, value in said.items():
        names = value if field.endswith("_files") and isinstance(value, list) else [value]
        # The place of the special tokens when it was saved stands in many published configs; nothing reads it.
        elsewhere = field.endswith("_file") and field != "special_tokens_map_file" and value is not None
        if elsewhere or (field.endswith("_files") and any(Path(str(name)).name != name for name in names)):
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} has {field}={value!r}: a tokenizer's files stand in its folder "
                "under their own names; remove the field"
            )


def _unsaid(said: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    normalizer = whole.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer":
        return {}
    return {ours: normalizer[theirs] for ours, theirs in _NORMALIZER.items() if ours not in said}
