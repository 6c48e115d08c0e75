import csv
import hashlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import attnviz.training.defect as training
import attnviz.training.loop as loop
from attnviz.cli import main
from attnviz.data.defects import Defects, draw_defect
from attnviz.data.surface import load_magnetic_tile
from attnviz.networks import FiveStage, bundled_folder, load_network
from attnviz.training import DefectConfig, defect_config, runs, train_defect
from attnviz.training.defect import CLASS_NAMES, Surface, open_surfaces

SMALL = defect_config(
    images=16, validation_images=8, size=64, epochs=2, batch_size=4, device="cpu"
)


def _train(config, out, **options):
    return train_defect(config, out, progress=False, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    # One undisturbed run that the others are compared with.
    return _train(SMALL, tmp_path_factory.mktemp("runs") / "whole")


def _weights(run):
    return load_file(run / "network.safetensors")


def _same(run, other):
    first, second = _weights(run), _weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------ equal bits


def test_equal_configs_give_equal_files_and_other_seeds_do_not(run, tmp_path):
    torch.rand(3)  # the caller's random state has no influence
    again = _train(SMALL, tmp_path / "again")
    for name in ("network.safetensors", "config.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes()
    assert not _same(run, _train(replace(SMALL, seed=1), tmp_path / "other"))


@pytest.mark.parametrize("calls", [1, 4, 7])
def test_interrupted_run_ends_as_if_undisturbed(run, tmp_path, monkeypatch, calls):
    config, done, step = replace(SMALL, checkpoint_steps=2), [], loop.train_step

    def interrupted(*args):
        done.append(1)
        if len(done) > calls:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(config, tmp_path / "run")
    monkeypatch.undo()
    resumed = _train(config, tmp_path / "run", resume=True)
    assert _same(resumed, run)
    found, expected = (json.loads((r / "metrics.json").read_text()) for r in (resumed, run))
    assert found | {"seconds": 0} == expected | {"seconds": 0}


def test_finished_run_is_left_as_it_is(run):
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert _train(SMALL, run, resume=True) == run
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before


# ---------------------------------------------------------------------------- what is learned from


def test_no_mask_is_looked_at(run, tmp_path, monkeypatch):
    def refused(self):
        raise AssertionError("a mask was read")

    monkeypatch.setattr(Surface, "read_mask", refused)
    assert _same(_train(SMALL, tmp_path / "blind"), run)


def test_loss_is_that_of_the_right_class_among_two(untyped):
    scores = torch.tensor([[2.0, -1.0], [0.5, 0.0], [0.0, 3.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    pictures = SimpleNamespace(targets=lambda indices: targets[indices])
    lesson = training._Deciding(
        SimpleNamespace(task=lambda images: scores, pictures=pictures), None, {}
    )
    losses = lesson.learn(SimpleNamespace(indices=[0, 1, 2]), torch.zeros(3, 3, 2, 2), (0, 0))
    for loss, (own, other) in zip(losses.tolist(), [(2, -1), (0, 0.5), (3, 0)], strict=True):
        assert loss == pytest.approx(math.log(1 + math.exp(other - own)), rel=1e-6)


def test_thesis_rate_falls_to_a_tenth_after_epochs_five_and_ten():
    config = defect_config(network="resnet50", data="dagm2007")
    assert (config.preset, config.optimizer, config.batch_size) == ("thesis", "sgd", 32)
    schedule = loop.SCHEDULES[config.schedule]
    rates = [config.learning_rate * schedule(epoch / config.epochs) for epoch in range(15)]
    assert rates == pytest.approx([1e-3] * 5 + [1e-4] * 5 + [1e-5] * 5)


def test_metrics_are_those_of_the_network_that_is_written(run):
    net = load_network("defects", run / "network.safetensors")
    assert net.class_names == CLASS_NAMES
    metrics = json.loads((run / "metrics.json").read_text())
    right, margins, truth = [], [], []
    for item in Defects("val", 8, size=64):
        scores = net(net.preprocess(item.image))[0]
        truth.append(bool(item.class_ids))
        right.append((scores[0] > scores[1]).item() == truth[-1])
        margins.append((scores[0] - scores[1]).item())
    assert metrics["accuracy"] == pytest.approx(np.mean(right))
    assert metrics["accuracy_without_looking"] == max(np.mean(truth), 1 - np.mean(truth))
    order = np.argsort(margins)[::-1]
    hits = np.array(truth)[order]
    precisions = hits.cumsum() / np.arange(1, 9)
    assert metrics["average_precision"] == pytest.approx(precisions[hits].mean())
    rows = list(csv.DictReader((run / "history.csv").read_text().splitlines()))
    assert float(rows[-1]["accuracy"]) == metrics["accuracy"]


def test_pretrained_layers_learn_slower_than_the_new_one(tmp_path):
    config = replace(SMALL, network="squeezenet1_1", weights="random", limit=8, epochs=1)
    torch.manual_seed(5)  # what the random weights follow from
    state = torch.random.get_rng_state()
    run = _train(config, tmp_path / "run")
    assert torch.equal(torch.random.get_rng_state(), state)
    net = load_network("squeezenet1_1", run / "network.safetensors")
    assert (net.class_names, net.image_size) == (CLASS_NAMES, (64, 64))
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    factors = [
        (group["factor"], len(group["params"])) for group in saved["optimizer"]["param_groups"]
    ]
    assert factors == [(0.1, 25), (0.1, 25), (1.0, 1), (1.0, 1)]


def test_head_of_the_small_network_sees_a_coarser_map_than_the_stage_before():
    model = FiveStage(2, "gap", 64).eval()
    images = torch.rand(2, 3, 64, 64)
    activation = model.last_stage(images)
    assert activation.shape[2:] == (4, 4)
    weight, bias = model.classifier.weight[:, :, 0, 0], model.classifier.bias
    expected = activation.mean((2, 3)) @ weight.T + bias
    torch.testing.assert_close(model(images), expected)


# ---------------------------------------------------------------------------------------- surfaces


def test_generated_surfaces_are_those_of_the_data_set():
    found, notes = open_surfaces("defects", "test", count=6, size=64, seed=3)
    assert "generated" in notes[0]
    for index, each in enumerate(found):
        item = draw_defect(index, split="test", seed=3, size=64)
        assert each.image_id == item.image_id
        assert np.array_equal(np.array(each.read()), item.image)
        assert np.array_equal(each.read_mask(), item.mask)
        assert each.class_ids == ((0,) if item.mask.any() else (1,))


def test_real_tiles_have_one_kind_of_defect_and_unseen_ones_are_of_other_tiles(real_data):
    train, _ = open_surfaces("magnetic_tile", "train", root=real_data)
    test, _ = open_surfaces("magnetic_tile", "test", root=real_data)
    assert not {each.image_id for each in train} & {each.image_id for each in test}
    kinds = load_magnetic_tile(real_data / "magnetic_tile", "test")
    for each, item in list(zip(test, kinds, strict=True))[::9]:
        mask, labels = each.read_mask(), item.read_mask()
        assert set(np.unique(mask)) <= {0, 1}
        assert np.array_equal(mask > 0, labels > 0)
        assert each.defective == bool(item.class_ids)


# ----------------------------------------------------------------------------- the bundled network


def test_bundled_network_is_the_one_its_card_describes():
    file = bundled_folder() / "networks" / "defects.safetensors"
    card = file.with_suffix(".md").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    assert file.stat().st_size <= 1_000_000
    assert load_network("defects").provenance["command"] in card


def test_bundled_network_knows_surfaces_that_nobody_chose():
    net = load_network("defects")
    right = []
    for item in Defects("test", 60, seed=11):
        found = net(net.preprocess(item.image)).argmax().item() == 0
        right.append(found == bool(item.class_ids))
    assert np.mean(right) > 0.75


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "scenes"}, r"expected `data` in \('defects', .*\), got 'scenes'"),
        ({"network": "vgg16"}, "expected `network` in .*, got 'vgg16'"),
        ({"weights": "a.pth"}, "expected `weights` 'auto' or 'random' for the network 'defects'"),
        ({"size": 32}, "expected `size` of at least 64, got 32"),
        ({"limit": 1}, "expected `limit` of at least 2, got 1"),
    ],
)
def test_wrong_settings_are_named(untyped, changes, message):
    with pytest.raises(ValueError, match=message):
        DefectConfig(**changes)


def test_unknown_preset_is_named(untyped):
    with pytest.raises(ValueError, match=r"expected `preset` in .*, got 'released'"):
        defect_config("released")


def test_one_class_alone_cannot_be_learned(tmp_path):
    first = [bool(draw_defect(i, size=64).class_ids) for i in range(20)]
    seed = next(s for s in range(50) if len({_labels(s)[0], _labels(s)[1]}) == 1)
    assert len(set(first)) == 2
    with pytest.raises(ValueError, match="expected pictures with and without a defect in defects"):
        _train(replace(SMALL, images=2, seed=seed), tmp_path / "run")


def _labels(seed):
    return [bool(draw_defect(i, seed=seed, size=64).class_ids) for i in range(2)]


def test_missing_data_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Class1"):
        _train(replace(SMALL, data="dagm2007"), tmp_path / "run", data=tmp_path)


def test_steps_are_monotone():
    rates = [runs.steps(i / 100) for i in range(100)]
    assert rates == sorted(rates, reverse=True)
    assert {round(rate, 6) for rate in rates} == {1.0, 0.1, 0.01}


def test_command_trains_and_says_what_it_reached(tmp_path, capsys):
    out, result = tmp_path / "run", tmp_path / "result.json"
    options = ["--limit", "8", "--epochs", "1", "--size", "64", "--batch-size", "4"]
    code = main(
        ["train", "defect", *options, "--device", "cpu", "--out", str(out), "--json", str(result)]
    )
    assert code == 0
    found = json.loads(result.read_text())
    assert found["training_images"] == 8
    assert f"accuracy {found['accuracy']:.3f}" in capsys.readouterr().out
    assert main(["train", "defect", *options, "--device", "cpu", "--out", str(out)]) == 2
    assert "holds one" in capsys.readouterr().err
