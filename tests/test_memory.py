"""The memory against a slow dictionary, and its files against kills and damage."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attnviz.memory import FILE, AttentionMemory, place

GRIDS = {"a": (2, 3), "bird/ö 1": (1, 2), "none": (3, 3), "c": (2, 2)}
LABELS = {"a": (4, 0), "bird/ö 1": (7,), "none": (), "c": (1, 2, 3)}
KEYS = [(image_id, c) for image_id, classes in LABELS.items() for c in classes]


def _memory(**options):
    return AttentionMemory(GRIDS, LABELS, run_id="run 1", **options)


class Slow:
    """What a memory should hold, from all visits at once."""

    def __init__(self, rule, visits):
        self.rule, self.visits = rule, visits

    def of(self, key):
        return [(m, v, step) for k, m, v, step in self.visits if k == key]

    def value(self, key, i, j):
        seen = [m[i, j].item() for m, v, _ in self.of(key) if v[i, j]]
        if not seen:
            return 0.0
        return max(seen) if self.rule == "max" else sum(seen) / len(seen)

    def map(self, key):
        height, width = GRIDS[key[0]]
        return torch.tensor(
            [[self.value(key, i, j) for j in range(width)] for i in range(height)]
        ).reshape(height, width)


def _visits(seed, count, cropped=True):
    """Visits of random keys; positive somewhere; steps without a repeat."""
    source = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    visits = []
    for step in source.sample(range(1000), count):
        key = source.choice(KEYS)
        grid = GRIDS[key[0]]
        values = torch.rand(grid, generator=generator) * 0.99 + 0.01
        valid = torch.ones(grid, dtype=torch.bool)
        if cropped and source.random() < 0.5:
            valid = torch.rand(grid, generator=generator) < 0.7
            valid[0, 0] = True
        visits.append((key, values, valid, step))
    return visits


def _fed(visits, **options):
    memory = _memory(**options)
    for (image_id, class_id), values, valid, step in visits:
        assert memory.update(image_id, class_id, values, valid, step=step)
    return memory


def _state(memory):
    return {key: (memory[key].tolist(), memory.count(*key)) for key in memory}


# ----------------------------------------------------------------------------------- mapping


def test_it_is_a_mapping_of_image_and_class():
    memory = _memory()
    assert list(memory) == KEYS
    assert len(memory) == 6
    assert ("a", 4) in memory
    assert ("a", 5) not in memory
    assert ("x", 4) not in memory
    assert memory.image_ids == tuple(GRIDS)
    assert [memory.grid(k) for k in GRIDS] == list(GRIDS.values())
    assert [memory.class_ids(k) for k in GRIDS] == list(LABELS.values())
    assert torch.equal(memory["bird/ö 1", 7], torch.zeros(1, 2))
    assert memory["bird/ö 1", 7].dtype == torch.float32
    assert repr(memory) == "AttentionMemory(4 images, 6 maps, max, run 'run 1')"


def test_what_is_read_is_a_copy():
    memory = _fed(_visits(0, 10))
    before = _state(memory)
    for key in memory:
        memory[key].fill_(0.5)
    assert _state(memory) == before


@given(st.integers(0, 10_000), st.integers(0, 30), st.sampled_from(["max", "mean"]))
@settings(max_examples=60, deadline=None)
def test_it_holds_what_a_slow_dictionary_holds(seed, count, rule):
    visits = _visits(seed, count)
    memory, slow = _fed(visits, rule=rule, keep_last=True), Slow(rule, visits)
    # float16: half a unit in the last place, for a mean once in each step
    tolerance = 2.0**-12 * (1 if rule == "max" else max(1, count))
    for key in KEYS:
        torch.testing.assert_close(memory[key], slow.map(key), rtol=0, atol=tolerance)
        own = slow.of(key)
        assert memory.count(*key) == len(own)
        last = memory.last(*key)
        assert (last is None) == (not own)
        for i, j in np.ndindex(*GRIDS[key[0]]) if own else ():
            seen = [m[i, j].item() for m, v, _ in own if v[i, j]]
            assert abs(last[i, j].item() - (seen[-1] if seen else 0)) <= 0.5 / 255 + 1e-6


def test_eight_bits_hold_every_step_of_255_exactly():
    values = torch.arange(256).reshape(16, 16) / 255
    memory = AttentionMemory({"a": (16, 16)}, {"a": [0]}, run_id="r", dtype="uint8")
    memory.update("a", 0, values)
    assert torch.equal(memory["a", 0], values)


def test_the_order_of_visits_has_no_influence_on_a_maximum():
    visits = _visits(3, 25)
    reference = _state(_fed(visits))
    for seed in range(5):
        assert _state(_fed(random.Random(seed).sample(visits, len(visits)))) == reference


def test_negative_zero_is_not_the_largest_value():
    memory = _memory()
    memory.update("bird/ö 1", 7, torch.tensor([[0.25, 1.0]]))
    other = memory.empty()
    other.update("bird/ö 1", 7, torch.tensor([[-0.0, 0.5]]))
    memory.merge(other)
    memory.update("bird/ö 1", 7, torch.tensor([[-0.0, 0.5]]))
    assert torch.equal(memory["bird/ö 1", 7], torch.tensor([[0.25, 1.0]]))


def test_unseen_cells_stay_as_they_are():
    memory = _memory(rule="mean", keep_last=True)
    memory.update("bird/ö 1", 7, torch.tensor([[1.0, 1.0]]))
    memory.update("bird/ö 1", 7, torch.tensor([[0.0, 0.5]]), torch.tensor([[False, True]]))
    memory.update("bird/ö 1", 7, torch.tensor([[0.5, 0.0]]), torch.tensor([[True, True]]))
    assert memory["bird/ö 1", 7].tolist() == [[0.75, 0.5]]  # two maps saw the left cell
    memory.update("bird/ö 1", 7, torch.tensor([[1.0, 1.0]]), torch.tensor([[False, True]]))
    torch.testing.assert_close(
        memory.last("bird/ö 1", 7), torch.tensor([[0.5, 1.0]]), rtol=0, atol=0.002
    )


def test_a_map_without_attention_is_skipped():
    memory = _memory(keep_last=True)
    assert not memory.update("a", 4, torch.zeros(2, 3))
    seen = torch.zeros(2, 3, dtype=torch.bool)
    assert not memory.update("a", 4, torch.ones(2, 3), seen)
    assert memory.count("a", 4) == 0
    assert memory.last("a", 4) is None


def test_bad_maps_and_keys_are_refused_and_change_nothing(untyped):
    memory = _fed(_visits(1, 20))
    before = _state(memory)
    with pytest.raises(KeyError, match="expected an image of this memory, got 'x'; it has 4"):
        memory.update("x", 0, torch.rand(2, 3))
    with pytest.raises(KeyError, match=r"a class of 'a' in \(4, 0\), got 5"):
        memory.update("a", 5, torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"a map of \(2, 3\) for 'a', got \(3, 2\)"):
        memory.update("a", 4, torch.rand(3, 2))
    with pytest.raises(ValueError, match=r"a map in \[0, 1\] for 'a', got values from 0 to 2"):
        memory.update("a", 4, torch.tensor([[0, 1, 2.0], [0, 0, 0]]))
    for bad in (float("nan"), -0.1, float("inf")):
        with pytest.raises(ValueError, match=r"a map in \[0, 1\]"):
            memory.update("a", 4, torch.tensor([[0, bad, 0.5], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"`valid` of \(2, 3\) like the map, got \(3, 2\)"):
        memory.update("a", 4, torch.rand(2, 3), torch.ones(3, 2, dtype=torch.bool))
    assert _state(memory) == before


def test_a_memory_is_described_consistently(untyped):
    with pytest.raises(ValueError, match="a grid and labels of every image, got .* for 'b'"):
        AttentionMemory({"a": (1, 1), "b": (1, 1)}, {"a": [0]}, run_id="r")
    with pytest.raises(ValueError, match=r"each class of 'a' once, got \[3, 3\]"):
        AttentionMemory({"a": (1, 1)}, {"a": [3, 3]}, run_id="r")
    with pytest.raises(ValueError, match=r"`grids\['a'\]` as \(height, .* got \(0, 4\)"):
        AttentionMemory({"a": (0, 4)}, {"a": [3]}, run_id="r")
    with pytest.raises(ValueError, match=r"`rule` in \('max', 'mean'\), got 'sum'"):
        _memory(rule="sum")
    with pytest.raises(ValueError, match=r"`dtype` in \('float16', 'uint8'\), got 'float64'"):
        _memory(dtype="float64")
    with pytest.raises(ValueError, match="'float16' for the mean, got 'uint8'"):
        _memory(rule="mean", dtype="uint8")
    with pytest.raises(ValueError, match="made with `keep_last`"):
        _memory().last("a", 4)


def test_a_memory_without_images_works(tmp_path):
    memory = AttentionMemory({}, {}, run_id="r")
    memory.save(tmp_path)
    assert list(AttentionMemory.load(tmp_path)) == []


# ---------------------------------------------------------------------------------- fallback


def test_fallback_fills_only_what_was_never_accepted():
    memory = _memory()
    memory.update("a", 4, torch.full((2, 3), 0.5))
    assert memory.missing() == [key for key in KEYS if key != ("a", 4)]
    assert not memory.fill("a", 4, torch.ones(2, 3))
    assert memory.fill("c", 2, torch.full((2, 2), 0.25))
    assert torch.equal(memory["a", 4], torch.full((2, 3), 0.5))
    assert torch.equal(memory["c", 2], torch.full((2, 2), 0.25))
    assert memory.count("c", 2) == 0
    assert ("c", 2) not in memory.missing()
    with pytest.raises(ValueError, match="before `fill`"):
        memory.merge(memory.empty())


@pytest.mark.parametrize("rule", ["max", "mean"])
def test_an_accepted_map_replaces_a_fallback(rule, tmp_path):
    memory = _memory(rule=rule)
    memory.fill("c", 2, torch.ones(2, 2))
    memory.save(tmp_path)
    memory = AttentionMemory.load(tmp_path)
    memory.update("c", 2, torch.full((2, 2), 0.25))
    assert torch.equal(memory["c", 2], torch.full((2, 2), 0.25))
    assert memory.count("c", 2) == 1


# ------------------------------------------------------------------------------------ merging


@given(st.integers(0, 10_000), st.integers(0, 24), st.integers(1, 4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_merged_maxima_equal_one_memory_of_all_visits(seed, count, parts, backwards):
    visits = _visits(seed, count)
    for dtype in ("float16", "uint8"):
        options = {"dtype": dtype, "keep_last": True}
        # one process sees its visits in the order of their steps
        whole = _fed(sorted(visits, key=lambda visit: visit[-1]), **options)
        memories = [
            _fed(sorted(visits[i::parts], key=lambda visit: visit[-1]), **options)
            for i in range(parts)
        ]
        merged = _memory(**options)
        for memory in reversed(memories) if backwards else memories:
            merged.merge(memory)
        assert _state(merged) == _state(whole)


@given(st.integers(0, 10_000), st.integers(0, 24), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_merged_means_equal_one_memory_of_all_visits(seed, count, parts):
    visits = _visits(seed, count, cropped=seed % 2 == 0)
    whole = _fed(visits, rule="mean")
    merged = _memory(rule="mean")
    for i in range(parts):
        merged.merge(_fed(visits[i::parts], rule="mean"))
    for key in KEYS:
        assert merged.count(*key) == whole.count(*key)
        tolerance = 2.0**-12 * 2 * (count + parts)
        torch.testing.assert_close(merged[key], whole[key], rtol=0, atol=tolerance)
    # and it goes on as one: the counts of the cells are right as well
    more = _visits(seed + 1, 5)
    for key, values, valid, step in more:
        merged.update(*key, values, valid, step=step)
    slow = Slow("mean", visits + more)
    for key in KEYS:
        torch.testing.assert_close(
            merged[key], slow.map(key), rtol=0, atol=2.0**-12 * 2 * (count + parts + 5)
        )


@pytest.mark.parametrize("mine_first", [True, False])
def test_the_later_last_map_survives_a_merge(mine_first):
    early, late = _memory(keep_last=True), _memory(keep_last=True)
    early.update("c", 1, torch.full((2, 2), 0.2), step=7)
    early.update("c", 3, torch.full((2, 2), 0.2), step=7)
    late.update("c", 1, torch.full((2, 2), 0.8), step=8)
    first, second = (early, late) if mine_first else (late, early)
    first.merge(second)
    assert first.last("c", 1)[0, 0].item() == pytest.approx(0.8)
    assert first.last("c", 3)[0, 0].item() == pytest.approx(0.2)
    assert first.last("c", 2) is None


def test_an_empty_memory_takes_nothing_along():
    memory = _fed(_visits(5, 20), keep_last=True)
    before = _state(memory)
    fresh = memory.empty()
    assert all(fresh.count(*key) == 0 and fresh.last(*key) is None for key in fresh)
    assert fresh.missing() == KEYS
    fresh.update("a", 4, torch.ones(2, 3))
    assert _state(memory) == before
    memory.merge(fresh)
    assert torch.equal(memory["a", 4], torch.ones(2, 3))


def test_memories_of_something_else_do_not_merge():
    memory = _memory()
    other = AttentionMemory(GRIDS, LABELS, run_id="run 2")
    with pytest.raises(ValueError, match=r"made like .*'run 1'\), got .*'run 2'\)"):
        memory.merge(other)
    with pytest.raises(ValueError, match="to merge made like"):
        memory.merge(_memory(rule="mean"))
    with pytest.raises(ValueError, match="to merge made like"):
        memory.merge(_memory(dtype="uint8"))
    labels = LABELS | {"c": (1, 2, 5)}
    with pytest.raises(ValueError, match="the same images and labels"):
        memory.merge(AttentionMemory(GRIDS, labels, run_id="run 1"))


# -------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "uint8", "keep_last": True},
        {"rule": "mean"},
        {"rule": "mean", "keep_last": True},
    ],
)
def test_a_snapshot_gives_back_the_same_memory_that_goes_on(options, tmp_path):
    visits = _visits(8, 30)
    memory = _fed(visits[:20], **options)
    memory.save(tmp_path)
    opened = AttentionMemory.load(tmp_path, "run 1")
    assert _state(opened) == _state(memory)
    assert opened.image_ids == memory.image_ids
    for key, values, valid, step in visits[20:]:
        opened.update(*key, values, valid, step=step)
    assert _state(opened) == _state(_fed(visits, **options))
    if "keep_last" in options:
        whole = _fed(visits, **options)
        assert [opened.last(*k) is None for k in KEYS] == [whole.last(*k) is None for k in KEYS]
        assert all(torch.equal(opened.last(*k), whole.last(*k)) for k in KEYS if opened.count(*k))


def test_nothing_on_the_disk_changes_before_save(tmp_path):
    memory = _fed(_visits(2, 20))
    memory.save(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    opened = AttentionMemory.load(tmp_path)
    other = AttentionMemory.load(tmp_path)
    for key, values, valid, _ in _visits(9, 30):
        opened.update(*key, values, valid)
    assert (tmp_path / FILE).read_bytes() == content
    assert _state(other) == _state(memory)
    opened.save(tmp_path)  # replaces the file that it is mapped from
    assert _state(AttentionMemory.load(tmp_path)) == _state(opened)
    assert _state(other) == _state(memory)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_equal_memories_are_equal_files_that_safetensors_reads(tmp_path):
    for name in ("x", "y"):
        _fed(_visits(2, 20)).save(tmp_path / name)
    assert (tmp_path / "x" / FILE).read_bytes() == (tmp_path / "y" / FILE).read_bytes()
    arrays = safetensors.numpy.load_file(tmp_path / "x" / FILE)
    cells = np.concatenate([_fed(_visits(2, 20))[key].numpy().ravel() for key in KEYS])
    assert np.array_equal(arrays["cells"].astype(np.float32), cells)


def test_another_runs_memory_is_never_taken(tmp_path):
    _memory().save(tmp_path)
    with pytest.raises(ValueError, match="the memory of run 'run 2' .* that of run 'run 1'"):
        AttentionMemory.load(tmp_path, "run 2")


def test_a_missing_memory_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"found no {FILE} there"):
        AttentionMemory.load(tmp_path / "nothing")


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path):
    _fed(_visits(2, 20), keep_last=True).save(tmp_path)
    path = tmp_path / FILE
    content = path.read_bytes()
    source = random.Random(0)
    broken = [content[:length] for length in (0, 4, 8, 100, len(content) - 1)]
    broken += [content + b"\0", b"hello", bytes(len(content))]
    for at in [0, 7, 8, 20, *source.sample(range(len(content)), 150)]:
        changed = bytearray(content)
        changed[at] ^= 1 << source.randrange(8)
        broken.append(bytes(changed))
    for each in broken:
        path.write_bytes(each)
        with pytest.raises(ValueError, match="expected an attention memory, got") as caught:
            AttentionMemory.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_another_format_is_refused(tmp_path):
    safetensors.numpy.save_file({"cells": np.zeros(3)}, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(ValueError, match="its format is 'pt', not 'attnviz memory 1'"):
        AttentionMemory.load(tmp_path)


def test_a_failed_save_leaves_the_old_snapshot(tmp_path, monkeypatch):
    memory = _fed(_visits(2, 20))
    memory.save(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    memory.update("a", 4, torch.ones(2, 3))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        memory.save(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


_KILLED = """
import os, random, signal, sys, threading, time
import torch
from tqdm import tqdm
from attnviz.memory import AttentionMemory

def _save_for_ever(folder, pipe):
    tqdm.set_lock(threading.RLock())  # not the one the parent would wait for after the kill
    ids = [str(i) for i in range(400)]
    memory = AttentionMemory(
        dict.fromkeys(ids, (30, 30)), dict.fromkeys(ids, [0]), run_id="r", keep_last=True
    )
    for step in range(1, 256):
        for image_id in ("0", "199", "399"):
            memory.update(image_id, 0, torch.full((30, 30), step / 255), step=step)
        memory.save(folder)
        os.write(pipe, bytes([step]))

source = random.Random(4)
for turn in range(10):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _save_for_ever(sys.argv[1], writer)
        os._exit(0)
    os.close(writer)
    told = b""
    while len(told) <= turn:  # killed after another number of saves each time
        told += os.read(reader, 1)
    time.sleep(source.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told += os.read(reader, 1000)
    os.close(reader)
    memory = AttentionMemory.load(sys.argv[1], "r")
    steps = set()
    for image_id in ("0", "199", "399"):
        maps = memory[image_id, 0], memory.last(image_id, 0)
        steps |= {memory.count(image_id, 0)}
        steps |= {round(255 * value) for each in maps for value in each.unique().tolist()}
    print(told[-1], *steps, flush=True)  # a bar in the next child would print it again
"""


def test_a_process_killed_while_saving_leaves_a_whole_snapshot(tmp_path):
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [[int(part) for part in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == 10
    for told, *steps in lines:
        assert len(steps) == 1  # one state, not a mixture
        assert steps[0] in (told, told + 1)  # what was said to be saved is there
    assert len({steps[0] for _, *steps in lines}) > 1


def test_a_large_memory_stays_small_on_the_disk(tmp_path):
    count = 4000
    grids = {f"n{i % 1000:08d}/n{i % 1000:08d}_{i}": (28, 28) for i in range(count)}
    memory = AttentionMemory(grids, {k: [i % 1000] for i, k in enumerate(grids)}, run_id="r")
    memory.save(tmp_path)
    per_map = (tmp_path / FILE).stat().st_size / count
    assert per_map < 2 * 784 + 60  # two bytes per cell, less than sixty for the index
    assert per_map * 1_281_167 < 2.5e9


def test_loading_does_not_read_the_maps_into_memory(tmp_path):
    AttentionMemory(
        {str(i): (100, 100) for i in range(2000)}, {str(i): [0] for i in range(2000)}, run_id="r"
    ).save(tmp_path)  # 40 MB
    code = """
import re, sys, torch
from pathlib import Path
from attnviz.memory import AttentionMemory
def _private():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Anonymous:\\s+(\\d+)", text)[1]) / 1e3
before = _private()
memory = AttentionMemory.load(sys.argv[1])
opened = _private()
memory.update("3", 0, torch.ones(100, 100))
changed = _private()
held = memory.empty()
for key in held:  # which is what reading them all would take
    held.update(*key, torch.ones(100, 100))
print(opened - before, changed - opened, _private() - changed)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    opened, changed, held = map(float, done.stdout.split())
    assert held > 35  # the measure sees what is in memory
    assert opened < 15
    assert changed < 5


# ----------------------------------------------------------------------------------- pictures


def test_pictures_hold_the_maps_in_eight_bits(tmp_path):
    memory = _fed(_visits(6, 30))
    memory.export_png(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "a_4.png", "a_0.png", "bird%2F%C3%B6 1_7.png", "c_1.png", "c_2.png", "c_3.png"
    }  # fmt: skip
    with Image.open(tmp_path / "a_4.png") as picture:
        assert picture.mode == "L"
        pixels = np.asarray(picture)
    assert pixels.tolist() == [[round(255 * v) for v in row] for row in memory["a", 4].tolist()]


def test_no_image_id_writes_outside_the_folder(tmp_path):
    memory = AttentionMemory({"../x": (1, 1)}, {"../x": [0]}, run_id="r")
    memory.export_png(tmp_path / "maps")
    assert [path.name for path in tmp_path.rglob("*.png")] == ["..%2Fx_0.png"]
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------- placement


@pytest.mark.parametrize("grid", [(5, 7), (28, 38), (37, 37)])
def test_a_whole_view_is_placed_bit_for_bit(grid, generator):
    values = torch.rand(grid, generator=generator)
    placed, valid = place(values)
    assert torch.equal(placed, values)
    assert valid.all()
    placed, valid = place(values, flipped=True)
    assert torch.equal(placed, values.flip(-1))


def test_a_crop_along_cells_lands_on_its_cells(generator):
    values = torch.rand(3, 4, generator=generator)
    # rows 1 to 4 and columns 2 to 6 of a grid of 8 x 10
    placed, valid = place(values, (0.2, 0.125, 0.6, 0.5), grid=(8, 10))
    expected, seen = torch.zeros(8, 10), torch.zeros(8, 10, dtype=torch.bool)
    expected[1:4, 2:6], seen[1:4, 2:6] = values, True
    assert torch.equal(placed, expected)
    assert torch.equal(valid, seen)
    mirrored, _ = place(values.flip(-1), (0.2, 0.125, 0.6, 0.5), flipped=True, grid=(8, 10))
    assert torch.equal(mirrored, expected)


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_scaled_crop_equals_bilinear_interpolation_by_hand(seed, flipped):
    source = random.Random(seed)
    height, width = source.randint(1, 5), source.randint(1, 5)
    values = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)).double()
    x0, y0 = source.uniform(-0.2, 0.5), source.uniform(-0.2, 0.5)
    x1, y1 = x0 + source.uniform(0.2, 0.8), y0 + source.uniform(0.2, 0.8)
    placed, valid = place(values, (x0, y0, x1, y1), flipped, (6, 8))
    for i in range(6):
        for j in range(8):
            x, y = (j + 0.5) / 8, (i + 0.5) / 6
            inside = x0 <= x <= x1 and y0 <= y <= y1
            assert bool(valid[i, j]) is inside
            if not inside:
                assert placed[i, j] == 0
                continue
            u, v = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
            u = min(max((1 - u if flipped else u) * width - 0.5, 0), width - 1)
            v = min(max(v * height - 0.5, 0), height - 1)
            a, b = int(u), int(v)
            c, d = min(a + 1, width - 1), min(b + 1, height - 1)
            p, q = u - a, v - b
            top = (1 - p) * values[b, a] + p * values[b, c]
            bottom = (1 - p) * values[d, a] + p * values[d, c]
            assert placed[i, j].item() == pytest.approx(
                ((1 - q) * top + q * bottom).item(), abs=1e-8
            )


def test_placed_crops_accumulate_into_one_image(generator):
    truth = torch.rand(4, 8, generator=generator) * 0.9 + 0.1
    memory = AttentionMemory({"a": (4, 8)}, {"a": [0]}, run_id="r", dtype="float16")
    memory.update("a", 0, *place(truth[:, :4], (0, 0, 0.5, 1), grid=(4, 8)))
    assert torch.equal(memory["a", 0][:, 4:], torch.zeros(4, 4))
    memory.update("a", 0, *place(truth[:, 4:].flip(-1), (0.5, 0, 1, 1), True, (4, 8)))
    torch.testing.assert_close(memory["a", 0], truth, rtol=0, atol=2.0**-12)


def test_an_empty_box_is_refused():
    with pytest.raises(ValueError, match=r"`box` as \(x0, y0, x1, y1\) in shares"):
        place(torch.rand(2, 2), (0.5, 0.0, 0.5, 1.0))


def test_the_header_says_what_the_file_is(tmp_path):
    _memory(rule="mean").save(tmp_path)
    with (tmp_path / FILE).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    said = header["__metadata__"]
    assert (said["run_id"], said["rule"]) == ("run 1", "mean")
