import json
import re
import warnings
from importlib.metadata import version
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from attnviz import bench, bench_all, bench_training
from attnviz.bench import CAM_CASES, FLOOR, FUSED, PEERS, WHOLE, bench_cam
from attnviz.cam import fuse
from attnviz.cli import main
from attnviz.explain import stage_maps
from attnviz.localize import map_to_box
from attnviz.metrics import best_ious
from attnviz.networks import bundled_folder
from attnviz.training.runs import computes_bfloat16, epoch_seed

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
    lower = computes_bfloat16("cpu")
    own = [
        case for case in CAM_CASES
        if case.baseline is not None and case.package is None and (lower or not case.lower)
    ]  # fmt: skip
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


def test_images_per_second_stand_beside_the_ratios(result):
    rate = rf"resnet18, batch 2, images/s: {re.escape(FLOOR)} ([\d.]+), {WHOLE} ([\d.]+)"
    floor, whole = map(float, re.fullmatch(rate, result.notes[-1]).groups())
    assert floor > 0
    assert whole > 0
    (row,) = (r for r in result.rows if r["case"] == f"resnet18, batch 2: {WHOLE}")
    assert row["ratio"] == pytest.approx(floor / whole, rel=0.05)  # one round


def test_peers_are_compared_with_the_case_of_ours_that_does_the_same():
    plan = [case for case in CAM_CASES if case.name in (FLOOR, FUSED) or case.beside == FUSED]
    seconds = {case.name: np.array([1.0, 2.0, 4.0]) for case in plan}
    seconds[plan[-1].name] = np.array([3.0, 2.0, 2.0])
    rows = bench._rows("x", plan, seconds, dict.fromkeys(seconds, 100))
    shown = [(row["case"], row["baseline"], row["ratio"]) for row in rows]
    assert (f"x: {plan[-1].name}", f"x: {FUSED}", 1.0) in shown
    assert (f"x: {plan[-1].name}", f"x: {FLOOR}", 1.0) in shown
    row = rows[-1]
    assert (row["low"], row["high"]) == (0.75, 2.0)  # of 0.5, 1 and 3
    assert row["peak_memory_ratio"] == 1.0


def _report(*rows):
    keys = ("case", "baseline", "ratio", "low", "high", "peak_memory_ratio")
    rows = [dict(zip(keys, row)) for row in rows]
    return bench.Benchmark("a processor, 1 thread", {"torch": "3"}, rows, 3, 0, ("<a note>",))


def test_rows_in_which_a_peer_is_faster_are_named():
    ours, floor = "x: LayerCAM of all stages, fused", f"x: {FLOOR}"
    rows = _report(
        ("x: torchcam: LayerCAM", ours, 0.9, 0.85, 0.95, 1.0),
        ("x: grad-cam: LayerCAM", ours, 0.98, 0.9, 1.1, 1.0),
        ("x: captum: LayerCAM", ours, 1.5, 1.4, 1.6, 1.0),
        ("x: captum: LayerCAM", floor, 0.8, 0.7, 0.9, 1.0),
        ("x: all methods", floor, 0.8, 0.7, 0.9, 1.0),
    ).rows
    assert bench_all._ahead(rows) == [
        "x: torchcam: LayerCAM took 0.90 of ours",
        "x: grad-cam: LayerCAM took 0.98 of ours, which is within the spread of the rounds",
    ]
    assert bench_all._ahead(rows[2:]) == [
        "no peer that is installed was faster than ours in any row"
    ]


def test_report_is_written_as_numbers_plot_and_page(tmp_path):
    report = _report(
        ("x: ours <b>", "x: floor", 1.1, 1.0, 1.25, None), ("y: captum: z", "y: w", 9, 8, 10, 2)
    )
    files = bench_all.write_benchmark(report, tmp_path / "new")
    assert [path.name for path in files] == ["bench.json", "bench.png", "bench.html"]
    assert json.loads(files[0].read_text()) == report.to_json()
    with Image.open(files[1]) as picture:
        pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # ours and other packages
        assert (pixels == color).all(axis=1).any()
    page = files[2].read_text()
    assert "ours &lt;b&gt;" in page
    assert "&lt;a note&gt;" in page
    assert "<a note>" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.fixture
def called(monkeypatch):
    """What the benchmarks are called with; they return one row each."""
    calls = {}
    for name in ("bench_cam", "bench_oaa", "bench_segment", "bench_tree"):

        def run(*arguments, name=name, **options):
            calls[name] = (arguments, options)
            return _report((f"x: {name}", "x: floor", 1, 1, 1, None))

        monkeypatch.setattr(bench_all, name, run)
    return calls


def test_one_report_holds_every_benchmark(called, tmp_path, capsys):
    command = ["bench", "all", "--quick", "--device", "cpu", "--seed", "4", "--out", str(tmp_path)]
    assert main(command) == 0
    assert list(called) == ["bench_cam", "bench_oaa", "bench_segment", "bench_tree"]
    for _, options in called.values():
        assert (options["device"], options["seed"]) == ("cpu", 4)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [f"x: {name}" for name in called]
    assert str(tmp_path / "bench.html") in capsys.readouterr().out


@pytest.mark.slow
def test_segmentation_by_hand_takes_the_same_step():
    both = [
        bench_training._subject("scenes", 48, 2, "cpu", 0, case)
        for case in (bench_training.SEGMENT, bench_training.BY_HAND)
    ]
    before, parts = _now(both[0]), both[0].views[0]
    bench_training.train_step(both[0].loop, both[0].lesson, parts, (0, 0))
    torch.manual_seed(epoch_seed(0, 0))  # of dropout
    both[1].step(parts[0].pixels, parts[0].labels)
    largest = 0.0
    for one, other in zip(*(each.model.parameters() for each in both)):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
        largest = max(largest, float(one.grad.abs().max()))
    assert largest > 1e-2
    assert all(parameter.equal(other) for parameter, other in zip(before, _now(both[1])))


def _now(subject):
    return [each.detach().clone() for each in subject.model.parameters()]
