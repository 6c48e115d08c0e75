import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import interpolate
from torch.testing import assert_close

import attnviz.training.oaa as training
from attnviz.bench_training import CASES, _Subject, bench_oaa
from attnviz.cli import _trained, main
from attnviz.evolution import load_evolution, request_stop
from attnviz.memory import AttentionMemory
from attnviz.networks import load_network, oaa_network
from attnviz.training import (
    integral_config,
    oaa_config,
    train_integral,
    train_oaa,
)
from attnviz.training.loop import optimizer_for
from attnviz.training.measure import grids_of
from attnviz.training.oaa import Accumulator, accumulated_targets
from attnviz.training.pictures import Batch, Draws, Pictures, cut, groups, open_pictures
from attnviz.training.runs import poly, step

ROOT = Path(__file__).parent.parent
# So slow that most class maps of the untrained network keep a positive value.
SMALL = oaa_config(
    images=12, validation_images=4, size=48, epochs=3, batch_size=4, learning_rate=1e-4, start=0,
    gate=False, drop="image", measured=4, watched=2, device="cpu", precision="32",
)  # fmt: skip


def _train(config, out, **options):
    return train_oaa(config, out, progress=False, **options)


def _files(run):
    names = ("network.safetensors", "memory/memory.safetensors")
    return [(run / name).read_bytes() for name in names]


def _history(run):
    with (run / "history.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _lasting(run):
    # What has to be equal after an interruption: all but the times.
    rows = _history(run)
    for row in rows:
        for name in ("seconds", "images_per_second", "measuring_seconds"):
            del row[name]
    return _files(run), str(rows), [each.tolist() for each in load_evolution(run).maps]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    # One undisturbed run that the others are compared with.
    return _train(SMALL, tmp_path_factory.mktemp("runs") / "whole")


# ---------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize(
    "changes",
    [
        {"gate": False},
        {"gate": True, "start": 1, "epochs": 4, "drop": "none"},
        {"rule": "mean", "batch_size": 3},
    ],
)
def test_memory_holds_what_the_equations_say_of_the_maps_seen(tmp_path, monkeypatch, changes):
    config, seen = replace(SMALL, fallback=False, **changes), []
    take = Accumulator.take

    def spy(self, batch, class_maps, place):
        maps = class_maps.detach().double().numpy()
        seen.append((place[0], batch.indices, batch.flips, maps, self.pictures))
        take(self, batch, class_maps, place)

    monkeypatch.setattr(Accumulator, "take", spy)
    run = _train(config, tmp_path / "run")
    expected, visits = {}, 0
    for epoch, indices, flips, class_maps, pictures in seen:
        for row, i in enumerate(indices):
            scores = class_maps[row].mean(axis=(1, 2))
            labels = pictures.class_ids[i]
            best = sorted(range(len(scores)), key=lambda c: -scores[c])[: len(labels)]
            for c in labels:
                map = np.maximum(class_maps[row, c], 0)
                if epoch < config.start or map.max() == 0 or (config.gate and c not in best):
                    continue
                map = map / map.max()
                key = (pictures.image_ids[i], c)
                expected.setdefault(key, []).append(map[:, ::-1] if flips[row] else map)
                visits += 1
    memory = AttentionMemory.load(run / "memory")
    join = np.mean if config.rule == "mean" else np.max
    for key in memory:
        found = expected.get(key, [])
        assert memory.count(*key) == len(found)
        joined = join(found, axis=0) if found else np.zeros(memory.grid(key[0]))
        assert_close(memory[key].double().numpy(), joined, atol=2e-3, rtol=0)
    assert visits > len(memory) / 3
    shares = [row["accepted"] for row in _history(run)]
    assert sum(shares) == pytest.approx(visits / len(memory))


def test_dropped_pixels_are_those_that_the_last_map_marks(tmp_path, monkeypatch):
    last, draws, checked = {}, {}, []
    take, mask, forward = Accumulator.take, Accumulator.mask, training.Task.forward

    def spy_mask(self, batch, epoch):
        draws["batch"], draws["epoch"] = batch, epoch
        return mask(self, batch, epoch)

    def spy_forward(self, images, mask=None, feature=False):
        batch = draws["batch"]
        height, width = images.shape[2:]
        for row, i in enumerate(batch.indices):
            expected = torch.zeros(height, width, dtype=torch.bool)
            if batch.chances[row] < SMALL.rate and draws["epoch"] > 0:
                for map in last.get(i, {}).values():
                    large = interpolate(map[None, None], (height, width), mode="bilinear")[0, 0]
                    expected |= large > SMALL.threshold
            if batch.flips[row]:
                expected = expected.flip(1)
            got = torch.zeros_like(expected) if mask is None else mask[row]
            assert (got != expected).float().mean() < 0.01  # kept in steps of 1/255
            checked.append(int(got.sum()))
        return forward(self, images, mask, feature)

    def spy_take(self, batch, class_maps, place):
        for row, i in enumerate(batch.indices):
            for c in self.pictures.class_ids[i]:
                map = class_maps[row, c].detach().relu()
                if map.max() > 0:
                    map = map.flip(1) if batch.flips[row] else map
                    last.setdefault(i, {})[c] = map / map.max()
        take(self, batch, class_maps, place)

    monkeypatch.setattr(Accumulator, "mask", spy_mask)
    monkeypatch.setattr(Accumulator, "take", spy_take)
    monkeypatch.setattr(training.Task, "forward", spy_forward)
    _train(SMALL, tmp_path / "run")
    assert len(checked) == 36
    assert 3 < sum(count > 0 for count in checked) < 24


def test_drop_layer_reaches_the_network_as_zeros():
    network = oaa_network("scenes", 2, "random").eval()
    task, images = training.Task(network), torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, :16] = True
    hidden = images.clone()
    hidden[0, :, :16] = 0
    assert torch.equal(task(images, mask)[0], network.class_maps(hidden))
    features = network.backbone(images)
    features[0, :, :2] = 0
    assert torch.equal(task(images, mask, True)[0], network.head(features))


def _accumulator(config=SMALL, count=2):
    pictures = open_pictures("scenes", "train", size=32, count=count)
    grids = dict.fromkeys(pictures.image_ids, (4, 4))
    labels = dict(zip(pictures.image_ids, pictures.class_ids, strict=True))
    memory = AttentionMemory(grids, labels, run_id="test", keep_last=True)
    return Accumulator(config, memory, pictures)


def _batch(indices, flips, boxes):
    count = len(indices)
    return Batch(
        indices, torch.zeros(count, 3, 32, 32, dtype=torch.uint8),
        torch.ones(count, dtype=torch.bool), flips, boxes, torch.zeros(count), 1.0,
    )  # fmt: skip


def test_map_of_a_cut_and_mirrored_view_returns_to_its_place():
    accumulator = _accumulator()
    maps = torch.zeros(1, 12, 4, 4)
    maps[:, :, :, 0] = 1  # the left side of the view, which is the right side of the cut
    accumulator.take(_batch([0], [True], [(0.0, 0.5, 0.5, 1.0)]), maps, (0, 0))
    key = next(iter(accumulator.memory))
    expected = torch.zeros(4, 4)
    expected[2:, 1] = expected[2:, 0] = 1
    found = accumulator.memory[key]
    assert (found[2:, 1] > found[2:, 0]).all()
    assert not found[:2].any()
    assert not found[:, 2:].any()


def test_unreadable_picture_leaves_no_map():
    accumulator = _accumulator()
    batch = _batch([0, 1], [False] * 2, [(0.0, 0.0, 1.0, 1.0)] * 2)
    batch = replace(batch, readable=torch.tensor([False, True]))
    accumulator.take(batch, torch.ones(2, 12, 4, 4), (0, 0))
    counts = {key[0]: accumulator.memory.count(*key) for key in accumulator.memory}
    assert list(counts.values()) == [0, 1]


def test_targets_are_mirrored_and_cut_like_their_views():
    accumulator = _accumulator()
    (key, *_), map = list(accumulator.memory), torch.rand(4, 4)
    accumulator.memory.update(*key, map)
    batch = _batch([0, 1], [True, False], [(0.0, 0.0, 1.0, 1.0)] * 2)
    pictures = accumulator.pictures
    targets, known = accumulated_targets(accumulator.memory, pictures, batch, (12, 4, 4))
    assert known.tolist() == [True, False]
    assert_close(targets[0, key[1]], map.flip(1) / map.max(), atol=1e-3, rtol=0)
    assert targets.sum() == targets[0, key[1]].sum()
    batch = _batch([0], [False], [(0.0, 0.0, 0.5, 0.5)])
    targets, _ = accumulated_targets(accumulator.memory, pictures, batch, (12, 4, 4))
    corner = targets[0, key[1]]
    assert_close(corner[0, 0], map[0, 0] / map.max(), atol=1e-3, rtol=0)
    assert_close(corner[-1, -1], (map / map.max())[1:3, 1:3].flatten() @ torch.tensor(
        [9.0, 3, 3, 1]) / 16, atol=1e-3, rtol=0)  # fmt: skip


# ------------------------------------------------------------------------------------ equal bits


def test_equal_configs_give_equal_files(run, tmp_path):
    torch.rand(3)  # the caller's random state has no influence
    assert _lasting(_train(SMALL, tmp_path / "again")) == _lasting(run)


@pytest.mark.parametrize("calls", [1, 5, 8])
def test_interrupted_run_ends_as_if_undisturbed(run, tmp_path, monkeypatch, calls):
    config, done = replace(SMALL, checkpoint_steps=2), []
    take = Accumulator.take

    def interrupted(*args):
        take(*args)
        done.append(1)
        if len(done) == calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(Accumulator, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(config, tmp_path / "run")
    monkeypatch.undo()
    resumed = _train(config, tmp_path / "run", resume=True)
    memory = load_file(resumed / "memory" / "memory.safetensors")
    expected = load_file(run / "memory" / "memory.safetensors")
    assert all(torch.equal(memory[name], expected[name]) for name in expected)
    weights = load_file(resumed / "network.safetensors")
    expected = load_file(run / "network.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert _lasting(resumed)[1:] == _lasting(run)[1:]
    assert not list(resumed.glob("memory-*"))


@pytest.mark.parametrize("name", ["memory", "checkpoint"])
def test_run_ended_between_the_files_of_a_checkpoint_resumes(run, tmp_path, monkeypatch, name):
    # Memory and weights of different steps must never meet.
    saves, save_run, save = [], training.save_run, AttentionMemory.save

    def interrupted(*args, **parts):
        if name == "checkpoint":
            save_run(*args, **parts)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    def half(self, folder):
        save(self, folder)
        if len(saves) == 1 and name == "memory":
            saves.append(1)
            raise KeyboardInterrupt
        saves.append(1)

    if name == "memory":
        monkeypatch.setattr(AttentionMemory, "save", half)
    else:
        monkeypatch.setattr(training, "save_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(SMALL, tmp_path / "run")
    monkeypatch.undo()
    assert _lasting(_train(SMALL, tmp_path / "run", resume=True)) == _lasting(run)


def _started(config, out):
    code = (
        "import sys; from attnviz.training import *; "
        f"train_oaa(OAAConfig(**{asdict(config)!r}), sys.argv[1], "
        "(__import__('pathlib').Path(sys.argv[1]) / 'checkpoint.pt').is_file(), progress=False)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out)], env=environment, stderr=subprocess.PIPE
    )


def test_process_killed_at_random_moments_ends_as_if_undisturbed(tmp_path):
    config, out = replace(SMALL, epochs=8, checkpoint_steps=1), tmp_path / "killed"
    draws, kills = random.Random(0), 0
    while kills < 3:
        process = _started(config, out)
        try:
            deadline = time.monotonic() + 120
            while not list(out.glob("memory-*")) and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(draws.random())
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stderr.close()
        kills += 1
    resumed = _train(config, out, resume=True)
    assert _lasting(resumed) == _lasting(_train(config, tmp_path / "whole"))


def test_finished_run_is_left_as_it_is(run, monkeypatch):
    monkeypatch.setattr(training, "opened", None)
    assert _train(SMALL, run, resume=True) == run


def test_run_asked_to_stop_goes_on_where_it_was(run, tmp_path, monkeypatch):
    learn, steps = training._Accumulating.learn, []

    def asking(self, *args):
        steps.append(1)
        if len(steps) == 4:
            request_stop(tmp_path / "run")
        return learn(self, *args)

    monkeypatch.setattr(training._Accumulating, "learn", asking)
    stopped = _train(SMALL, tmp_path / "run")
    assert not (stopped / "metrics.json").exists()
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 1)
    assert _lasting(_train(SMALL, stopped, resume=True)) == _lasting(run)


def test_resume_with_other_pictures_is_refused(run, tmp_path, monkeypatch):
    copied = tmp_path / "run"
    copied.mkdir()
    (copied / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    pictures = open_pictures("scenes", "train", size=48, count=11)
    monkeypatch.setattr(training, "opened", lambda *args: pictures)
    with pytest.raises(ValueError, match="expected the pictures of the run in .*, got others"):
        _train(SMALL, copied, resume=True)


def test_resume_of_another_kind_of_training_names_no_damage(run, tmp_path):
    message = "expected a run with IntegralConfig in .*, got one of another training or version"
    before = _files(run)
    with pytest.raises(ValueError, match=message):
        train_integral(integral_config(run), run, resume=True, progress=False)
    assert _files(run) == before


def test_damaged_metrics_of_a_finished_run_are_made_anew(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    metrics = copied / "metrics.json"
    metrics.write_bytes(metrics.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"got none .*; delete its metrics\.json and --resume"):
        _trained(copied)
    metrics.unlink()
    _train(SMALL, copied, resume=True)
    assert metrics.read_bytes() == (run / "metrics.json").read_bytes()


# ------------------------------------------------------------------------------ several processes


def _torchrun(config, out, *, call="train_oaa(OAAConfig(**config), sys.argv[1], resume"):
    script = out.with_suffix(".py")
    script.write_text(
        "import os, sys\nfrom pathlib import Path\nfrom attnviz.training import *\n"
        "Path(f'{sys.argv[1]}-{os.environ[\"RANK\"]}.pid').write_text(str(os.getpid()))\n"
        f"config = {asdict(config)!r}\n"
        "resume = (Path(sys.argv[1]) / 'checkpoint.pt').is_file()\n"
        f"try:\n    {call}, progress=False)\n"
        "except OSError as error:\n    sys.exit(f'attnviz: {error}')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(script), str(out),
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_two_processes_accumulate_what_one_does(tmp_path, monkeypatch):
    # One process that computes each step in the same two parts sees the same maps.
    process = _torchrun(SMALL, tmp_path / "pair")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    # every second picture of a step is the other process'

    def like_two(pictures, indices, draws, jitter, parts):
        return [
            replace(part, share=0.5)
            for rank in (0, 1)
            for part in groups(pictures, indices[rank::2], draws, jitter, 1)
        ]

    monkeypatch.setattr(training, "Loop", partial(training.Loop, views=like_two))
    single = _train(SMALL, tmp_path / "single")
    pair = AttentionMemory.load(tmp_path / "pair" / "memory")
    alone = AttentionMemory.load(single / "memory")
    assert list(pair) == list(alone)
    assert sum(pair.count(*key) for key in pair) > len(pair)
    for key in pair:
        assert pair.count(*key) == alone.count(*key)
        assert_close(pair[key], alone[key], atol=2e-3, rtol=0)
    assert not list((tmp_path / "pair").glob("memory-*"))


@pytest.mark.slow
def test_killed_rank_ends_the_run_with_one_line_and_leaves_it_resumable(tmp_path):
    config, out = replace(SMALL, epochs=60), tmp_path / "run"
    process = _torchrun(config, out)
    try:
        deadline = time.monotonic() + 120
        while not (out / "history.csv").is_file():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(int(Path(f"{out}-1.pid").read_text()), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["epoch"] >= 1
    AttentionMemory.load(out / state["memory"], state["run_id"])
    lines = [line for line in output.splitlines() if line.startswith("attnviz:")]
    assert len(lines) == 1
    assert "expected 2 processes, got no answer from one of them; continue" in lines[0]


# ---------------------------------------------------------------------------------- what is left


def test_player_sees_the_maps_that_the_saved_network_makes(run):
    evolution = load_evolution(run)
    net = load_network("oaa", weights=run / "network.safetensors")
    assert evolution.epochs == (1, 2, 3)
    assert [row["epoch"] for row in evolution.curves] == [1, 2, 3]
    memory = AttentionMemory.load(run / "memory")
    for number, each in enumerate(evolution.watched):
        picture = Image.open(run / "evolution" / each.picture).convert("RGB")
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            maps = net.model.class_maps((pixels - 0.5) / 0.25)[0, each.class_id].relu()
        expected = (maps / maps.max().clamp_min(1e-9)).numpy()
        assert np.abs(evolution.maps[number][-1] / 255 - expected).max() < 0.03
        kept = memory[each.image_id, each.class_id].numpy()
        if memory.count(each.image_id, each.class_id):
            assert np.abs(evolution.accumulated[number][-1] / 255 - kept).max() < 0.01
        assert (np.diff(evolution.accumulated[number].astype(int), axis=0) >= 0).all()


def test_history_and_metrics_agree(run):
    rows, metrics = _history(run), json.loads((run / "metrics.json").read_text())
    assert rows[-1]["mean_average_precision"] == metrics["mean_average_precision"]
    assert 0 < metrics["maps"]["accumulated"]["recall"] <= 1
    classes = metrics["maps"]["accumulated"]["classes"].values()
    count = metrics["maps"]["accumulated"]["maps"]
    assert sum(each["maps"] for each in classes) == count
    mean = sum(each["maps"] * each["recall"] for each in classes) / count
    assert metrics["maps"]["accumulated"]["recall"] == pytest.approx(mean)
    assert asdict(replace(SMALL)) == asdict(
        type(SMALL)(**json.loads((run / "config.json").read_text()))
    )


def test_accumulated_recall_is_never_below_an_earlier_one(run):
    recalls = [row["recall_accumulated"] for row in _history(run)]
    assert recalls == sorted(recalls)
    assert recalls[-1] > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Pictures of two classes, one of them cut off.
    folder, draws = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(3):
            pixels = draws.integers(0, 255, (40, 40 + 24 * number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}{number}.jpg")
    path = folder / "dog" / "dog1.jpg"
    path.write_bytes(path.read_bytes()[:2000])
    return folder


def test_unreadable_picture_is_reported_and_left_out(folder, tmp_path):
    config = replace(SMALL, data=str(folder), batch_size=2, epochs=2, watched=1)
    metrics = json.loads((_train(config, tmp_path / "run") / "metrics.json").read_text())
    assert metrics["validated_on"] == "training"
    left = metrics["left_out"]["images that cannot be read"]
    assert left["images"] == 1
    assert "dog1" in left["first"][0]


def test_pictures_without_a_label_are_set_aside():
    pictures = open_pictures("scenes", "train", size=32, count=3)
    items = [replace(pictures.item(0), class_ids=()), pictures.item(1), pictures.item(2)]
    left = Pictures(items, pictures.class_names, 32, "aspect")
    assert len(left) == 2
    assert left.unlabeled == pictures.image_ids[:1]


def test_folder_without_any_label_is_refused(tmp_path):
    for number in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="two labeled pictures in .*; 3 have no label"):
        open_pictures(str(tmp_path), "train", size=32)


def test_class_that_never_passes_the_gate_gets_the_final_map_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "accepts", lambda scores, labels: torch.zeros_like(labels))
    config = replace(SMALL, gate=True, epochs=1)
    filled = _train(config, tmp_path / "filled")
    metrics = json.loads((filled / "metrics.json").read_text())
    memory = AttentionMemory.load(filled / "memory")
    assert metrics["never_accepted"] == len(memory)
    kind = "images without a main object (no map was ever accepted)"
    assert metrics["left_out"][kind]["images"] == 12
    positive = [key for key in memory if memory[key].any()]
    assert metrics["filled"] == len(positive) > 0
    assert metrics["maps"]["accumulated"]["recall"] == pytest.approx(
        metrics["maps"]["cam"]["recall"], abs=0.02
    )
    empty = _train(replace(config, fallback=False), tmp_path / "empty")
    memory = AttentionMemory.load(empty / "memory")
    assert not any(memory[key].any() for key in memory)


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
def test_a_second_training_is_kept_out_of_the_folder(tmp_path):
    import fcntl

    out = tmp_path / "run"
    out.mkdir()
    held = os.open(out, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(FileExistsError, match="no other training in .* under way"):
            _train(SMALL, out)
        assert list(out.iterdir()) == []
    finally:
        os.close(held)
    assert (_train(SMALL, out) / "metrics.json").is_file()


def test_second_head_learns_the_maps_and_scores_unseen_images(tmp_path):
    config = replace(SMALL, branch=True, drop="none", validation_images=30)
    run = _train(config, tmp_path / "run")
    first = load_file(run / "network.safetensors")
    second = load_file(run / "branch.safetensors")
    shared = [name for name in first if name.startswith("backbone")]
    assert shared
    assert all(torch.equal(first[name], second[name]) for name in shared)
    assert not torch.equal(first["head.0.weight"], second["head.0.weight"])
    found = json.loads((run / "metrics.json").read_text())["localization"]
    for each in found.values():
        assert 0 < each["images"] < 30
        assert each["loc1"]["score"] <= each["loc5"]["score"] <= each["gt_known"]["score"]
    load_network("oaa", weights=run / "branch.safetensors")


# ------------------------------------------------------------------------------------- integral


def test_integral_model_learns_the_accumulated_maps(run, tmp_path):
    config = integral_config(
        run, epochs=6, batch_size=4, learning_rate=3e-3, measured=4, watched=2, device="cpu",
        precision="32", reduction="released",
    )  # fmt: skip
    learned = train_integral(config, tmp_path / "whole", progress=False)
    rows = _history(learned)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert load_evolution(learned).method == "integral"
    metrics = json.loads((learned / "metrics.json").read_text())
    before = json.loads((run / "metrics.json").read_text())
    assert metrics["maps"]["accumulated"]["recall"] == before["maps"]["accumulated"]["recall"]
    # interrupted in its fourth epoch
    request, state = tmp_path / "stopped", {}
    finish = train_integral.__globals__["_Learning"].finish_epoch

    def stopping(self, epoch):
        state["epochs"] = epoch
        if epoch == 3:
            request_stop(request)
        return finish(self, epoch)

    train_integral.__globals__["_Learning"].finish_epoch = stopping
    try:
        train_integral(config, request, progress=False)
    finally:
        train_integral.__globals__["_Learning"].finish_epoch = finish
    assert state["epochs"] == 3
    train_integral(config, request, resume=True, progress=False)
    name = "network.safetensors"
    assert (request / name).read_bytes() == (learned / name).read_bytes()


@pytest.mark.parametrize("loss", ["mce", "ep"])
def test_other_losses_train(run, tmp_path, loss):
    config = integral_config(run, epochs=1, loss=loss, measured=0, watched=1, device="cpu")
    assert _history(train_integral(config, tmp_path / "run", progress=False))[0]["loss"] > 0


def test_integral_model_without_a_finished_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a finished run of `attnviz train oaa`"):
        train_integral(integral_config(tmp_path, "small"), tmp_path / "out", progress=False)


# --------------------------------------------------------------------------------- views, steps


def test_draws_of_an_epoch_do_not_depend_on_what_is_switched_on():
    options = {"shuffle": True, "flips": True, "crops": True}
    whole = Draws.of(3, 5, 40, **options)
    for name in options:
        less = Draws.of(3, 5, 40, **{**options, name: False})
        same = {"shuffle": "flips", "flips": "boxes", "crops": "order"}[name]
        assert torch.equal(getattr(less, same), getattr(whole, same))
        assert torch.equal(less.chances, whole.chances)
    assert sorted(whole.order.tolist()) == list(range(40))
    assert not torch.equal(Draws.of(3, 6, 40, **options).order, whole.order)
    x0, y0, x1, y1 = whole.boxes.T
    assert (whole.boxes >= 0).all()
    assert (whole.boxes <= 1 + 1e-6).all()
    assert_close(x1 - x0, y1 - y0)
    assert (x1 - x0 >= 0.5 - 1e-6).all()


def test_cut_samples_where_its_box_says():
    ramp = torch.arange(32.0).expand(1, 1, 32, 32) + 0.5  # the position of each column
    view = cut(ramp, (0.25, 0.0, 0.75, 0.5))
    expected = 8 + (torch.arange(32) + 0.5) / 2
    assert_close(view[0, 0, 5], expected)
    assert cut(ramp, (0.0, 0.0, 1.0, 1.0)) is ramp


def test_step_is_grouped_by_size_and_cut_into_parts(folder):
    pictures = open_pictures(str(folder), "train", size=32)
    draws = Draws.of(0, 0, len(pictures), shuffle=False, flips=True, crops=True)
    made = groups(pictures, list(range(len(pictures))), draws, True, 2)
    assert sorted(i for batch in made for i in batch.indices) == list(range(len(pictures)))
    assert sum(batch.share for batch in made) == pytest.approx(1)
    for batch in made:
        assert {pictures.sizes[i] for i in batch.indices} == {tuple(batch.pixels.shape[2:])}
        assert len(batch.indices) <= 3
    assert sum(int((~batch.readable).sum()) for batch in made) == 1


def test_square_picture_stays_square():
    assert open_pictures("scenes", "train", size=48, count=2).sizes == [(48, 48)] * 2


def test_step_in_parts_changes_the_weights_like_the_whole(tmp_path):
    # In a network whose normalization is frozen, so that parts do not see each other anyway.
    config = replace(
        SMALL, network="squeezenet1_1", weights="random", epochs=1, drop="none", optimizer="sgd",
        learning_rate=0.01, images=4, limit=4, size=32,
    )  # fmt: skip
    whole = load_file(_train(config, tmp_path / "whole") / "network.safetensors")
    parts = _train(replace(config, accumulate=2), tmp_path / "parts")
    parts = load_file(parts / "network.safetensors")
    for name in whole:
        assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4)


def test_rates_follow_the_multipliers_and_biases_may_not_decay():
    network = oaa_network("squeezenet1_1", 2, "random")
    config = oaa_config("thesis", multipliers=(1.0, 2.0, 10.0, 20.0))
    optimizer = optimizer_for(config, network.old_parameters(), network.new_parameters())
    found = [(g["factor"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(1.0, 2e-4), (2.0, 0.0), (10.0, 2e-4), (20.0, 0.0)]
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in network.parameters()}
    bias = network.head[-1].bias
    assert any(p is bias for p in optimizer.param_groups[3]["params"])


def test_schedules_start_at_one_and_fall():
    assert (poly(0), step(0)) == (1, 1)
    assert poly(0.5) == pytest.approx(0.5**0.9)
    assert (step(0.66), step(0.67)) == (1, 0.1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 64), (64, 300)])
def test_grids_are_those_of_the_maps(height, width):
    network = oaa_network("scenes", 2, "random")
    maps = network.class_maps(torch.zeros(1, 3, height, width))
    assert grids_of(network, [(height, width)]) == {(height, width): tuple(maps.shape[2:])}
    assert next(network.parameters()).device.type == "cpu"


# --------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("network", "alexnet", r"expected `network` in \('scenes', .*, got 'alexnet'"),
        ("rule", "sum", r"expected `rule` in \('max', 'mean'\), got 'sum'"),
        ("drop", "pixel", r"expected `drop` in \('none', 'image', 'feature'\), got 'pixel'"),
        ("threshold", 1.5, "expected `threshold` as a number from 0 to 1, got 1.5; try 0.6"),
        ("rate", -0.1, "expected `rate` as a number from 0 to 1, got -0.1; try 0.5"),
        ("start", 3, "expected `epochs` above `start`, 3, from where on .* got 3; train longer"),
        ("epochs", 0, "expected `epochs` of at least 1, got 0"),
        ("multipliers", (1.0, 2.0), r"expected four `multipliers`, got \(1.0, 2.0\)"),
    ],
)
def test_wrong_value_is_named_with_the_allowed_ones(untyped, field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **{field: value})


def test_presets_differ_where_the_sources_do():
    thesis, released = oaa_config("thesis"), oaa_config("released")
    assert (thesis.batch_size, thesis.weight_decay, thesis.nesterov) == (5, 2e-4, False)
    assert (released.batch_size, released.weight_decay, released.nesterov) == (5, 5e-4, True)
    assert (released.shuffle, released.flips, released.jitter) == (False, False, True)
    assert oaa_config("literature").schedule == "poly"
    with pytest.raises(ValueError, match=r"expected `preset` in \('small', .*, got 'mine'"):
        oaa_config("mine")


def test_infinite_loss_stops_the_run_before_it_is_saved(tmp_path):
    with pytest.raises(ValueError, match=r"expected a finite loss, got .*; lower `learning_rate`"):
        _train(replace(SMALL, learning_rate=1e30), tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["task"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_accumulates_what_the_cpu_does(run, tmp_path):
    # The first epoch only: later the drop layer lets small differences grow.
    config = replace(SMALL, epochs=1)
    one = AttentionMemory.load(_train(config, tmp_path / "cpu") / "memory")
    other = _train(replace(config, device="cuda"), tmp_path / "cuda")
    other = AttentionMemory.load(other / "memory")
    for key in one:
        assert_close(other[key], one[key], atol=0.05, rtol=0)


# --------------------------------------------------------------------------------- command line


def test_commands_train_report_and_refuse(tmp_path, capsys):
    run, learned = tmp_path / "run", tmp_path / "learned"
    common = ["--device", "cpu", "--epochs", "1", "--learning-rate", "1e-4"]
    oaa = ["train", "oaa", "--limit", "8", "--size", "48", "--start", "0", *common]
    assert main([*oaa, "--drop", "--out", str(run), "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((run / "config.json").read_text())["drop"] == "image"
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r".*run: mean average precision 0\.\d+ on 8 images", lines[0])
    assert re.match(r"  cam maps: recall [\d.]+ %, noise [\d.]+ %", lines[1])
    assert json.loads((tmp_path / "a.json").read_text())["training_images"] == 8
    assert main([*oaa, "--out", str(run)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1].split("attnviz:")) == 2
    integral = ["train", "integral", "--run", str(run), *common, "--out", str(learned)]
    assert main(integral) == 0
    assert "integral maps: recall" in capsys.readouterr().out


def test_benchmark_compares_steps_with_and_without_accumulation(monkeypatch):
    result = bench_oaa(["scenes"], 2, 1, "cpu", size=32, memory=False, progress=False)
    rows = result.to_json()["rows"]
    assert [row["case"].split(": ")[1] for row in rows] == list(CASES)[1:]
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows)
    subject = _Subject("scenes", 32, 2, "cpu", 0, list(CASES)[2])
    subject.run(subject.images)
    memory = subject.accumulator.memory
    assert sum(memory.count(*key) for key in memory) > len(memory) / 3
