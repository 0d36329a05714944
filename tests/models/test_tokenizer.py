"""The same ids before and after saving, and those of transformers' AutoTokenizer or of the file itself."""

import json
import pickle
import sys

import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from flaxmpc.data.batches import encode
from flaxmpc.models import zoo
from flaxmpc.models.tokenizer import FILES, load_tokenizer, save_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, "Paris", "paris", "is", "café", "cafe", "Good", "good", "##ness", "<film>", "!"]
TEXTS = ["Paris is café", "paris IS Goodness!", "a <film> is good"]


def word_piece(lowercase: bool, strip_accents: bool | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def byte_pairs() -> Tokenizer:
    """As RoBERTa's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet, "oo", "is"])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [("o", "o"), ("i", "s")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def unigram() -> Tokenizer:
    """As SentencePiece's."""
    pieces = [("<unk>", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("▁", -2.0), ("▁is", -1.0), ("Paris", -3.0)]
    letters = [(letter, -5.0) for letter in "aPrisGodnpécf!<>lm"]
    tokenizer = Tokenizer(models.Unigram([*pieces, *letters], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def folder_of(path, tokenizer=None, *, vocabulary=False, config=None, said=None, **others):
    """A folder with the files that are given; `others` by their names without .json."""
    path.mkdir()
    if tokenizer is not None:
        tokenizer.save(str(path / "tokenizer.json"))
    if vocabulary:
        (path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    for name, fields in {"config": config, "tokenizer_config": said, **others}.items():
        if fields is not None:
            (path / f"{name}.json").write_text(json.dumps(fields))
    return path


BERT = {"model_type": "bert"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
ADDED = {"<film>": len(VOCABULARY)}
CASES = {
    "uncased": lambda path: folder_of(path, word_piece(True), config=BERT, said={"tokenizer_class": "BertTokenizer"}),
    "cased": lambda path: folder_of(
        path, word_piece(False), config=BERT, said={"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    ),
    "cased, of a class without switches": lambda path: folder_of(path, word_piece(False), config=BERT, said=FAST),
    "cased, accents stripped": lambda path: folder_of(path, word_piece(False, True), config=BERT, said=FAST),
    "vocab.txt only": lambda path: folder_of(path, vocabulary=True),
    "vocab.txt and config.json": lambda path: folder_of(path, vocabulary=True, config=BERT),
    "vocab.txt, not lower-cased": lambda path: folder_of(path, vocabulary=True, said={"do_lower_case": False}),
    "added_tokens.json": lambda path: folder_of(path, vocabulary=True, config=BERT, added_tokens=ADDED),
    "special_tokens_map.json": lambda path: folder_of(
        path, vocabulary=True, config=BERT, special_tokens_map={"additional_special_tokens": ["<film>", "<new>"]}
    ),
    "byte pairs": lambda path: folder_of(path, byte_pairs(), config=BERT, said={"tokenizer_class": "RobertaTokenizer"}),
    "unigram": lambda path: folder_of(path, unigram(), config=BERT, said=FAST),
}
# Those that say nothing of their class: the file is all there is, and AutoTokenizer would make a BERT's of it.
OF_THE_FILE = {
    "cased": word_piece(False),
    "uncased": word_piece(True),
    "accents stripped": word_piece(False, True),
    "byte pairs": byte_pairs(),
    "unigram": unigram(),
}


def ids(tokenizer) -> list:
    """Of texts and of a pair, with types."""
    pairs = encode(tokenizer, [(TEXTS[0], TEXTS[1])], 64)
    assert pairs.token_type_ids is not None
    found = [*encode(tokenizer, TEXTS, 64).input_ids, *pairs.input_ids, *pairs.token_type_ids]
    return [row.tolist() for row in found]


@pytest.mark.parametrize("case", CASES)
def test_a_tokenizer_is_autotokenizers_and_stays_it_when_saved(case, tmp_path):
    folder = CASES[case](tmp_path / "given")
    config = transformers.BertConfig()
    theirs = transformers.AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
    ours = load_tokenizer(folder)
    assert ids(ours) == ids(theirs)
    save_tokenizer(ours, tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} <= set(FILES)
    assert ids(load_tokenizer(tmp_path / "saved")) == ids(theirs)
    assert ids(transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", config=config)) == ids(theirs)


@pytest.mark.parametrize("case", OF_THE_FILE)
@pytest.mark.parametrize("config", [None, BERT], ids=["alone", "with config.json"])
def test_a_file_of_no_class_is_read_as_it_is(case, config, tmp_path):
    tokenizer = OF_THE_FILE[case]
    ours = load_tokenizer(folder_of(tmp_path / "given", tokenizer, config=config))
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    assert [row.tolist() for row in encode(ours, TEXTS, 64).input_ids] == expected
    save_tokenizer(ours, tmp_path / "saved")
    assert [row.tolist() for row in encode(load_tokenizer(tmp_path / "saved"), TEXTS, 64).input_ids] == expected


ROLES = {
    "bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>"
}  # fmt: skip


@pytest.mark.parametrize("said", [None, "its own", "its own, fast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("model_type", ["xlm-roberta", "camembert"])
def test_a_sentencepiece_tokenizer_is_its_file_and_has_its_roles(said, model_type, sentencepiece, tmp_path):
    """Published folders name no class. Of its own, transformers 5 would leave the normalizer out."""
    tokenizer = sentencepiece(model_type)
    own = {"xlm-roberta": "XLMRobertaTokenizer", "camembert": "CamembertTokenizer"}[model_type]
    name = {"its own": own, "its own, fast": f"{own}Fast"}.get(str(said), said)
    fields = {"model_max_length": 512} | ({} if name is None else {"tokenizer_class": name})
    folder = folder_of(tmp_path / "given", tokenizer, config={"model_type": model_type}, said=fields)
    texts = ["un bon film", "un  ﬁlm ｂｏｎ\u3000!", "films <mask>.", "a<pad>b", "Ж", ""]
    assert tokenizer.encode(texts[1]).tokens == ["<s>", "▁un", "▁film", "▁bon", "▁", "!", "</s>"]
    expected = [tokenizer.encode(text).ids for text in texts]
    pair = tokenizer.encode(*texts[:2])
    assert pair.tokens.count("</s>") == 3

    def check(found):
        assert [found(text)["input_ids"] for text in texts] == expected
        assert found(*texts[:2])["input_ids"] == pair.ids
        assert {role: getattr(found, f"{role}_token") for role in ROLES} == ROLES
        assert found.pad_token_id == 1
        assert (found.cls_token_id, found.sep_token_id) == (expected[0][0], expected[0][-1])
        assert len(found) == tokenizer.get_vocab_size()

    ours = load_tokenizer(folder)
    check(ours)
    encoded = encode(ours, [(texts[0], texts[1])], 64)
    assert encoded.token_type_ids is not None
    assert not encoded.token_type_ids[0].any()
    save_tokenizer(ours, tmp_path / "saved")
    check(load_tokenizer(tmp_path / "saved"))
    check(transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", config=transformers.BertConfig()))


@pytest.mark.parametrize("said", [None, "PreTrainedTokenizerFast", "XLMRobertaTokenizer"])
def test_a_role_that_a_file_names_is_kept(said, sentencepiece, tmp_path):
    fields = {"pad_token": "</s>"} | ({} if said is None else {"tokenizer_class": said})
    folder = folder_of(
        tmp_path / "given", sentencepiece("xlm-roberta"), said=fields, special_tokens_map={"cls_token": "s"}
    )
    found = load_tokenizer(folder)
    assert (found.pad_token, found.cls_token, found.sep_token, found.mask_token) == ("</s>", "s", "</s>", "<mask>")


def test_a_bert_without_a_class_has_its_roles(tmp_path):
    """As published: tokenizer_config.json says {"do_lower_case": true}, and no class."""
    tokenizer = word_piece(True)
    tokenizer.add_special_tokens(SPECIAL)
    found = load_tokenizer(folder_of(tmp_path / "given", tokenizer, config=BERT, said={"do_lower_case": True}))
    roles = (found.pad_token, found.unk_token, found.cls_token, found.sep_token, found.mask_token)
    assert roles == tuple(SPECIAL)
    assert (found.bos_token, found.pad_token_id) == (None, 0)
    assert found("[PAD] Paris")["input_ids"] == tokenizer.encode("[PAD] Paris").ids


@pytest.mark.parametrize("strip_accents", [None, True])
def test_what_is_not_said_of_a_bert_is_as_in_its_file(strip_accents, tmp_path):
    tokenizer = word_piece(False, strip_accents)
    folder = folder_of(tmp_path / "given", tokenizer, config=BERT, said={"tokenizer_class": "BertTokenizer"})
    found = encode(load_tokenizer(folder), TEXTS, 64).input_ids
    assert [row.tolist() for row in found] == [tokenizer.encode(text).ids for text in TEXTS]


def test_the_zoos_tokenizer_gives_the_ids_it_gave(minilm, tmp_path):
    texts = ["A gripping, beautifully acted film.", "It's naïve, co-written (2004) and UNEVEN..."]
    expected = [
        [101, 1037, 13940, 1010, 17950, 6051, 2143, 1012, 102],
        [101, 2009, 1005, 1055, 15743, 1010, 2522, 1011, 2517, 1006, 2432, 1007, 1998, 17837, 1012, 1012, 1012, 102],
    ]
    folder = zoo.find(zoo.DEFAULT)
    save_tokenizer(load_tokenizer(folder), tmp_path)
    for tokenizer in (load_tokenizer(folder), load_tokenizer(minilm), load_tokenizer(tmp_path)):
        assert tokenizer(texts)["input_ids"] == expected


def test_what_was_cut_last_is_not_saved(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path / "given", vocabulary=True))
    tokenizer(TEXTS, truncation=True, padding=True, max_length=4)
    save_tokenizer(tokenizer, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"said": {"vocab_file": "/etc/passwd"}},
            "has vocab_file='/etc/passwd': a tokenizer's files stand in its folder",
        ),
        ({"said": {"tokenizer_file": "tokenizer.json"}}, "has tokenizer_file="),
        ({"said": {"fast_tokenizer_files": ["../tokenizer.4.0.json"]}}, "has fast_tokenizer_files="),
        (
            {"said": {"tokenizer_class": "NoTokenizer"}},
            r"tokenizer_config\.json: unknown tokenizer_class 'NoTokenizer'",
        ),
        ({"said": {"tokenizer_class": "BertJapaneseTokenizer"}}, "unknown tokenizer_class 'BertJapaneseTokenizer'"),
        ({"said": {"tokenizer_class": "AutoModel"}}, "unknown tokenizer_class 'AutoModel'"),
        ({"said": {"tokenizer_class": ["BertTokenizer"]}}, "unknown tokenizer_class"),
        ({"said": ["BertTokenizer"]}, r"tokenizer_config\.json holds no JSON object"),
        (
            {"said": {"auto_map": {"AutoTokenizer": ["x.Y", None]}, "tokenizer_class": "Y"}},
            "unknown tokenizer_class 'Y'",
        ),
        ({"said": {"merges_file": "a"}}, "has merges_file='a'"),
        ({"said": {"gguf_file": "a"}}, "has gguf_file='a'"),
        (
            {"special_tokens_map": {"vocab_file": "/etc/passwd"}},
            r"special_tokens_map\.json: unknown special token 'voc",
        ),
        ({"special_tokens_map": {"cls_token": 3}}, "cls_token is 3, not a string of 1 to 1000 characters"),
        ({"said": {"sep_token": {"content": "[SEP]", "lstrip": "x"}}}, "sep_token 'lstrip' is 'x', not true, false or"),
        ({"said": {"do_lower_case": "no"}}, r"tokenizer_config\.json: do_lower_case is 'no', not true, false or null"),
        ({"said": {"model_max_length": "9"}}, "model_max_length is '9', not a number"),
        ({"said": {"truncation_side": "up"}}, "truncation_side is 'up', neither 'left' nor 'right'"),
        (
            {"said": {"additional_special_tokens": ["a"] * 1001}},
            "additional_special_tokens is .*; a list of at most 1000",
        ),
        (
            {"said": {"added_tokens_decoder": {"-1": {"content": "a"}}}},
            "added_tokens_decoder id is '-1', not a whole n",
        ),
        ({"said": {"added_tokens_decoder": {"1": {"content": "a" * 1001}}}}, "is 'aaa.*', not a string of 1 to 1000"),
        (
            {"added_tokens": {"<film>": 10**9}},
            r"added_tokens\.json: the id of '<film>' is 1000000000, not a whole number",
        ),
        ({"added_tokens": {f"{i}": i for i in range(20_001)}}, r"added_tokens\.json: has 20001 tokens; at most 20000"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(fields, message, tmp_path):
    folder = folder_of(tmp_path / "given", vocabulary=True, config=BERT, **fields)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_the_place_of_special_tokens_is_passed_over(tmp_path):
    """Many published folders name a cache of the machine that they were saved on."""
    said = {"special_tokens_map_file": "/home/user/.cache/x", "tokenizer_file": None}
    assert load_tokenizer(folder_of(tmp_path / "given", vocabulary=True, said=said))


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_no_file_of_another_place_becomes_a_tokenizer(name, tmp_path):
    """As a folder that somebody else packed may have it: what a link leads to would be published with the model."""
    folder = folder_of(tmp_path / "given", vocabulary=True, config=BERT, said={}, special_tokens_map={})
    secret = tmp_path / "secret"
    secret.write_bytes((folder / "vocab.txt").read_bytes() if name == "vocab.txt" else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match=rf"given/{name} is a link to .*/secret: of a folder only its own files"):
        load_tokenizer(folder)


def test_a_hub_cache_is_read_through_its_own_links(tmp_path):
    """There the files of a snapshot are links to blobs, and nothing else may be."""
    given = folder_of(tmp_path / "given", word_piece(True), config=BERT, said={"tokenizer_class": "BertTokenizer"})
    repository = tmp_path / "models--someone--bert"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(given.iterdir()):
        path.rename(repository / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "linked").symlink_to(snapshot)  # the folder's own path is the user's
    for folder in (snapshot, tmp_path / "linked"):
        assert ids(load_tokenizer(folder))
    (tmp_path / "secret").write_text("{}")
    (snapshot / "special_tokens_map.json").symlink_to("../../../secret")
    with pytest.raises(ValueError, match=r"special_tokens_map\.json is a link to .*/secret"):
        load_tokenizer(snapshot)
    (tmp_path / "secret").unlink()  # as if the file were not there, texts could get other tokens
    with pytest.raises(FileNotFoundError, match=r"special_tokens_map\.json does not exist, it is a link to nothing"):
        load_tokenizer(snapshot)


def test_what_does_not_decide_about_ids_is_not_kept(tmp_path):
    """What is kept of a folder is published to clients."""
    said = {
        "tokenizer_class": "BertTokenizer",
        "auth_token": "SECRET",
        "chat_template": "SECRET",
        "init_inputs": ["SECRET"],
    }
    said |= {"name_or_path": "SECRET", "special_tokens_map_file": "SECRET", "from_slow": True}
    folder = folder_of(tmp_path / "given", word_piece(True), config=BERT, said=said)
    (folder / "chat_template.jinja").write_text("SECRET")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "a.jinja").write_text("SECRET")
    tokenizer_file = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_file | {"comment": "SECRET"}))
    save_tokenizer(load_tokenizer(folder), tmp_path / "saved")
    saved = {path.name: path.read_text() for path in (tmp_path / "saved").iterdir()}
    assert saved.keys() <= set(FILES)
    assert not any("SECRET" in text or str(tmp_path) in text or "/tmp" in text for text in saved.values())


def test_nothing_is_unpickled(tmp_path):
    """Nor is code of the folder run. PyTorch's files, and an older tokenizer's vocabulary, are pickles."""
    folder = folder_of(tmp_path / "given", word_piece(True), config=BERT | {"auto_map": {"AutoTokenizer": "evil.Evil"}})
    (folder / "evil.py").write_text("raise SystemExit('run')")
    found = []
    sys.addaudithook(lambda event, arguments: found.append(arguments) if event == "pickle.find_class" else None)
    for name in ("vocab.pkl", "pytorch_model.bin", "vocab.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(print))
    pickle.loads(pickle.dumps(print))
    assert len(found) == 1
    load_tokenizer(folder)
    assert len(found) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3}'])
def test_a_damaged_file_is_named(content, tmp_path):
    folder = folder_of(tmp_path / "given", config=BERT)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"given/tokenizer\.json"):
        load_tokenizer(folder)


def test_what_is_no_folder_is_told_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^/no/where is no folder$"):
        load_tokenizer("/no/where")
    (tmp_path / "model").write_text("")
    with pytest.raises(FileNotFoundError, match="model is a file, not the folder of a model"):
        load_tokenizer("model")
