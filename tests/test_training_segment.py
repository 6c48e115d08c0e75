"""Training on masks: what a view shows, what a step teaches, what labels may be learned from."""

import csv
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from attnviz.cli import main
from attnviz.data.masks import voc_colors
from attnviz.deeplab import load_segmentation, segmentation_network
from attnviz.evolution import request_stop
from attnviz.networks import bundled_folder
from attnviz.segment import LabelConfig, evaluate, write_labels
from attnviz.training import segment as training
from attnviz.training import segment_config, train_segment
from attnviz.training.pictures import Draws, open_pictures

SMALL = segment_config(
    images=10, validation_images=4, measured=2, size=48, crop=48, epochs=2, batch_size=4,
    device="cpu", precision="32",
)  # fmt: skip
FILL = (1, 2, 3)


def _train(config, out, **options):
    return train_segment(config, out, progress=False, **options)


def _bytes(run):
    # What the weights are, without the name of the labels' folder.
    network = load_segmentation(run)
    return b"".join(value.numpy().tobytes() for value in network.state_dict().values())


def _metrics(run):
    return json.loads((run / "metrics.json").read_text())


def _history(run):
    with (run / "history.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def pictures():
    return open_pictures("scenes", "train", size=48, count=10)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return _train(SMALL, tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def labels(tmp_path, pictures):
    """The true masks of the training pictures, as palette pictures."""
    folder = tmp_path / "labeled" / "labels"
    folder.mkdir(parents=True)
    for i in range(len(pictures)):
        picture = Image.fromarray(pictures.item(i).read_mask())
        picture.putpalette(voc_colors().tobytes())
        picture.save(folder / f"{pictures.image_ids[i]}.png")
    return folder


# -------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("scales", [(0.7,), (1.0,), (1.3,)])
def test_view_shows_the_picture_at_a_size_and_place(pictures, scales):
    config = replace(SMALL, scales=scales, crop=40)
    draws = Draws.of(1, 0, len(pictures), shuffle=False, flips=True, crops=False)
    made = training.views(config, FILL, pictures, range(10), draws, False, 1)[0]
    assert made.flips == draws.flips.tolist()
    assert 0 < sum(made.flips) < 10
    length, places = round(48 * scales[0]), set()
    for i in range(10):
        pixels = pictures.pixels(i).permute(1, 2, 0).numpy().astype(float)
        mask = pictures.item(i).read_mask()
        top, left = (
            int(share * (max(length - 40, 0) + 1)) for share in draws.shares[i, 1:].tolist()
        )
        places.add((top, left))
        compared = 0
        for row in range(0, 40, 3):
            for column in range(0, 40, 3):
                shown = 39 - column if made.flips[i] else column
                y, x = (
                    (row + top + 0.5) / scales[0] - 0.5,
                    (shown + left + 0.5) / scales[0] - 0.5,
                )
                near = (round(y), round(x))
                if abs(y % 1 - 0.5) < 0.05 or abs(x % 1 - 0.5) < 0.05:
                    continue  # between two pixels
                inside = 0 <= near[0] < 48 and 0 <= near[1] < 48
                assert made.labels[i, row, column] == (mask[near] if inside else 255)
                if not (0 <= y <= 47 and 0 <= x <= 47):
                    continue
                low, part = (int(y), int(x)), (y % 1, x % 1)
                value = sum(
                    pixels[min(low[0] + dy, 47), min(low[1] + dx, 47)]
                    * (part[0] if dy else 1 - part[0]) * (part[1] if dx else 1 - part[1])
                    for dy in (0, 1) for dx in (0, 1)
                )  # fmt: skip
                found = made.pixels[i, :, row, column].numpy()
                assert np.abs(found - value).max() < 255 / 32 + 1  # cv2 counts in 32nds
                compared += 1
        assert compared > 20
    assert places == {(0, 0)} if length <= 40 else len(places) > 5


def test_what_is_beside_the_picture_has_the_mean_color_and_does_not_count(pictures):
    config = replace(SMALL, scales=(0.5,))
    draws = Draws.of(1, 0, len(pictures), shuffle=False, flips=False, crops=False)
    made = training.views(config, FILL, pictures, [3], draws, False, 1)[0]
    assert (made.labels[0, 24:] == 255).all()
    assert (made.labels[0, :, 24:] == 255).all()
    assert (made.labels[0, :24, :24] != 255).all()
    color = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
    assert (made.pixels[0, :, 25:] == color).all()


def test_a_step_in_parts_has_the_same_views(pictures):
    draws = Draws.of(1, 0, len(pictures), shuffle=False, flips=True, crops=False)
    cut = partial(training.views, SMALL, FILL, pictures, [5, 2, 7, 1, 0], draws, False)
    whole, parts = cut(1), cut(2)
    assert [part.indices for part in parts] == [[5, 2, 7], [1, 0]]
    assert [part.share for part in parts] == [3 / 5, 2 / 5]
    assert torch.equal(torch.cat([part.pixels for part in parts]), whole[0].pixels)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole[0].labels)


def test_scales_are_drawn_evenly():
    draws = Draws.of(0, 0, 7000, shuffle=False, flips=False, crops=False)
    counts = (draws.shares[:, 0] * 7).int().bincount(minlength=7)
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


# --------------------------------------------------------------------------------------- loss


def test_loss_is_the_mean_over_the_pixels_that_count(generator):
    scores = torch.randn(3, 4, 5, 6, generator=generator)
    labels = torch.randint(0, 4, (3, 5, 6), dtype=torch.uint8, generator=generator)
    labels[0, :, :3], labels[2] = 255, 255
    total, counted = 0.0, 0
    for b in range(3):
        for y in range(5):
            for x in range(6):
                if labels[b, y, x] != 255:
                    at = scores[b, :, y, x].tolist()
                    total += math.log(sum(map(math.exp, at))) - at[int(labels[b, y, x])]
                    counted += 1
    losses = training.segmentation_losses(scores, labels)
    assert losses.mean().item() == pytest.approx(total / counted, rel=1e-5)
    assert losses[2] == 0
    assert not training.segmentation_losses(scores, torch.full_like(labels, 255)).any()


def test_labels_follow_scores_to_a_lower_resolution():
    labels = torch.zeros(1, 9, 9, dtype=torch.uint8)
    labels[0, :, 5:] = 1
    sure = torch.zeros(1, 2, 3, 3)
    sure[0, 1, :, 2], sure[0, 0, :, :2] = 20, 20  # columns 1, 4 and 7 are the middle ones
    assert training.segmentation_losses(sure, labels).item() < 1e-6
    assert training.segmentation_losses(sure.flip(3), labels).item() > 10


def test_pyramid_sums_the_losses_of_three_sizes_and_of_their_maximum(generator):
    torch.manual_seed(0)
    network = segmentation_network("squeezenet1_1", 2, "random").eval()
    images = torch.randn(1, 3, 65, 81, generator=generator)
    with torch.no_grad():
        found = training._Task(network, "pyramid")(images)
        sizes = [(65, 81), (49, 65), (33, 41)]  # the next of the kind 1 + 8 k
        own = [
            network(interpolate(images, size, mode="bilinear", align_corners=True))
            for size in sizes
        ]
    large = [interpolate(s, own[0].shape[2:], mode="bilinear", align_corners=True) for s in own]
    for a, b in zip(found, [*own, torch.maximum(torch.maximum(*large[:2]), large[2])]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert [tuple(scores.shape[2:]) for scores in found] == [(9, 11), (7, 9), (5, 6), (9, 11)]


def test_pyramid_and_held_rates_train(tmp_path, monkeypatch):
    config = replace(
        SMALL, loss="pyramid", held=3, schedule="poly", optimizer="sgd", epochs=2, images=12,
    )  # fmt: skip
    rates, step = [], torch.optim.SGD.step

    def spy(self, *arguments, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    run = _train(config, tmp_path / "run")
    # two epochs of three steps
    assert rates == pytest.approx([3e-3] * 3 + [3e-3 * 0.5**0.9] * 3)
    assert all(float(row["loss"]) > 0 for row in _history(run))


# ---------------------------------------------------------------------------------------- run


def test_run_scores_unseen_pictures_with_and_without_crf(run):
    metrics = _metrics(run)
    network = load_segmentation(run)
    unseen = open_pictures("scenes", "validation", size=48, count=4)
    items = [unseen.item(i) for i in range(4)]
    scores = evaluate(network, items, "single", window=48, progress=False)
    for kind in ("plain", "crf"):
        assert metrics["validation"][kind]["mean_iou"] == pytest.approx(scores.mean_iou(kind))
    assert metrics["init"] == metrics["validation"]["init"] == "scenes_conv.safetensors"
    assert network.class_names[:2] == ("deer", "ox")
    assert len(_history(run)) == 2
    card = (run / "network.md").read_text()
    assert "| crf |" in card
    assert "train_segment(segment_config('small', " in card
    assert "images=10, " in card


@pytest.mark.parametrize("way", ["asked", "killed"])
def test_interrupted_run_ends_with_the_same_bits(run, tmp_path, monkeypatch, way):
    config, out = replace(SMALL, checkpoint_steps=1), tmp_path / "run"
    whole = _bytes(_train(config, tmp_path / "whole"))
    losses, calls = training.segmentation_losses, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            if way == "killed":
                raise KeyboardInterrupt
            request_stop(out)
        return losses(*arguments)

    monkeypatch.setattr(training, "segmentation_losses", stopping)
    try:
        _train(config, out)
    except KeyboardInterrupt:
        assert way == "killed"
    assert not (out / "metrics.json").exists()
    monkeypatch.undo()
    _train(config, out, resume=True)
    assert _bytes(out) == whole == _bytes(run)
    before = (out / "metrics.json").stat().st_mtime_ns
    _train(config, out, resume=True)
    assert (out / "metrics.json").stat().st_mtime_ns == before


def test_network_learns_what_it_is_shown(tmp_path):
    config = replace(SMALL, images=32, epochs=6, scales=(1.0,))
    losses = [float(row["loss"]) for row in _history(_train(config, tmp_path / "run"))]
    assert losses[-1] < losses[0] / 2


# ------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_label_pictures_of_true_masks_teach_what_true_masks_teach(run, labels, tmp_path, mode):
    for path in labels.iterdir():
        with Image.open(path) as picture:
            picture = Image.fromarray(np.asarray(picture)) if mode == "L" else picture
            picture.convert(mode).save(path)
    folder = labels if mode == "L" else labels.parent  # a run's folder holds them in `labels`
    config = replace(SMALL, labels=str(folder))
    assert _bytes(_train(config, tmp_path / "run")) == _bytes(run)


def test_labels_of_a_pseudo_label_run_are_learned_from(run, tmp_path, pictures):
    def masks(item):
        return torch.stack([torch.from_numpy(item.read_mask() == 1 + c) for c in item.class_ids])

    items = [pictures.item(i) for i in range(10)]
    config = LabelConfig(rule="constant", least=0.0)
    write_labels(items, masks, tmp_path / "labels", config, progress=False)
    out = _train(replace(SMALL, labels=str(tmp_path / "labels")), tmp_path / "run")
    assert _bytes(out) == _bytes(run)  # from maps that are the masks, the labels are the masks


def test_some_true_masks_among_weak_labels(labels, tmp_path, pictures):
    for path in labels.iterdir():
        Image.fromarray(np.zeros((48, 48), np.uint8)).save(path)
    config = replace(SMALL, labels=str(labels), true_count=4)
    mixed, left_out = training._labeled(pictures, labels, config, False)
    assert not any(left_out.values())
    true = [i for i in range(10) if mixed.item(i).read_mask().any()]
    assert len(true) == 4
    for i in true:
        assert (mixed.item(i).read_mask() == pictures.item(i).read_mask()).all()
    other, _ = training._labeled(pictures, labels, replace(config, seed=1), False)
    assert true != [i for i in range(10) if other.item(i).read_mask().any()]
    more, _ = training._labeled(pictures, labels, replace(config, true_count=7), False)
    assert set(true) < {i for i in range(10) if more.item(i).read_mask().any()}


def test_labels_that_cannot_be_used_are_left_out_and_listed(labels, tmp_path):
    names = sorted(labels.iterdir())
    Image.fromarray(np.zeros((48, 47), np.uint8)).save(names[0])
    Image.fromarray(np.full((48, 48), 13, np.uint8)).save(names[1])
    names[2].write_bytes(names[2].read_bytes()[:-60])
    names[3].unlink()
    Image.fromarray(np.full((48, 48, 3), 77, np.uint8)).save(names[4])  # grey 77 in RGB
    run = _train(replace(SMALL, labels=str(labels)), tmp_path / "run")
    left = _metrics(run)["left_out"]
    assert left["images without labels"] == {"images": 1, "first": [names[3].stem]}
    unusable = left["images whose labels cannot be used"]
    assert unusable["images"] == 4
    assert "labels of 48 x 48, the picture's size, got 48 x 47" in unusable["first"][0]
    assert "expected labels 0 to 12 or 255, got 13" in unusable["first"][1]
    assert "which is damaged" in unusable["first"][2]
    assert "got 77" in unusable["first"][3]
    assert _metrics(run)["training_images"] == 5


def test_labels_of_another_data_set_stop_before_the_first_step(labels, tmp_path):
    for path in labels.iterdir():
        Image.fromarray(np.full((48, 48), 20, np.uint8)).save(path)
    config = replace(SMALL, labels=str(labels))
    message = r"at least two of the 10 pictures in .*, got 0; 0 have none, 10 have .* got 20; are"
    with pytest.raises(ValueError, match=message):
        _train(config, tmp_path / "run")
    empty = tmp_path / "empty"
    with pytest.raises(FileNotFoundError, match="expected label pictures .* which is not there"):
        _train(replace(config, labels=str(empty)), tmp_path / "other")
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="which has none; name a folder that a pseudo"):
        _train(replace(config, labels=str(empty)), tmp_path / "third")


# ------------------------------------------------------------------------------------- config


def test_thesis_preset_is_each_networks_own_recipe():
    v1 = segment_config("thesis", network="largefov_vgg16", data="voc2012")
    assert (v1.learning_rate, v1.batch_size, v1.crop, v1.schedule) == (1e-3, 10, 321, "poly")
    assert v1.scales == (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
    assert 15_000 <= v1.epochs * (10_582 // v1.batch_size) <= 16_000
    v2 = segment_config("thesis", network="aspp_resnet101", data="voc2012")
    assert (v2.learning_rate, v2.held, v2.loss, v2.accumulate) == (2.5e-4, 10, "pyramid", 2)
    assert 19_000 <= v2.epochs * (10_582 // v2.batch_size) <= 21_000
    assert (v2.multipliers[2:], v2.decay_biases) == ((10.0, 20.0), False)
    resnet = segment_config("thesis", network="largefov_resnet101", data="voc2012")
    assert resnet.multipliers == (1.0, 1.0, 10.0, 10.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "unet"}, "expected `network` in"),
        ({"scales": ()}, "expected `scales` as factors from 0.1 to 10"),
        ({"crop": 0}, "expected `crop` of at least 17, got 0"),
        ({"loss": "dice"}, r"expected `loss` in \('full', 'pyramid'\), got 'dice'"),
        ({"jitter": True}, "expected `crops` and `jitter` False"),
        ({"true_count": 3}, "expected a folder as `labels` beside `true_count`"),
        ({"preset": "released"}, "expected `preset` in"),
    ],
)
def test_config_that_means_nothing_says_so(changes, message):
    with pytest.raises(ValueError, match=message):
        segment_config(**changes)


# --------------------------------------------------------------------------------------- shell


def test_command_trains_and_says_both_scores(labels, tmp_path, capsys):
    out, report = tmp_path / "run", tmp_path / "report.json"
    command = ["train", "segment", "--labels", str(labels), "--true-count", "2", "--images", "10"]
    command += ["--validation-images", "2", "--size", "48", "--crop", "48", "--epochs", "1"]
    command += ["--batch-size", "4", "--device", "cpu", "--out", str(out), "--json", str(report)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "mean IoU without CRF 0." in said
    assert "mean IoU with CRF 0." in said
    assert "on 2 images, started from scenes_conv.safetensors" in said
    assert json.loads(report.read_text())["validation"]["images"] == 2
    assert main(command) == 2
    assert "pass `resume` (--resume)" in capsys.readouterr().err
    bad = ["train", "segment", "--labels", str(bundled_folder()), "--out", str(tmp_path / "bad")]
    assert main(bad) == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1]) < 400
