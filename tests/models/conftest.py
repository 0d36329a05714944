import jax
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from flaxmpc.models.base import param_shapes


@pytest.fixture(scope="session")
def random_params():
    """random_params(model, seed) -> parameters, of which no two are alike; much faster than to initialise them."""

    def make(model, seed=0):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(model))

    return make


# Of the published tokenizers, in the order of their ids; <mask> is the last of all.
SENTENCEPIECE = {
    "xlm-roberta": ("<s>", "<pad>", "</s>", "<unk>"),
    "camembert": ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"),
}


@pytest.fixture(scope="session")
def sentencepiece():
    """sentencepiece("xlm-roberta") -> a Unigram tokenizer as XLM-RoBERTa's or CamemBERT's, of a few pieces."""

    def make(model_type: str) -> Tokenizer:
        special = SENTENCEPIECE[model_type]
        words = [("▁", -2.0), ("▁film", -3.0), ("▁bon", -3.0), ("▁un", -3.0), ("s", -4.0)]
        pieces = [*((token, 0.0) for token in special), *words, *((letter, -6.0) for letter in "abcdefghilmnortuv.!")]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>")))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        tokenizer.add_special_tokens([*special, AddedToken("<mask>", lstrip=True, normalized=False)])
        ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
        )
        return tokenizer

    return make
