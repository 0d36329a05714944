import json

from flaxmpc.convert import card
from flaxmpc.convert.configs import Conversion
from flaxmpc.convert.runs import resolve
from flaxmpc.models import zoo

RESULTS = {
    "test_sentences": 1019,
    "teacher_accuracy": 0.8665,
    "untrained_accuracy": 0.5,
    "accuracy": 0.8685,
    "pieces": 1019,
    "pieces_agreement": 0.9124,
    "difference": 0.002,
    "ci_low": -0.01,
    "ci_high": 0.012,
    "ref2k_sentences": 1019,
    "ref2k_accuracy": 0.8675,
    "ref2k_agreement": 0.999,
    "ref2k_max_logit_difference": 0.0123,
}


def written(folder, results=RESULTS, **changes) -> str:
    folder.mkdir(exist_ok=True)
    config = json.loads((zoo.find(zoo.DEFAULT) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    recipe = Conversion(teacher=folder / "teacher", data="movie", out=folder, unlabelled=folder / "more.tsv")
    (folder / "recipe.json").write_text(json.dumps(resolve(recipe)))
    (folder / "results.json").write_text(json.dumps(results))
    card.write(folder)
    return (folder / "README.md").read_text()


def test_a_card_has_every_figure(tmp_path):
    text = written(tmp_path / "entry", attention="2quad_freediv", layer_norm="layer_norm")
    assert text.startswith("# entry\n")
    for figure in (
        "86.7 %",
        "50.0 %",
        "86.9 %",
        "86.8 %",
        "99.9 % of 1,019 labels",
        "0.0123",
        "+0.20 points",
        "91.2 % of 1,019",
        "Distilled on 0.25 pieces of 1 to 6 tokens a row and in stage 1 `entry/more.tsv`, too.",
    ):
        assert figure in text, figure
    assert "-1.00 to +1.20" in text
    assert "`2quad_freediv`" in text
    assert "`layer_norm`, exact" in text
    assert "not shipped: by recipe" in text
    assert "Hutto" in text
    assert "8 epochs at 0.0003" in text
    assert "1 epoch at 3e-05" in text
    assert "ABY3" not in text


def test_a_card_says_how_deep_the_layer_norms_are(tmp_path):
    chebyshev = {"name": "layer_norm_chebyshev", "low": 0.1, "high": 3.0, "depth": 4}
    text = written(tmp_path / "entry", layer_norm=[[chebyshev, "layer_norm"]] * 6)
    assert "`layer_norm_chebyshev`, 24 levels in 6 LayerNorms, ranges from data; 6 of 12 are exact" in text


def test_notes_go_into_the_card(tmp_path):
    folder = tmp_path / "entry"
    folder.mkdir()
    (folder / "notes.md").write_text("## Tried\n\nA higher rate: worse.\n")
    assert "A higher rate: worse." in written(folder)


def test_metrics_of_a_task_are_its_columns(tmp_path):
    both = {"test_sentences": 408, "accuracy": 0.8, "f1": 0.75, "teacher_accuracy": 0.81, "teacher_f1": 0.76}
    text = written(tmp_path / "entry", both)
    assert "|  | accuracy | f1 |" in text
    assert "| teacher: exact, float32, in the clear | 81.0 % | 76.0 % |" in text


def test_a_card_is_written_over_no_link(tmp_path):
    written(tmp_path / "entry")
    (tmp_path / "entry" / "README.md").unlink()
    (tmp_path / "entry" / "README.md").symlink_to(tmp_path / "mine")
    card.write(tmp_path / "entry")
    assert not (tmp_path / "entry" / "README.md").is_symlink()
    assert not (tmp_path / "mine").exists()
