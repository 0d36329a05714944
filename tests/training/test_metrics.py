import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from flaxmpc.data.batches import Split
from flaxmpc.data.glue import GLUE
from flaxmpc.training import metrics
from flaxmpc.training.metrics import METRICS, accuracy, correct, f1, matthews_correlation, paired_difference

LOGITS = np.array([[0.1, 0.2], [3, -1], [-5, -4], [0, 1], [2, 1], [1, 0]])  # 1, 0, 1, 1, 0, 0
LABELS = np.array([1, 0, 0, 1, 1, 0])
SPLIT = Split([[1]] * 6, LABELS)


def test_accuracy_is_the_share_of_largest_logits_at_the_label():
    assert accuracy(LOGITS, LABELS) == 4 / 6
    assert isinstance(accuracy(LOGITS, LABELS), float)
    assert correct(LOGITS, LABELS).tolist() == [True, True, False, True, False, True]


def test_f1_and_matthews_by_hand():
    # Two right of class 1 and two of class 0, one wrong of each.
    assert f1(LOGITS, LABELS) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert matthews_correlation(LOGITS, LABELS) == pytest.approx((2 * 2 - 1 * 1) / (3 * 3 * 3 * 3) ** 0.5)


def test_f1_of_many_classes_is_their_mean():
    labels = np.array([0, 1, 2, 2])
    logits = np.eye(3)[[0, 2, 2, 2]]
    assert f1(logits, labels) == pytest.approx((1 + 0 + 0.8) / 3)


def test_what_is_undefined_is_0_and_no_warning():
    one_class = np.tile([1.0, 0.0], (6, 1))
    assert f1(one_class, LABELS) == 0
    assert matthews_correlation(one_class, LABELS) == 0
    for name in ("pearson", "spearman"):
        assert METRICS[name](np.ones((6, 1)), np.arange(6.0)) == 0
        assert METRICS[name](np.arange(6.0)[:, None], np.ones(6)) == 0


def test_correlations_tell_lines_from_curves():
    x = np.linspace(0, 3, 20)
    assert METRICS["pearson"](2 * x[:, None] + 1, x) == pytest.approx(1)
    assert METRICS["spearman"](np.exp(x)[:, None], x) == pytest.approx(1)
    assert METRICS["pearson"](np.exp(x)[:, None], x) < 0.95
    assert METRICS["spearman"](-x[:, None], x) == pytest.approx(-1)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_of_classes_is_refused(name):
    with pytest.raises(ValueError, match="one logit, not 2"):
        METRICS[name](LOGITS, LABELS)


def test_metrics_by_name():
    found = metrics.evaluate(("f1", "accuracy"), LOGITS, SPLIT, ("a", "b"))
    assert list(found) == ["f1", "accuracy"]
    assert found["accuracy"] == accuracy(LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"unknown metric 'acuracy'\. Did you mean 'accuracy'\?"):
        metrics.evaluate(("acuracy",), LOGITS, SPLIT, ("a", "b"))


def test_all_metrics_of_glue_exist():
    assert {name for task in GLUE.values() for name in task.metrics} == set(METRICS)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=30))
def test_metrics_stay_in_their_range(pairs):
    predicted, labels = np.array(pairs).T
    logits = np.eye(3)[predicted]
    assert 0 <= f1(logits, labels) <= 1
    assert -1 <= matthews_correlation(logits, labels) <= 1
    assert accuracy(logits, labels) == sklearn.accuracy_score(labels, predicted)


# --------------------------------------------------------------------------------------------------- paired bootstrap


def two_models(size=1000, seed=0):
    rng = np.random.default_rng(seed)
    teacher = rng.random(size) < 0.85
    return np.where(rng.random(size) < 0.9, teacher, rng.random(size) < 0.5), teacher


def test_the_interval_is_scipys():
    student, teacher = two_models()
    found = paired_difference(student, teacher, seed=1)
    expected = stats.bootstrap(
        (student.astype(float) - teacher,), np.mean, n_resamples=10_000, method="percentile", vectorized=True, batch=500
    ).confidence_interval
    assert found.difference == pytest.approx(student.mean() - teacher.mean())
    # Two random intervals of steps of 1/1000.
    assert found.ci_low == pytest.approx(expected.low, abs=2.5e-3)
    assert found.ci_high == pytest.approx(expected.high, abs=2.5e-3)
    assert found.ci_low < found.difference < found.ci_high


def test_the_interval_is_the_seeds_and_turns_with_the_models():
    student, teacher = two_models()
    assert paired_difference(student, teacher, seed=1) == paired_difference(student, teacher, seed=1)
    assert paired_difference(student, teacher, seed=1) != paired_difference(student, teacher, seed=2)
    turned = paired_difference(teacher, student, seed=1)
    assert turned.difference == -paired_difference(student, teacher, seed=1).difference
    assert turned.ci_low < turned.difference < turned.ci_high


def test_equal_models_differ_by_nothing():
    student, _ = two_models()
    assert paired_difference(student, student, seed=0) == (0, 0, 0)
    assert paired_difference(np.ones(5, bool), np.zeros(5, bool), seed=0) == (1, 1, 1)


def test_pairing_narrows_the_interval():
    student, teacher = two_models()
    alike = paired_difference(student, teacher, seed=0)
    shuffled = paired_difference(np.random.default_rng(0).permutation(student), teacher, seed=0)
    assert alike.ci_high - alike.ci_low < 0.8 * (shuffled.ci_high - shuffled.ci_low)


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        drawn = rng.random(400)
        student, teacher = drawn < 0.85, (drawn > 0.05) & (drawn < 0.92)  # 0.85 and 0.87
        found = paired_difference(student, teacher, seed=0, resamples=2000)
        covered += found.ci_low <= -0.02 <= found.ci_high
    assert covered >= 175


@pytest.mark.parametrize(("student", "teacher"), [([True], [True, False]), ([], []), ([[True]], [[True]])])
def test_models_of_other_rows_are_not_compared(student, teacher):
    with pytest.raises(ValueError, match="the same rows"):
        paired_difference(np.array(student), np.array(teacher), seed=0)


def test_a_logit_that_is_not_finite_is_never_right():
    """argmax takes the first NaN for the largest, which may be the label's place."""
    logits = np.array([[np.nan, 1.0], [np.nan, np.nan], [np.inf, 0.0], [2.0, 1.0]])
    assert correct(logits, np.zeros(4)).tolist() == [False, False, False, True]
    assert accuracy(logits, np.zeros(4)) == 0.25


def test_a_logit_that_is_not_finite_is_never_a_label():
    labels = np.array([0, 1, 0, 1])
    right = np.eye(2)[labels] * 4.0
    for bad in (np.nan, np.inf, -np.inf):
        for row in range(4):
            broken = right.copy()
            broken[row, 1 - labels[row]] = bad
            wrong = right.copy()
            wrong[row] = wrong[row, ::-1]
            for name in ("accuracy", "f1", "matthews_correlation"):
                assert metrics.METRICS[name](broken, labels) == metrics.METRICS[name](wrong, labels) < 1
            assert metrics.agreement(broken, broken) == 0.75
            assert metrics.agreement(right, broken) == metrics.agreement(broken, right) == 0.75


def test_a_score_that_is_not_finite_has_no_correlation():
    scores, labels = np.arange(5.0)[:, None], np.arange(5.0)
    assert metrics.pearson(scores, labels) == pytest.approx(1)
    for bad in (np.nan, np.inf):
        scores[2] = bad
        assert metrics.pearson(scores, labels) == metrics.spearman(scores, labels) == 0
        assert metrics.agreement(scores, np.arange(5.0)[:, None] + 0.01) == 0.8


def test_agreement_is_of_labels_and_of_scores():
    one, other = np.array([[1.0, 0.0], [0.2, 0.3]]), np.array([[5.0, 1.0], [0.3, 0.2]])
    assert metrics.agreement(one, other) == 0.5
    assert metrics.agreement(np.array([[1.0], [2.0]]), np.array([[1.04], [2.06]])) == 0.5


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["accuracy"], "accuracy"),
        (["accuracy", "f1"], "accuracy"),
        (["accuracy", "matthews_correlation"], "matthews_correlation"),
        (["accuracy", metrics.ENTITY_F1], metrics.ENTITY_F1),
        (["spearman", "pearson"], "pearson"),
        (["loss"], None),
    ],
)
def test_a_model_is_told_by_the_metric_that_says_most(names, told):
    assert metrics.headline(dict.fromkeys([*names, "test_sentences"], 0.5)) == told


def test_every_metric_alone_is_told():
    assert [metrics.headline({name: 0.5}) for name in metrics.NAMES] == list(metrics.NAMES)
