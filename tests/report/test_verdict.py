import pytest

from m3i_fast.report.evaluations.verdict import judge, judge_more, points, summary, tiles


def _interval(low: float, high: float) -> dict[str, float]:
    return {"difference": (low + high) / 2, "low": low, "high": high}


def _evaluation(**intervals: tuple[float, float]) -> dict:  # type: ignore[type-arg]
    """Two measures against untrained; intervals as fractions, by measure."""
    return {
        "knn_top1": {"trained": 0.5, "untrained": 0.45, "chance": 0.3},
        "linear_top1": {"trained": 0.5, "untrained": 0.55, "chance": 0.3},
        "trained_minus": {
            name: {"untrained": _interval(*interval), "chance": _interval(0.1, 0.3)}
            for name, interval in intervals.items()
        },
    }


@pytest.mark.parametrize(
    ("knn", "linear", "sentence"),
    [
        ((0.01, 0.09), (0.02, 0.1), "Against the untrained encoder: better in both measures."),
        (
            (0.01, 0.09),
            (-0.09, -0.01),
            "Against the untrained encoder: better in category by kNN; "
            "worse in category by linear probe.",
        ),
        (
            (-0.01, 0.11),
            (-0.09, 0.0),
            "Against the untrained encoder: no difference found in both measures.",
        ),
    ],
)
def test_summary_says_what_the_intervals_say(
    knn: tuple[float, float], linear: tuple[float, float], sentence: str
) -> None:
    found = summary(judge(_evaluation(knn_top1=knn, linear_top1=linear)))
    assert found == [sentence, "Against chance: better in both measures."]


def test_without_intervals_nothing_is_called_better() -> None:
    evaluation = _evaluation()
    del evaluation["trained_minus"]
    assert summary(judge(evaluation)) == [
        "Against the untrained encoder: higher, no interval computed in category by kNN; "
        "lower, no interval computed in category by linear probe.",
        "Against chance: higher, no interval computed in both measures.",
    ]


def test_a_difference_shows_its_interval_in_points() -> None:
    (knn, _) = judge(_evaluation(knn_top1=(-0.012, 0.112)))
    untrained = knn.comparisons[0]
    assert untrained.text == "+5.0 (\N{MINUS SIGN}1.2 to 11.2)"
    assert (untrained.verdict, untrained.mark) == ("no difference found", "no difference")


def test_a_corrected_p_value_takes_a_verdict_back() -> None:
    evaluation = _evaluation(knn_top1=(0.01, 0.09))
    intervals = evaluation["trained_minus"]["knn_top1"]
    for p_value, verdict in ((0.049, "better"), (0.05, "no difference found")):
        intervals["untrained"]["p_value"] = p_value
        assert judge(evaluation)[0].comparisons[0].verdict == verdict


def test_the_hard_half_stands_in_the_table_alone() -> None:
    evaluation = _evaluation() | {"knn_top1_hard": {"trained": 0.3, "untrained": 0.25}}
    assert [found.name for found in judge(evaluation)] == ["knn_top1", "linear_top1"]
    (hard,) = judge_more(evaluation)
    assert hard.title == "Category by kNN, hard half" and hard.shown["trained"] == "30.0%"


def test_points_have_no_negative_zero() -> None:
    assert points(-0.0004) == "0.0"
    assert points(-0.002) == "\N{MINUS SIGN}0.2"


def test_tiles_put_chance_and_the_others_beside_the_number() -> None:
    evaluation = _evaluation() | {
        "caption_to_image_recall_at_5": {"trained": 0.2, "untrained": 0.03, "chance": 0.02}
    }
    recall, knn, linear, speed = tiles(judge(evaluation), images_per_s=3170.4, num_steps=1200)
    assert (recall.value, recall.detail) == (
        "20.0%",
        "10.0 times chance (2.0%), untrained 3.0%",
    )
    assert (knn.value, knn.detail) == ("50.0%", "untrained 45.0%, chance 30.0%")
    assert linear.detail == "untrained 55.0%, chance 30.0%"
    assert (speed.value, speed.detail) == ("3,170", "over 1,200 steps")


def test_measures_that_are_absent_are_left_out() -> None:
    evaluation = {"knn_top1": {"trained": 0.5}, "knn_balanced_accuracy": {"trained": 0.4}}
    assert [judgement.name for judgement in judge(evaluation)] == ["knn_top1"]
    assert [judgement.name for judgement in judge_more(evaluation)] == ["knn_balanced_accuracy"]
    assert summary(judge(evaluation)) == []


def test_an_evaluation_without_measures_is_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluation: expected one of .*knn_top1.* got \['x'\]"):
        judge({"x": 1})
    with pytest.raises(
        ValueError, match=r"evaluation.knn_top1: expected 'trained', got \['chance'\]"
    ):
        judge({"knn_top1": {"chance": 0.1}})
