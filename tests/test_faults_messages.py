"""What a user reads who asks for something that cannot be: one line, at once, with a remedy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from attnviz.cli import main
from attnviz.data.masks import MaskedImage
from attnviz.deeplab import SEGMENTATION_NETWORKS, segmentation_network
from attnviz.labels import superpixel_labels, superpixel_mean
from attnviz.segment import LabelConfig, evaluate, segment, write_submission
from attnviz.training import oaa_config


@pytest.fixture(autouse=True)
def _untyped(untyped):
    pass


@pytest.fixture(scope="module")
def network():
    return segmentation_network("scenes", 3, "random")


@pytest.fixture
def items(tmp_path):
    for name in "ab":
        Image.new("RGB", (40, 30)).save(tmp_path / f"{name}.png")
    mask = np.ones((30, 40), np.uint8)
    return [MaskedImage(name, tmp_path / f"{name}.png", (0,), 3, lambda: mask) for name in "ab"]


@pytest.mark.parametrize(
    ("odd", "error", "message"),
    [
        ({"workers": -1}, ValueError, "expected `workers` of at least 0, got -1"),
        ({"workers": 1.5}, TypeError, "expected `workers` as a whole number, got 1.5"),
        ({"window": -5}, ValueError, "expected `window` of at least 1, got -5"),
        ({"window": 0}, ValueError, "expected `window` of at least 1, got 0"),
        ({"window": "wide"}, TypeError, "expected `window` as a whole number, got 'wide'"),
        ({"batch_size": 0}, ValueError, "expected `batch_size` of at least 1, got 0"),
    ],
)
def test_an_evaluation_says_what_it_cannot_do(network, items, tmp_path, odd, error, message):
    with pytest.raises(error, match=message):
        evaluate(network, items, crf=None, progress=False, **odd)
    with pytest.raises(error, match=message):
        write_submission(network, items, tmp_path / "out", crf=None, progress=False, **odd)
    if "workers" not in odd:
        with pytest.raises(error, match=message):
            next(segment(network, [np.zeros((30, 40, 3), np.uint8)], **odd))


def test_pictures_may_come_from_a_generator(network, items, tmp_path):
    whole = evaluate(network, items, "single", None, progress=False)
    found = evaluate(network, (item for item in items), "single", None, progress=False)
    assert found.image_ids == whole.image_ids == ("a", "b")
    assert np.array_equal(found.confusions["plain"], whole.confusions["plain"])
    out = write_submission(network, iter(items), tmp_path / "out", "single", None, progress=False)
    assert len(list(out.rglob("*.png"))) == 2
    with pytest.raises(ValueError, match="expected pictures with masks, got none of 0"):
        evaluate(network, iter(()), "single", None, progress=False)
    bare = (replace(item, source=None) for item in items)
    with pytest.raises(ValueError, match="expected pictures with masks, got none of 2: a: it has"):
        evaluate(network, bare, "single", None, progress=False)


@pytest.mark.parametrize(
    ("odd", "error", "message"),
    [
        ({"count": float("nan")}, TypeError, "expected `count` as a whole number, got nan"),
        ({"count": 1.5}, TypeError, "expected `count` as a whole number, got 1.5"),
        ({"count": True}, TypeError, "expected `count` as a whole number, got True"),
        ({"threshold": "a"}, TypeError, "expected `threshold` as a number, got 'a'"),
        ({"least": None}, TypeError, "expected `least` as a number, got None"),
        ({"strong": float("nan")}, ValueError, "expected `strong` from 0 to 1, got nan"),
        ({"strength": "a"}, TypeError, "expected `strength` as a number, got 'a'"),
        ({"strength": float("nan")}, ValueError, "expected `strength` of at least 0, got nan"),
    ],
)
def test_labels_are_not_made_with_odd_numbers(odd, error, message):
    with pytest.raises(error, match=message):
        LabelConfig(**odd)


def test_regions_take_maps_of_half_precision():
    maps = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0))
    regions = np.arange(24).reshape(4, 6) // 5
    for dtype in (torch.bfloat16, torch.float16):
        half = maps.to(dtype)
        means = superpixel_mean(half, regions)
        assert means.dtype == dtype
        assert torch.equal(means, superpixel_mean(half.double(), regions).to(dtype))
        split = torch.zeros(2, 4, 6, dtype=dtype)
        split[0, :2, :5], split[1, 2:] = 1, 1  # the last column of the upper half has none
        wanted = [[1] * 5 + [0]] * 2 + [[2] * 6] * 2
        assert superpixel_labels(split, np.arange(24).reshape(4, 6), 0.4).tolist() == wanted


def test_a_training_that_would_never_accumulate_says_so():
    message = "expected `epochs` above `start`, 1, from where on .*, got 1; train longer"
    with pytest.raises(ValueError, match=message):
        oaa_config(epochs=1)


# ------------------------------------------------------------------------------------- commands


def _said(capsys, *command):
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_one_table_at_a_time(capsys):
    said = _said(capsys, "table", "3.9", "3.11")
    assert "expected the ID of one table, or all, got 3.9 3.11" in said
    assert "got none; see --list" in _said(capsys, "table")


def test_a_table_of_too_short_a_training_says_so(capsys, tmp_path):
    said = _said(capsys, "table", "4.5", "--epochs", "1", "--cache", str(tmp_path))
    assert "expected `epochs` above `start`" in said


def _help(capsys, *command):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_says_what_there_is_to_choose(capsys):
    text = _help(capsys, "train", "segment")
    assert all(name in text for name in SEGMENTATION_NETWORKS)
    assert "small for scenes, else thesis" in text
    assert "thesis for resnet50, else small" in _help(capsys, "train", "defect")


@pytest.mark.parametrize("kind", ["oaa", "segment"])
def test_weights_that_cannot_be_read_are_said_before_pictures_are_drawn(capsys, tmp_path, kind):
    contents = {"empty.pth": b"", "zeros.pth": bytes(100), "text.pth": b"hello\nworld\n"}
    for number, (name, content) in enumerate(contents.items()):
        (tmp_path / name).write_bytes(content)
        command = ["train", kind, "--weights", str(tmp_path / name), "--network"]
        command += ["scenes" if kind == "segment" else "squeezenet1_1"]
        said = _said(capsys, *command, "--out", str(tmp_path / f"run{number}"))
        assert "expected a file of weights, got" in said
        assert "weights_only" not in said  # torch advises to run what is in the file
    said = _said(capsys, *command[:3], str(tmp_path / "none.pth"), "--out", str(tmp_path / "run"))
    assert "which is not there" in said
