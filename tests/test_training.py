import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import attnviz.training.classifier as training
from attnviz.data.scenes import Scenes
from attnviz.metrics import mean_average_precision
from attnviz.networks import bundled_folder, load_network
from attnviz.training import TrainConfig, one_cycle, runs, train_classifier

ROOT = Path(__file__).parent.parent
SMALL = TrainConfig(
    network="scenes_conv", images=16, validation_images=8, size=32, epochs=3, batch_size=4,
    device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    # One undisturbed run that the others are compared with.
    return train_classifier(SMALL, tmp_path_factory.mktemp("runs") / "whole", progress=False)


def _weights(run):
    return (run / "network.safetensors").read_bytes()


# ------------------------------------------------------------------------------------ equal bits


def test_equal_configs_give_equal_files(run, tmp_path):
    torch.rand(3)  # the caller's random state has no influence
    again = train_classifier(SMALL, tmp_path / "again", progress=False)
    assert _weights(again) == _weights(run)


def test_another_seed_gives_other_weights(run, tmp_path):
    other = train_classifier(replace(SMALL, seed=1), tmp_path / "other", progress=False)
    assert _weights(other) != _weights(run)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_run_interrupted_in_any_epoch_ends_as_if_undisturbed(run, tmp_path, monkeypatch, epoch):
    train_epoch = training._train_epoch

    def interrupted(state, *args):
        row = train_epoch(state, *args)
        if state["epoch"] == epoch:
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(training, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(SMALL, tmp_path / "run", progress=False)
    monkeypatch.undo()
    resumed = train_classifier(SMALL, tmp_path / "run", resume=True, progress=False)
    assert _weights(resumed) == _weights(run)
    assert len((resumed / "history.csv").read_text().splitlines()) == 1 + SMALL.epochs


def test_run_with_dropout_resumes_to_equal_bits(tmp_path, monkeypatch):
    config = replace(SMALL, network="scenes_fc", epochs=2)
    whole = train_classifier(config, tmp_path / "whole", progress=False)
    save = training._save_epoch

    def interrupted(out, state, *args):
        save(out, state, *args)
        if state["epoch"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(config, tmp_path / "run", progress=False)
    monkeypatch.undo()
    resumed = train_classifier(config, tmp_path / "run", resume=True, progress=False)
    assert _weights(resumed) == _weights(whole)


def test_killed_process_leaves_a_run_that_resumes_to_equal_bits(tmp_path):
    config, out = replace(SMALL, epochs=20), tmp_path / "killed"
    code = (
        "import sys; from attnviz.training import *; "
        f"train_classifier({config!r}, sys.argv[1], progress=False)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (out / "history.csv").is_file():
            assert process.poll() is None, "the run ended before its first epoch"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert 1 <= state["epoch"] < config.epochs
    assert not (out / "network.safetensors").exists()

    resumed = train_classifier(config, out, resume=True, progress=False)
    whole = train_classifier(config, tmp_path / "whole", progress=False)
    assert _weights(resumed) == _weights(whole)


def test_half_written_file_of_a_killed_run_is_ignored(run, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    (tmp_path / ".checkpoint.pt.1.part").write_bytes(b"half a checkp")
    resumed = train_classifier(SMALL, tmp_path, resume=True, progress=False)
    assert _weights(resumed) == _weights(run)


def test_finished_run_is_left_as_it_is(run, monkeypatch):
    monkeypatch.setattr(runs, "write_whole", None)
    monkeypatch.setattr(training, "write_whole", None)
    assert train_classifier(SMALL, run, resume=True, progress=False) == run


def test_run_killed_after_its_last_epoch_ends_without_training(run, tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    monkeypatch.setattr(training, "_drawn", None)
    resumed = train_classifier(SMALL, tmp_path, resume=True, progress=False)
    for name in ("network.safetensors", "network.md", "metrics.json", "history.csv"):
        assert (resumed / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.slow
def test_two_processes_share_each_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom attnviz.training import *\n"
        f"train_classifier({SMALL!r}, sys.argv[1], progress=False)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(script), str(tmp_path / "run"),
    ]  # fmt: skip
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
    pair = load_file(tmp_path / "run" / "network.safetensors")
    assert all(value.isfinite().all() for value in pair.values())
    assert "processes: 2" in (tmp_path / "run" / "network.md").read_text()
    assert [row["epoch"] for row in _history(tmp_path / "run")] == [1, 2, 3]


# ----------------------------------------------------------------------------------- what is left


def test_caller_finds_random_state_and_threads_as_before(tmp_path):
    torch.set_num_threads(2)
    try:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        train_classifier(replace(SMALL, epochs=1), tmp_path / "run", progress=False)
        assert torch.equal(torch.rand(3), expected)
        assert torch.get_num_threads() == 2
        assert not torch.backends.cudnn.deterministic
    finally:
        torch.set_num_threads(1)


def test_caller_finds_threads_as_before_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_drawn", lambda *args: {}["nothing"])
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError):
            train_classifier(SMALL, tmp_path / "run", progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_training_lowers_the_loss(tmp_path):
    config = replace(SMALL, images=32, epochs=10, learning_rate=0.01)
    rows = _history(train_classifier(config, tmp_path / "run", progress=False))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def _history(run):
    with (run / "history.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_history_metrics_and_card_agree(run):
    rows, metrics = _history(run), json.loads((run / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["mean_average_precision"] == metrics["mean_average_precision"]
    assert rows[-1]["validation_loss"] == metrics["loss"]
    assert metrics["images"] == 8
    assert {kind: part["images"] for kind, part in metrics["objects"].items()} == {
        "few": 4, "several": 4,
    }  # fmt: skip
    assert tuple(metrics["average_precision"]) == Scenes.class_names
    card = (run / "network.md").read_text()
    assert hashlib.sha256(_weights(run)).hexdigest() in card
    assert f"| all | 8 | {metrics['mean_average_precision']:.3f} |" in card
    assert SMALL.command in card
    assert "generated" in card


def test_config_file_holds_the_config(run):
    assert TrainConfig(**json.loads((run / "config.json").read_text())) == SMALL


@pytest.mark.parametrize("network", ["scenes_fc", "scenes_conv"])
def test_network_of_a_run_loads_and_scores_as_measured(tmp_path, network):
    config = replace(SMALL, network=network, objects="several", epochs=1)
    run = train_classifier(config, tmp_path / "run", progress=False)
    net = load_network(network, weights=run / "network.safetensors")
    assert net.image_size == (32, 32)
    assert net.class_names == Scenes.class_names
    assert net.provenance["command"] == config.command
    found, metrics = _measured(net, 8, size=32), json.loads((run / "metrics.json").read_text())
    assert found == pytest.approx(metrics["mean_average_precision"], abs=1e-6)


def _measured(net, count, size=112, split="val"):
    scenes = Scenes(split, count, 0, size, "several")
    images = torch.cat([net.preprocess(scene.image) for scene in scenes])
    targets = torch.stack([scenes.training_item(i)[1] for i in range(count)])
    return mean_average_precision(net(images), targets).item()


def test_network_of_another_head_does_not_load(run):
    with pytest.raises(ValueError, match="is it another network's"):
        load_network("scenes_fc", weights=run / "network.safetensors")


# --------------------------------------------------------------------------------------- schedule


def test_one_cycle_rises_for_15_percent_then_falls_to_zero():
    assert one_cycle(0) == pytest.approx(1 / 25)
    assert one_cycle(0.075) == pytest.approx((1 / 25 + 1) / 2)
    assert one_cycle(0.15) == pytest.approx(1)
    assert one_cycle(0.575) == pytest.approx(0.5)
    assert one_cycle(1) == pytest.approx(0, abs=1e-12)
    rates = [one_cycle(i / 100) for i in range(101)]
    assert rates[:16] == sorted(rates[:16])
    assert rates[15:] == sorted(rates[15:], reverse=True)


def test_batches_hold_every_image_once_and_are_whole():
    order = torch.randperm(11)
    batches = runs.batches(order, 4)
    assert [len(batch) for batch in batches] == [4, 4]
    assert torch.equal(torch.cat(batches), order[:8])
    assert [len(batch) for batch in runs.batches(order, 20)] == [11]


# ----------------------------------------------------------------------------------------- config


def test_command_says_what_differs_from_the_default():
    config = TrainConfig(network="scenes_conv", epochs=8, seed=3, limit=64)
    assert config.command == (
        "attnviz train classifier --data scenes --network scenes_conv --epochs 8 --seed 3 "
        "--limit 64 --out RUN"
    )
    config = TrainConfig(epochs=2, batch_size=4)
    assert config.command == 'train_classifier(TrainConfig(epochs=2, batch_size=4), "RUN")'


@pytest.mark.parametrize(
    ("limit", "objects", "expected"),
    [
        (None, "both", [("few", 50), ("several", 51)]),
        (7, "both", [("few", 3), ("several", 4)]),
        (7, "few", [("few", 7)]),
        (200, "several", [("several", 101)]),
    ],
)
def test_limit_and_objects_say_what_is_drawn(limit, objects, expected):
    config = TrainConfig(images=101, objects=objects, limit=limit)
    assert training._counts(config, config.images) == expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("network", "vgg", r"expected `network` in \('scenes_fc', 'scenes_conv'\), got 'vgg'"),
        ("data", "voc", r"expected `data` in \('scenes',\), got 'voc'"),
        ("device", "tpu", r"expected `device` in .*, got 'tpu'"),
        ("epochs", 0, "expected `epochs` of at least 1, got 0"),
        ("images", 1, "expected `images` of at least 2, got 1"),
        ("limit", 1, "expected `limit` of at least 2, got 1"),
        ("size", 40, "expected `size` as a multiple of 16, got 40; take 32"),
        ("learning_rate", float("nan"), "expected `learning_rate` .* got nan; try 0.003"),
        ("weight_decay", -1.0, "expected `weight_decay` .* got -1.0; try 0.01"),
    ],
)
def test_wrong_value_is_named_with_the_allowed_ones(field, value, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{field: value})


@pytest.mark.parametrize("value", [2.5, "3", True, None])
def test_count_that_is_not_an_integer_is_refused(value):
    message = re.escape(f"expected `epochs` as an integer, got {value!r}; give a whole number")
    with pytest.raises(TypeError, match=message):
        TrainConfig(epochs=value)


# ----------------------------------------------------------------------------------------- errors


def test_folder_with_a_run_is_not_overwritten(run):
    before = _weights(run)
    with pytest.raises(FileExistsError, match=r"which holds one; pass `resume` \(--resume\)"):
        train_classifier(SMALL, run, progress=False)
    assert _weights(run) == before


def test_file_as_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="expected `out` as a folder, got the file"):
        train_classifier(SMALL, tmp_path / "file", progress=False)


def test_resume_without_a_checkpoint_says_so_and_makes_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no checkpoint\.pt there; start it without"):
        train_classifier(SMALL, tmp_path / "new", resume=True, progress=False)
    assert not (tmp_path / "new").exists()


def test_resume_with_another_config_names_what_differs(run):
    with pytest.raises(ValueError, match=r"\(epochs 3, seed 0\), got epochs 9, seed 2; resume it"):
        train_classifier(replace(SMALL, epochs=9, seed=2), run, resume=True, progress=False)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "tensor", "weights alone"])
def test_damaged_checkpoint_is_named(run, tmp_path, damage):
    whole, file = (run / "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt"
    file.write_bytes({"empty": b"", "text": b"no checkpoint"}.get(damage, whole[:5000]))
    if damage == "tensor":
        torch.save(torch.zeros(2), file)
    if damage == "weights alone":
        torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"could not be read .*; delete the run and start again"):
        train_classifier(SMALL, tmp_path, resume=True, progress=False)


def test_infinite_loss_stops_the_run_before_it_is_saved(tmp_path):
    with pytest.raises(ValueError, match=r"expected a finite loss, got .*; lower `learning_rate`"):
        train_classifier(replace(SMALL, learning_rate=1e30), tmp_path, progress=False)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["task"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_missing_gpu_is_named(tmp_path):
    with pytest.raises(ValueError, match="expected a CUDA device for `device` 'cuda', got none"):
        train_classifier(replace(SMALL, device="cuda"), tmp_path, progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_gpu_lowers_the_loss(tmp_path):
    config = replace(SMALL, images=32, epochs=10, learning_rate=0.01, device="cuda")
    rows = _history(train_classifier(config, tmp_path / "run", progress=False))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


# ------------------------------------------------------------------------------- bundled networks


@pytest.mark.parametrize("name", ["scenes_fc", "scenes_conv"])
def test_bundled_network_is_the_one_its_card_describes(name):
    file = bundled_folder() / "networks" / f"{name}.safetensors"
    card = file.with_suffix(".md").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in card
    assert file.stat().st_size <= 4_000_000
    net = load_network(name)
    assert net.class_names == Scenes.class_names
    assert net.provenance["command"] in card
    assert f"--network {name} " in net.provenance["command"]


@pytest.mark.parametrize("name", ["scenes_fc", "scenes_conv"])
def test_bundled_network_knows_scenes_that_nobody_chose(name):
    assert _measured(load_network(name), 150, split="test") > 0.8


def test_bundled_network_scores_a_picture_as_in_training():
    # The training's own normalization and preprocess() must agree.
    net = load_network("scenes_conv")
    scenes = Scenes("test", 4, 0, 112, "few")
    pixels = torch.stack([scenes.training_item(i)[0] for i in range(4)])
    seen = torch.cat([net.preprocess(scene.image) for scene in scenes])
    assert_close(training._normalized(pixels), seen)
