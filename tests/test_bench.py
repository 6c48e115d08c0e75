import json
import warnings
from importlib.metadata import version
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from attnviz import bench
from attnviz.bench import CAM_CASES, FLOOR, PEERS, bench_cam
from attnviz.cam import fuse
from attnviz.explain import stage_maps
from attnviz.localize import map_to_box
from attnviz.metrics import best_ious
from attnviz.networks import bundled_folder

KEYS = {"case", "baseline", "ratio", "low", "high", "peak_memory_ratio"}
TINY = {"networks": ["resnet18"], "rounds": 1, "size": 64, "device": "cpu", "progress": False}


@pytest.fixture(autouse=True)
def _peers_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def result():
    found = bench._version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_version", lambda name: None if name in PEERS else found(name))
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        result = bench_cam(**TINY, batches=[1, 2], memory=False)
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), state)
    return result


def _case(name):
    return next(case for case in CAM_CASES if case.name == name)


def _run(name):
    subject = bench._subject("resnet18", 64, "cpu", 0)
    return _case(name).prepare(subject)(subject.images(2))


def test_each_case_is_compared_with_a_case_that_was_measured(result):
    own = [case for case in CAM_CASES if case.baseline is not None and case.package is None]
    at_two = [case for case in own if case.most is None]
    assert [row["case"] for row in result.rows] == [
        *(f"resnet18, batch 1: {case.name}" for case in own),
        *(f"resnet18, batch 2: {case.name}" for case in at_two),
    ]
    for row in result.rows:
        assert set(row) == KEYS
        assert row["peak_memory_ratio"] is None
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row["baseline"].partition(":")[0] == row["case"].partition(":")[0]


def test_result_is_plain_json_and_a_table(result):
    read = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert read == result.to_json()
    assert set(read) == {"device", "versions", "rows", "rounds", "seed", "notes"}
    assert read["device"].endswith("1 thread")
    assert read["versions"]["torch"] == version("torch")
    assert list(result.to_frame()["case"]) == [row["case"] for row in result.rows]
    assert result.rows[0]["case"] in str(result)
    assert result.rows[0]["case"] in result._repr_html_()


def test_missing_peers_are_named_once_and_left_out(result):
    assert result.notes[0].startswith("not installed, so not measured: captum, grad-cam, torchcam")
    assert all(result.versions[peer] is None for peer in PEERS)
    assert not any(peer in row["case"] for row in result.rows for peer in PEERS)


@pytest.mark.parametrize(
    "case", [case for case in CAM_CASES if case.package], ids=lambda c: c.name
)
def test_peers_run_on_the_same_stages(case):
    pytest.importorskip({"grad-cam": "pytorch_grad_cam"}.get(case.package, case.package))
    found = _run(case.name)
    if case.package == "captum":
        for ours, theirs in zip(_run("LayerCAM of all stages")["layercam"], found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    else:  # each normalizes and fuses in its own way
        found = torch.as_tensor(found)
        assert tuple(found.shape) == (2, 64, 64)
        assert found.std() > 0
        assert found.min() >= 0


def test_localization_counts_what_single_thresholds_give():
    ranks, counts = _run("localization: decode, maps, fusion, boxes, metrics")
    subject = bench._subject("resnet18", 64, "cpu", 0)
    with Image.open(bundled_folder() / "pictures" / "cat.jpg") as picture:
        file = BytesIO()
        picture.convert("RGB").resize((500, 375)).save(file, "jpeg", quality=90)
    pixels = Image.open(file).resize((64, 64), Image.Resampling.BILINEAR)
    mean, std = (torch.tensor(part)[:, None, None] for part in (subject.net.mean, subject.net.std))
    image = (torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255 - mean) / std
    maps = stage_maps(subject.net, torch.stack([image, image]), [0, 1])
    truth = (100 * 64 / 500, 80 * 64 / 375, 400 * 64 / 500, 300 * 64 / 375)
    expected = np.zeros((3, 50), int)
    for map in fuse(maps["layercam"], size=(64, 64)):
        for position in range(50):
            (iou,) = best_ious([map_to_box(map, position / 50)], [truth])
            expected[:, position] += [iou >= 0.3, iou >= 0.5, iou >= 0.7]
    assert counts.tolist() == expected.tolist()
    order = maps.scores.argsort(dim=1, descending=True).tolist()
    assert ranks.tolist() == [order[0].index(0), order[1].index(1)]


def test_floor_is_the_gradient_at_the_first_stage():
    subject = bench._subject("resnet18", 64, "cpu", 0)
    (gradient,) = _run(FLOOR)
    pieces = subject.net.differentiable(subject.images(2), [1])
    total = pieces.output[0, 0] + pieces.output[1, 1]
    (expected,) = torch.autograd.grad(total, pieces.activations)
    torch.testing.assert_close(gradient, expected)
    assert not any(module._forward_hooks for module in subject.model.modules())


@pytest.mark.slow
def test_peak_memory_is_measured_in_processes_of_their_own(monkeypatch):
    chosen = [_case(FLOOR), _case("LayerCAM of all stages")]
    monkeypatch.setattr(bench, "CAM_CASES", tuple(chosen))
    result = bench_cam(**TINY, batches=[8])
    (row,) = result.rows
    assert row["peak_memory_ratio"] is None or row["peak_memory_ratio"] > 0
    assert (row["peak_memory_ratio"] is None) == any("clear_refs" in note for note in result.notes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"networks": "vgg16"}, "expected `networks` as a list of names, got 'vgg16'"),
        ({"networks": []}, "expected `networks` as a list of names"),
        ({"rounds": 0}, "expected `rounds` of 1 or more, got"),
        ({"batches": [1, 0]}, "expected `batches` of 1 or more, got"),
        ({"device": "tpu"}, "expected `device` in .*, got 'tpu'"),
        ({"networks": ["resnet19"]}, "expected the name of a network, got 'resnet19'"),
    ],
)
def test_wrong_arguments_are_named(wrong, message, untyped):
    with pytest.raises(ValueError, match=message):
        bench_cam(**{**TINY, "memory": False, "batches": [1]} | wrong)
