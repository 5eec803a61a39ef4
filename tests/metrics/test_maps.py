"""Metrics of maps beside scikit-learn, SciPy and plain loops over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as sk

from mtl_lora_cli.metrics import Outcome
from mtl_lora_cli.metrics import tallies as count
from mtl_lora_cli.metrics.declare import find
from mtl_lora_cli.metrics.intervals import measure
from mtl_lora_cli.metrics.maps import delta_m

E, H, W = 5, 9, 11


def outcome(tallies: list[np.ndarray]) -> Outcome:
    none = np.zeros(len(tallies), dtype=np.int64)
    return Outcome(none, none, tallies=np.stack(tallies))


def drawn(name: str, o: Outcome, weights: list[int]) -> float:
    return float(find(name).raw(o, np.array([weights]))[0])


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(7)


def test_classes_are_scikit_learn_s(generator: np.random.Generator) -> None:
    truth = generator.integers(-1, 4, (E, H, W))
    truth[truth == 3] = 4  # class 3 never occurs
    answer = generator.choice([0, 1, 2, 4], (E, H, W))
    o = outcome([count.confusion(t, a, 6) for t, a in zip(truth, answer, strict=True)])
    for weights in ([1] * E, [2, 0, 1, 0, 3]):
        places = np.repeat(np.arange(E), weights)
        known = truth[places] >= 0
        right, given = truth[places][known], answer[places][known]
        expected = sk.jaccard_score(right, given, average="macro", labels=np.union1d(right, given))
        assert drawn("miou", o, weights) == pytest.approx(expected, abs=1e-12)
        found = drawn("pixel_accuracy", o, weights)
        assert found == pytest.approx(sk.accuracy_score(right, given), abs=1e-12)


def test_miou_is_no_mean_over_images(generator: np.random.Generator) -> None:
    truth, answer = generator.integers(0, 3, (2, E, H, W))
    each = [count.confusion(t, a, 3) for t, a in zip(truth, answer, strict=True)]
    whole = find("miou").value(outcome(each))
    apart = np.mean([find("miou").value(outcome([one])) for one in each])
    assert whole != pytest.approx(apart, abs=1e-3)


def test_depth_is_a_loop_s(generator: np.random.Generator) -> None:
    truth = generator.uniform(0.5, 9, (E, H, W))
    answer = truth * generator.uniform(0.6, 1.7, (E, H, W))
    truth[generator.random((E, H, W)) < 0.2] = np.nan
    o = outcome([count.depth(t, a) for t, a in zip(truth, answer, strict=True)])
    weights = [1, 2, 0, 1, 1]
    squares, relative, within, images, pixels = 0.0, 0.0, [0, 0, 0], [], 0
    for image in np.repeat(np.arange(E), weights):
        own = []
        for z, given in zip(truth[image].ravel(), answer[image].ravel(), strict=True):
            if math.isnan(z):
                continue
            own.append((given - z) ** 2)
            relative += abs(given - z) / z
            for power in range(3):
                within[power] += max(given / z, z / given) < 1.25 ** (power + 1)
        squares, pixels = squares + sum(own), pixels + len(own)
        images.append(math.sqrt(sum(own) / len(own)))
    expected = {
        "depth_rmse": math.sqrt(squares / pixels),
        "depth_rmse_images": sum(images) / len(images),
        "abs_rel": relative / pixels,
        **{f"delta_{power + 1}": within[power] / pixels for power in range(3)},
    }
    for name, value in expected.items():
        assert drawn(name, o, weights) == pytest.approx(value, rel=1e-12), name


def test_normals_are_by_the_cross_product(generator: np.random.Generator) -> None:
    truth = generator.normal(size=(E, H, W, 3))
    answer = truth + 0.4 * generator.normal(size=truth.shape)
    truth[generator.random((E, H, W)) < 0.2] = np.nan
    o = outcome([count.normals(t, a) for t, a in zip(truth, answer, strict=True)])
    angles = []
    for right, given in zip(truth.reshape(-1, 3), answer.reshape(-1, 3), strict=True):
        if not np.isnan(right).any():  # by the sine and cosine together, not by the arc cosine
            sine = np.linalg.norm(np.cross(right, given))
            angles.append(math.degrees(math.atan2(sine, right @ given)))
    every = np.array(angles)
    assert find("mean_angle").value(o) == pytest.approx(every.mean(), rel=1e-9)
    assert find("median_angle").value(o) == pytest.approx(np.median(every), abs=0.25)
    for name, most in (("within_11_25", 11.25), ("within_22_5", 22.5), ("within_30", 30)):
        assert find(name).value(o) == pytest.approx((every < most).mean(), abs=1e-12)


def test_edges_are_by_distance(generator: np.random.Generator) -> None:
    truth = (generator.random((E, H, W)) < 0.15).astype(np.float32)
    answer = generator.random((E, H, W))
    truth[:, :2, :2] = np.nan
    o = outcome([count.edges(t, a) for t, a in zip(truth, answer, strict=True)])
    best = 0.0
    for threshold in np.arange(1, 20) / 20:
        hits = marks = found = there = 0
        for t, a in zip(truth, answer, strict=True):
            edge, mark = t == 1, (a >= threshold) & ~np.isnan(t)
            to_edge, to_mark = (
                ndimage.distance_transform_cdt(~one, metric="chessboard")
                if one.any()
                else np.full((H, W), 99)
                for one in (edge, mark)
            )
            hits, marks = hits + (mark & (to_edge <= 1)).sum(), marks + mark.sum()
            found, there = found + (edge & (to_mark <= 1)).sum(), there + edge.sum()
        precision, recall = hits / max(marks, 1), found / there
        best = max(best, 2 * precision * recall / max(precision + recall, 1e-12))
    assert find("edge_f").value(o) == pytest.approx(best, rel=1e-12)


def test_salience_is_scikit_learn_s_by_image(generator: np.random.Generator) -> None:
    truth = (generator.random((E, H, W)) < 0.4).astype(np.float32)
    answer = np.clip(truth * 0.5 + generator.random((E, H, W)) * 0.7, 0, 1)
    o = outcome([count.saliency(t, a) for t, a in zip(truth, answer, strict=True)])
    iou, both = [], []
    for threshold in np.linspace(0.2, 0.9, 15):
        pairs = [
            (t.ravel() == 1, a.ravel() >= threshold) for t, a in zip(truth, answer, strict=True)
        ]
        iou.append(np.mean([sk.jaccard_score(*pair) for pair in pairs]))
        p, r = (
            np.mean([score(*pair, zero_division=0) for pair in pairs])
            for score in (sk.precision_score, sk.recall_score)
        )
        both.append(1.3 * p * r / (0.3 * p + r))
    assert find("saliency_miou").value(o) == pytest.approx(max(iou), rel=1e-12)
    assert find("max_f").value(o) == pytest.approx(max(both), rel=1e-12)


def test_what_was_not_seen_is_undefined() -> None:
    nothing = np.full((H, W), np.nan)
    o = outcome([count.depth(nothing, np.ones((H, W)))])
    assert measure("depth_rmse", o).value is None
    assert find("depth_rmse").value(o) == 1000
    assert measure("miou", Outcome(np.zeros(2, int), np.zeros(2, int))).why == "no maps"


def test_intervals_hold_the_value(generator: np.random.Generator) -> None:
    truth, answer = generator.integers(0, 3, (2, 30, H, W))
    answer = np.where(generator.random(answer.shape) < 0.6, truth, answer)
    o = outcome([count.confusion(t, a, 3) for t, a in zip(truth, answer, strict=True)])
    found = measure("miou", o)
    assert found.low is not None and found.high is not None
    assert found.low < found.value < found.high < found.low + 0.1


def test_delta_m_is_the_paper_s() -> None:
    """Segmentation 10 % better, RMSE 20 % better, angle 5 % worse: (10 + 20 − 5) / 3."""
    values = {"seg": 0.44, "depth": 0.48, "normals": 21.0}
    references = {"seg": 0.40, "depth": 0.60, "normals": 20.0}
    assert delta_m(values, references, {"depth", "normals"}) == pytest.approx(25 / 3)
