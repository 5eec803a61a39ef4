"""Frames in, frames with answers out: what Spark's `mapInPandas` and Ray's `map_batches` call."""

from __future__ import annotations

import inspect
import json
import pickle

import numpy as np
import pandas
import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.predict import Predictor
from mtl_lora_cli.prediction.frames import FramePredictor, _plain, in_pandas
from mtl_lora_cli.runs.folder import RunFolder

from .conftest import rows_of


def test_partitions_are_answered_as_predict_answers(
    run_folder: RunFolder, predictor: Predictor
) -> None:
    rows = rows_of(14)
    whole = pandas.DataFrame(rows).set_index(pandas.Index(range(100, 114)))
    whole["count"] = np.where(whole["id"] % 2, np.nan, 1.5)  # of no task; no number in some rows
    answer = in_pandas(run_folder.path, task_column="of")
    found = answer(iter([whole[:9], whole[9:9], whole[9:]]))
    assert inspect.isgenerator(found)  # partitions need not fit into memory
    frames = list(found)
    assert [len(frame) for frame in frames] == [9, 0, 5]
    joined = pandas.concat(frames)
    pandas.testing.assert_frame_equal(joined.drop(columns="prediction"), whole)
    for text, right in zip(
        joined["prediction"], predictor.predict(rows, task_column="of"), strict=True
    ):
        own = json.loads(text)
        assert own["probabilities"] == pytest.approx(right["probabilities"], abs=1e-5)
        assert (own["task"], own["label"]) == (right["task"], right["label"])


def test_what_a_frame_cannot_be(run_folder: RunFolder) -> None:
    predictor = FramePredictor(run_folder.path, task="warm")
    frame = pandas.DataFrame([{"word": "red"}, {"word": None}])
    with pytest.raises(UsageError, match="row 2: task 'warm': prompt"):
        predictor(frame)
    with pytest.raises(UsageError, match="has a column 'prediction' already"):
        predictor(frame.assign(prediction=1))
    array = np.array(["red", "old boat"])  # what a worker has of a list
    with pytest.raises(UsageError, match=r"row 1: task 'warm': prompt: a list .* would be printed"):
        predictor(pandas.DataFrame([{"word": array}]))
    assert _plain({"of": np.array([{"n": np.int64(3)}], dtype=object)}) == {"of": [{"n": 3}]}
    with pytest.raises(UsageError, match="no run 'nowhere'"):
        FramePredictor("nowhere")


def test_whole_numbers_beside_missing_ones_are_asked_about(run_folder: RunFolder) -> None:
    """pandas, which Spark and Arrow hand over, holds a column of whole numbers with a gap as 1.0: `1.0 is a color?`"""
    whole = pandas.DataFrame([{"word": 1, "n": 1.0}, {"word": 2, "n": None}])
    gap = pandas.DataFrame([{"word": 1, "n": 1}, {"word": None, "n": 2}])
    assert gap["word"].dtype == np.float64
    plain = FramePredictor(run_folder.path, task="warm")
    (right,) = plain(whole[:1])["prediction"]
    plain(whole)  # no task reads n
    with pytest.raises(
        UsageError, match=r"column 'word': whole numbers .* holds as 1\.0; say integers=\['word'\]"
    ):
        plain(gap)
    known = FramePredictor(run_folder.path, task="warm", integers=["word"])
    with pytest.raises(UsageError, match="row 2: task 'warm': prompt"):
        known(gap)
    assert known(gap[:1])["prediction"][0] == right
    said = FramePredictor(run_folder.path, task="warm", floats=["word"])(gap[:1])["prediction"][0]
    assert json.loads(said)["probabilities"] != json.loads(right)["probabilities"]


def test_it_travels_to_a_worker(run_folder: RunFolder) -> None:
    """Before it is called it holds no model."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    sent = cloudpickle.dumps(in_pandas(str(run_folder.path), task="warm"))
    assert len(sent) < 5000
    (found,) = pickle.loads(sent)([pandas.DataFrame([{"word": "red"}])])
    assert json.loads(found["prediction"][0])["task"] == "warm"
