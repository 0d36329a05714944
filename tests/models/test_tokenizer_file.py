"""What tokenizer.json may ask for: that of published tokenizers, and nothing that makes much of little."""

import base64
import copy
import json

import pytest
from tokenizers import Tokenizer

from flaxmpc.models.tokenizer import load_tokenizer
from flaxmpc.models.tokenizer_file import checked

MODEL = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
    "vocab": {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "film"])},
}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}},
}
GOOD = {
    "added_tokens": [
        {"id": 1, "content": "[UNK]", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
    ],
    "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
    | {"strip_accents": None, "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": TEMPLATE,
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": MODEL,
}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(*strings):
    """A table of normal forms: an empty trie, and strings."""
    content = (4).to_bytes(4, "little") + bytes(4) + b"".join(string + b"\0" for string in strings)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def sequence(kind, *components):
    return {"type": "Sequence", {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[kind]: list(components)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # As XLM-RoBERTa's, which multilingual BERTs have too.
        {
            "normalizer": sequence("normalizer", charsmap(b"fi", b"ff"), replace({"Regex": " {2,}"}, " ")),
            "pre_tokenizer": sequence(
                "pre_tokenizer",
                {"type": "WhitespaceSplit"},
                {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            ),
            "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -2.0]], "byte_fallback": False},
        },
        {"normalizer": sequence("normalizer", {"type": "NFKC"}, replace({"String": "``"}, '"'), {"type": "Lowercase"})},
        {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, "added_tokens": None},
        {"padding": {"strategy": {"Fixed": 10**9}}, "truncation": {"max_length": 10**9}},  # of the last call: left out
    ],
    ids=["BERT", "XLM-R", "replaced", "bare", "padded"],
)
def test_what_published_tokenizers_have_is_kept(changes):
    fields = copy.deepcopy(GOOD) | changes
    kept = checked(fields | {"comment": "left out"})
    assert {name: kept[name] for name in GOOD if fields[name] is not None} == {
        name: value for name, value in fields.items() if name in GOOD and value is not None
    }
    assert kept.keys() == {"version", "padding", "truncation", *GOOD}
    if not str(changes).count("Precompiled"):  # whose trie is empty
        tokenizer = Tokenizer.from_str(json.dumps(kept))
        assert tokenizer.encode("good  film").ids


TWICE = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Texts that grow.
        ({"normalizer": sequence("normalizer", *[replace({"String": "a"}, "aa")] * 10)}, "makes a text 1.02e.03 times"),
        ({"normalizer": replace({"String": "a"}, "a" * 17)}, "makes a text 17 times longer; at most 16 times is"),
        ({"normalizer": sequence("normalizer", *[{"type": "ByteLevel"}] * 5)}, "makes a text 32 times longer"),
        ({"pre_tokenizer": sequence("pre_tokenizer", *[{"type": "ByteLevel"}] * 5)}, "makes a text 32 times longer"),
        (
            {"normalizer": sequence("normalizer", *[{"type": "NFC"}] * 17)},
            "a list of 17; a list of at most 16 is allowed",
        ),
        (
            {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
            "Prepend: prepend is 'aaa.*', not a short string",
        ),
        ({"normalizer": replace({"String": ""}, "a")}, "pattern is '', not a string of 1 to 100"),
        ({"normalizer": charsmap(b"a" * 1000)}, "makes 1000 bytes of a character; at most 100"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////"}}, "precompiled_charsmap is damaged"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "precompiled_charsmap is no base64"),
        ({"post_processor": TEMPLATE | {"single": [TWICE] * 17}}, "single is a list of 17; a list of at most 16"),
        ({"post_processor": TEMPLATE | {"single": TEMPLATE["single"] * 2}}, r"single has a text twice: \['A', 'A'\]"),
        (
            {"post_processor": TEMPLATE | {"special_tokens": {"x": {"ids": [1] * 17, "tokens": ["x"]}}}},
            "special_tokens ids is a list of 17",
        ),
        ({"post_processor": TEMPLATE | {"single": [{"Sequence": {"id": "A", "type_id": 300}}]}}, "type_id is 300, not"),
        # Patterns that search without end.
        ({"normalizer": replace({"Regex": "(a+)+$"}, "b")}, "pattern is .*; a String is allowed, and of regular"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed"}},
            "a String is all",
        ),
        # Vocabularies.
        ({"model": MODEL | {"vocab": {"a": 2**32 - 1}}}, "vocab has 'a': 4294967295; tokens of up to 1000 characters"),
        ({"model": MODEL | {"vocab": {"a" * 1001: 1}}}, "tokens of up to 1000 characters with ids in 0..999999"),
        ({"model": MODEL | {"vocab": {"a": True}}}, "vocab has 'a': True"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0, 1]]}}, r"vocab has \['a', 0.0, 1\]; pieces of up to"),
        ({"model": MODEL | {"max_input_chars_per_word": 10**9}}, "max_input_chars_per_word is 1000000000, not a whole"),
        ({"model": MODEL | {"continuing_subword_prefix": "#" * 10**6}}, "at most 100 characters are allowed"),
        ({"model": MODEL | {"dropout": 0.1}}, "dropout is 0.1: only tokenizers that do not draw are supported"),
        ({"model": MODEL | {"cache": [1]}}, r"model cache is \[1\], not a string"),
        (
            {"added_tokens": [{"id": 1, "content": f"<{i}>"} for i in range(20_001)]},
            "a list of 20001; a list of at most",
        ),
        ({"added_tokens": [{"id": 1, "content": ""}]}, "content of added_tokens is '', not a string"),
        # What is not known.
        ({"normalizer": {"type": "Evil"}}, "unknown normalizer 'Evil'"),
        ({"pre_tokenizer": {"type": ["Split"]}}, "unknown pre_tokenizer"),
        ({"decoder": {"type": "WordPiece", "prefix": {"a": 1}}}, "prefix is .*, not a short string"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["[SEP]"]}}, "sep is .*, not a token and its id"),
        ({"model": None}, "model is None, not an object"),
    ],
)
def test_what_takes_much_memory_or_time_is_refused(changes, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOOD | changes))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: '{"model": ' + "[" * 100 + "]" * 100 + "}", "is nested more than 64 deep"),
        (lambda: '{"model": [' + "[]," * 2_000_000 + "[]]}", "has 2000003 lists and objects; at most 2000000"),
        (lambda: " " * (33 << 20), "has more than 33554432 bytes"),
    ],
    ids=["deep", "parts", "large"],
)
def test_a_file_that_grows_when_it_is_read_is_refused(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content())
    with pytest.raises(ValueError, match=rf"tokenizer\.json {message}"):
        load_tokenizer(tmp_path)
