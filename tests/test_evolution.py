import dataclasses
import json
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from recorded import CLASS_NAMES, GRID, PAIRS, maps_of, record, watch, writer

from attnviz import evolution
from attnviz.evolution import EvolutionWriter, Watch, load_evolution, request_stop, stop_requested

# ------------------------------------------------------------------------------- what is written


def test_what_is_written_is_read_again(tmp_path):
    run = record(tmp_path / "run", 3, planned=4, rule="mean", drop=True, history=True)
    found = load_evolution(run)
    assert (found.network, found.data, found.rule, found.drop) == (
        "five stages", "scenes", "mean", True,
    )  # fmt: skip
    assert (found.epochs, found.planned, found.finished) == ((1, 2, 3), 4, False)
    assert found.class_names == tuple(CLASS_NAMES)
    pairs = [(each.image_id, each.class_id, each.size) for each in found.watched]
    assert pairs == PAIRS
    for number, pair in enumerate((name, class_id) for name, class_id, _ in PAIRS):
        maps = np.stack([maps_of(epoch, [p[:2] for p in PAIRS])[pair] for epoch in (1, 2, 3)])
        assert np.abs(found.maps[number] / 255 - maps).max() <= 0.5 / 255 + 1e-9
        highest = np.maximum.accumulate(maps)
        assert np.abs(found.accumulated[number] / 255 - highest).max() <= 0.5 / 255 + 1e-9
        np.testing.assert_array_equal(found.picture(number), watch()[number].image)
        np.testing.assert_array_equal(found.mask(number), watch()[number].mask)
    np.testing.assert_array_equal(found.scores[:, 1], [1.125, 2.125, 3.125])
    assert found.accepted[:, 0].tolist() == [False, True, True]
    assert found.curves[1] == {
        "epoch": 2, "loss": 0.5, "recall_epoch": 0.25, "recall_accumulated": 0.2,
        "noise_epoch": pytest.approx(np.nan, nan_ok=True),
    }  # fmt: skip
    assert found.skipped == ()


def test_tensors_and_a_memory_are_taken_as_they_are(tmp_path):
    class Memory:  # only what the writer asks of an accumulated map
        def __getitem__(self, pair):
            return torch.full(GRID, 0.5, dtype=torch.float16)

    target = writer(tmp_path, 1)
    maps = {pair: torch.ones(GRID, dtype=torch.float16) for pair in target.pairs}
    target.write(1, maps, Memory())
    found = load_evolution(tmp_path)
    assert np.unique(found.maps[0]).tolist() == [255]
    assert np.unique(found.accumulated[0]).tolist() == [128]  # 127.5, half up
    assert np.isnan(found.scores).all()
    assert not found.accepted.any()


def test_pair_that_was_not_seen_has_a_zero_map(tmp_path):
    target = writer(tmp_path, 1, method="integral")
    target.write(1, {target.pairs[1]: np.ones(GRID)})
    found = load_evolution(tmp_path)
    assert [stack.max() for stack in found.maps] == [0, 255, 0]
    assert found.accumulated == ()


def test_pixels_to_ignore_survive(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[5:10], mask[10:12] = 1, 255
    each = Watch("a", 0, np.zeros((20, 30, 3), np.uint8), (2, 3), mask)
    EvolutionWriter(
        tmp_path, [each], run_id="r", network="n", data="d", class_names=["x"], epochs=1
    )
    np.testing.assert_array_equal(load_evolution(tmp_path).mask(0), mask)


def test_photographs_are_stored_as_jpeg_and_have_their_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    each = Watch("a", 0, Image.fromarray(noise), (2, 3))
    EvolutionWriter(
        tmp_path, [each], run_id="r", network="n", data="d", class_names=["x"], epochs=1
    )
    found = load_evolution(tmp_path)
    assert found.watched[0].picture.endswith(".jpg")
    assert found.picture(0).shape == (300, 400, 3)
    assert found.mask(0) is None


def test_epoch_written_again_replaces_the_first(tmp_path):
    target = writer(tmp_path, 2, method="integral")
    target.write(1, {target.pairs[0]: np.ones(GRID)})
    target.write(1, {})
    assert load_evolution(tmp_path).maps[0].max() == 0


def test_failed_write_leaves_the_last_whole_file(tmp_path, monkeypatch):
    target = writer(tmp_path, 2, method="integral")
    path = target.write(1, {target.pairs[0]: np.ones(GRID)})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        target.write(1, {})
    assert path.read_bytes() == before
    assert not list(target.folder.glob(".*"))


def test_reader_never_meets_half_a_file(tmp_path):
    target = writer(tmp_path, 60, method="integral")
    problems = []

    def read():
        while threading.main_thread().is_alive() and not done.is_set():
            problems.extend(load_evolution(tmp_path).skipped)

    done = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        target.write(1 + number % 3, maps_of(number, target.pairs))
    done.set()
    reader.join()
    assert problems == []


def test_writing_does_not_change_the_maps(tmp_path):
    target = writer(tmp_path, 1)
    maps = {pair: torch.rand(GRID) for pair in target.pairs}
    copies = {pair: map.clone() for pair, map in maps.items()}
    target.write(1, maps, maps)
    assert all(torch.equal(maps[pair], copies[pair]) for pair in maps)


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", "half", "shape", "run"])
def test_damaged_epoch_is_left_out_and_named(tmp_path, damage):
    run = record(tmp_path / "run", 4)
    path = run / "evolution" / "epoch-0002.npz"
    if damage == "half":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage in ("shape", "run"):
        other = record(
            tmp_path / "other", 2, grid=(3, 3), run_id="run" if damage == "shape" else "x"
        )
        path.write_bytes((other / "evolution" / "epoch-0002.npz").read_bytes())
    else:
        path.write_bytes(damage)
    found = load_evolution(run)
    assert found.epochs == (1, 3, 4)
    assert found.maps[0].shape == (3, *GRID)
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith("epoch-0002.npz left out: ")


def test_damaged_history_is_left_out_and_named(tmp_path):
    run = record(tmp_path / "run", 1, history=True)
    (run / "history.csv").write_text("epoch,loss\n1,nonsense\n")
    found = load_evolution(run)
    assert found.curves == ()
    assert found.skipped[0].startswith("history.csv left out: could not convert")


def test_run_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"the folder of a run, got '.*nope', which is not"
    ):
        load_evolution(tmp_path / "nope")
    with pytest.raises(FileNotFoundError, match=r"without evolution/evolution.json; has the"):
        load_evolution(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_damaged_header_is_refused(tmp_path, text):
    run = record(tmp_path / "run", 1)
    (run / "evolution" / "evolution.json").write_text(text)
    with pytest.raises(ValueError, match=r"delete the folder and train again"):
        load_evolution(run)


def test_recording_of_a_newer_format_is_refused(tmp_path):
    run = record(tmp_path / "run", 1)
    header = run / "evolution" / "evolution.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="of format 1, got 2 .*; install the version"):
        load_evolution(run)


def test_missing_picture_is_named(tmp_path):
    run = record(tmp_path / "run", 1)
    (run / "evolution" / "picture-000.png").unlink()
    with pytest.raises(ValueError, match=r"a whole picture, got '.*picture-000.png'"):
        load_evolution(run).picture(0)


def test_recording_of_another_run_is_never_continued(tmp_path):
    writer(tmp_path, run_id="first")
    writer(tmp_path, run_id="first")
    with pytest.raises(FileExistsError, match="recording of run 'second' .* one of 'first'"):
        writer(tmp_path, run_id="second")


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.ones((2, 2)), r"a map of shape \(6, 8\) for \('pond', 0\), got \(2, 2\)"),
        (np.full(GRID, 1.5), r"a map in \[0, 1\] for \('pond', 0\), got values from 1.5 to 1.5"),
        (np.full(GRID, np.nan), r"a map in \[0, 1\]"),
        (np.full(GRID, -0.1), r"a map in \[0, 1\]"),
    ],
)
def test_maps_that_do_not_fit_are_refused(tmp_path, maps, message):
    target = writer(tmp_path, method="integral")
    with pytest.raises(ValueError, match=message):
        target.write(1, {("pond", 0): maps})
    assert load_evolution(tmp_path).epochs == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_id": 3}, "class ids from 0 to 2 in `watched`, got 3"),
        ({"class_id": 2}, r"each pair once in `watched`, got \('pond', 2\) twice"),
        ({"mask": np.ones((5, 5), bool)}, r"mask of 'pond' .* \(48, 64\), got \(5, 5\)"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(tmp_path, change, message):
    first, *others = watch()
    with pytest.raises(ValueError, match=message):
        EvolutionWriter(
            tmp_path, [first._replace(**change), *others], run_id="r", network="n", data="d",
            class_names=CLASS_NAMES, epochs=1,
        )  # fmt: skip
    assert not list(tmp_path.rglob("*.json"))


def test_calls_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected `method` in \('oaa', 'integral'\), got 'cam'"):
        writer(tmp_path, method="cam")
    with pytest.raises(ValueError, match="expected `accumulated` .* got none for 'oaa'"):
        writer(tmp_path).write(1, {})
    with pytest.raises(ValueError, match="expected `epoch` of at least 1, got 0"):
        writer(tmp_path).write(0, {}, {})


# ---------------------------------------------------------------------------------------- stop


def test_stop_is_asked_for_once_and_taken_back_by_the_next_start(tmp_path):
    writer(tmp_path)
    assert not stop_requested(tmp_path)
    request_stop(tmp_path)
    request_stop(tmp_path)
    assert stop_requested(tmp_path)
    writer(tmp_path)
    assert not stop_requested(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        request_stop(tmp_path / "nope")


def test_results_are_frozen(tmp_path):
    found = load_evolution(record(tmp_path / "run", 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.epochs = ()
    assert evolution.__all__ == sorted(evolution.__all__)
