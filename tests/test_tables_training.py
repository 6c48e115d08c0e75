"""Tables of chapters 4 and 5: what they train, measure and keep."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from attnviz.cli import main
from attnviz.data.masks import MaskedImage
from attnviz.data.scenes import CLASS_NAMES
from attnviz.metrics import split_half
from attnviz.tables import accumulation, make_table, sources, table_options
from attnviz.tables.table import numbers
from attnviz.training import oaa_config, runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    table = make_table("4.11", limit=24, epochs=2, cache=cache, progress=False)
    return table, cache


def test_table_has_the_rows_of_the_thesis_with_an_interval(made):
    table, _ = made
    result = json.loads(json.dumps(table.to_json(), allow_nan=False))
    assert [row["method"] for row in result["rows"]] == ["CAM", "OAA", "OAA-drop"]
    for row, paper in zip(result["rows"], numbers()["4.11"]["rows"], strict=True):
        assert list(row) == list(paper)
        assert row["recall"]["paper"] == paper["recall"]
        cell = row["miou"]
        assert 0 <= cell["low"] <= cell["ours"] <= cell["high"] <= 100
    assert "generated" in table.notes[0]
    assert "4.11" in table._repr_html_()


def test_recall_of_each_class_has_the_columns_of_the_thesis_and_those_of_the_data(made):
    _, cache = made
    table = make_table("4.13", limit=24, epochs=2, cache=cache, progress=False)
    json.dumps(table.to_json(), allow_nan=False)
    assert [row["method"] for row in table.rows][:3] == ["CAM", "OAA", "OAA++"]
    for row in table.rows[:3]:
        classes = [row[name]["ours"] for name in CLASS_NAMES]
        known = [value for value in classes if value is not None]
        assert row["class_mean_computed"]["ours"] == pytest.approx(np.mean(known), abs=0.01)
        assert row["aeroplane"]["paper"] > 0
        assert row["aeroplane"]["ours"] is None


def _pictures(folder, count=4):
    for number in range(count):
        place = folder / ("ox" if number % 2 else "cat")
        place.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (32, 40, 3), np.uint8)
        Image.fromarray(noise).save(place / f"{number}.png")
    return folder


def test_cache_knows_pictures_classes_and_weights(tmp_path):
    def folder_of(data, weights="auto"):
        config = oaa_config(data=str(data), weights=str(weights))
        return sources.cache_for(tmp_path, config, None)

    data = _pictures(tmp_path / "a" / "set")
    same = _pictures(tmp_path / "b" / "set")
    before = folder_of(data)
    assert folder_of(same) == before
    (same / "ox" / "1.png").rename(same / "cat" / "1.png")
    assert folder_of(same) != before
    Image.new("RGB", (40, 32)).save(data / "ox" / "1.png")
    replaced = folder_of(data)
    weights = tmp_path / "weights.pt"
    found = {before, replaced}
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        found |= {folder_of(data, weights), folder_of("scenes", weights)}
    assert len(found) == 6
    assert folder_of("scenes") == tmp_path


def test_cache_knows_masks(real_data, tmp_path, monkeypatch):
    config = oaa_config(data="voc2012", limit=8)
    before = sources.cache_for(tmp_path, config, real_data)
    read = MaskedImage.read_mask
    monkeypatch.setattr(MaskedImage, "read_mask", lambda item: np.minimum(read(item), 1))
    assert sources.cache_for(tmp_path, config, real_data) != before


def test_second_table_waits_for_the_first(tmp_path, capsys):
    def make():
        time.sleep(1)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "metrics.json").write_text(f'{{"made": {time.monotonic()}}}')

    path = tmp_path / "run" / "metrics.json"
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(sources.result, path, make, True) for _ in range(2)]
    assert both[0].result() == both[1].result()
    assert capsys.readouterr().err.count("waiting for another process with") == 1


def test_finished_trainings_are_taken_as_they_are(made, monkeypatch):
    table, cache = made
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    again = make_table("4.11", limit=24, epochs=2, cache=cache, progress=False)
    assert again.to_json() == table.to_json()
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == files


def test_repeats_show_their_mean_and_range(made, monkeypatch):
    table, cache = made
    twice = make_table("4.11", limit=24, epochs=2, repeats=2, cache=cache, progress=False)
    other = make_table("4.11", limit=24, epochs=2, seed=1, cache=cache, progress=False)
    for row, first, second in zip(twice.rows, table.rows, other.rows, strict=True):
        values = [first["recall"]["ours"], second["recall"]["ours"]]
        assert row["recall"]["ours"] == pytest.approx(np.mean(values), abs=0.011)
        assert [row["recall"]["low"], row["recall"]["high"]] == sorted(values)


def test_boxes_of_both_branches_are_those_of_the_run(made):
    _, cache = made
    table = make_table("4.14", limit=24, epochs=2, cache=cache, progress=False)
    runs = [json.loads(path.read_text()) for path in cache.glob("OAAConfig-*/metrics.json")]
    [found] = [run["localization"] for run in runs if "localization" in run]
    assert table.n == found["cam"]["images"]
    for row, name in ((table.rows[0], "cam"), (table.rows[-1], "oaa")):
        assert row["loc1"]["ours"] == pytest.approx(found[name]["loc1"]["score"], abs=0.006)
    assert table.rows[1]["loc1"] == {"paper": 45.92, "ours": None, "low": None, "high": None}


def test_overlap_is_that_of_the_labels_drawn_from_the_maps():
    class Pictures:
        class_names = ("a", "b")

        def mask(self, i, class_id):
            mask = np.zeros((4, 4), np.uint8)
            mask[class_id * 2 : class_id * 2 + 2] = 1
            mask[3, 3] = 255
            return mask

    maps = {0: torch.linspace(1, 0, 16).reshape(4, 4), 1: torch.linspace(0, 0.8, 16).reshape(4, 4)}
    counts = accumulation._counted(Pictures(), 0, maps)
    truth = np.repeat([1, 1, 2, 2], 4)
    for place, threshold in enumerate(accumulation._BACKGROUND):
        labels = []
        for a, b in zip(maps[0].flatten().tolist(), maps[1].flatten().tolist(), strict=True):
            best = 1 if a >= b else 2
            labels.append(best if max(a, b) > threshold else 0)
        for label in range(3):
            pairs = list(zip(labels, truth.tolist(), strict=True))[:-1]  # the last is ignored
            right = sum(found == label == true for found, true in pairs)
            predicted = sum(found == label for found, _ in pairs)
            true = sum(true == label for _, true in pairs)
            assert counts[place, label].tolist() == [right, predicted, true]


def test_background_threshold_is_that_of_the_other_half():
    ids = [f"picture-{i}" for i in range(20)]
    half = split_half(ids)
    counts = np.zeros((20, len(accumulation._BACKGROUND), 2, 3), np.int32)
    counts[..., 1:] = 10  # predicted and true pixels
    counts[half, 3, :, 0] = 10  # the first half is right at one threshold
    counts[~half, 5, :, 0] = 10  # the other at another
    measured = accumulation._Measured(ids, counts, *(np.zeros(20),) * 3)
    assert measured.overlaps()[0] == 0  # each is measured where the other is right
    counts[..., 0] = 0
    counts[:, 7, :, 0] = 10
    assert measured.overlaps()[0] == pytest.approx(100)


def test_table_of_decisions_has_the_steps_of_the_network(tmp_path):
    given = {"limit": 2, "decisions": 2, "cache": tmp_path, "progress": False}
    table = make_table("5.1", **given)
    rows = [row for row in table.rows if row["dataset"] == "ILSVRC"]
    assert [row["strategy"] for row in rows] == ["AA", "MA", "AG", "MG"]
    for row in rows:
        assert all(-1 <= row[step]["ours"] <= 1 for step in ("T->S5", "S2->S1"))
    zero = [row for row in table.extra if "zero" in row["dataset"]]
    assert len(zero) == 4
    assert make_table("5.1", **given).to_json() == table.to_json()


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("4.5", {"methods": ["cam"]}, "expected options of table 4.5 in .* got 'methods'"),
        ("3.1", {"repeats": 2}, "expected options of table 3.1 in .* got 'repeats'"),
    ],
)
def test_options_of_another_chapter_are_refused(id, options, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        make_table(id, cache=tmp_path, **options)


@pytest.mark.parametrize("name", ["limit", "repeats"])
@pytest.mark.parametrize("value", [2.5, True, "2"])
def test_counts_are_whole_numbers(name, value, tmp_path, untyped):
    with pytest.raises(TypeError, match=f"expected `{name}` as a whole number, got {value!r}"):
        make_table("4.5", cache=tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("4.5", {"repeats": 0}, "expected `repeats` of at least 1"),
        ("4.5", {"preset": "released"}, "expected no `preset` with the small network of scenes"),
        ("4.5", {"preset": "x", "network": "vgg16"}, "expected `preset` in .*, got 'x'"),
        ("4.5", {"data": "ilsvrc"}, "expected `data` in .* labeled pictures for table 4.5"),
        ("4.11", {"limit": 0}, "expected `limit` of at least 1"),
        ("5.1", {"decisions": 0}, "expected `decisions` of at least 1"),
        ("5.1", {"data": "coco"}, "expected `data` in .* for table 5.1"),
        ("4.15", {}, "expected the number of a table in .* the nearest are"),
    ],
)
def test_bad_values_are_named(id, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_table(id, cache=tmp_path, **options)


def test_options_are_those_of_the_chapter():
    given = {"preset", "epochs", "repeats", "measure", "rule", "segment_epochs", "workers"}
    assert set(table_options("4.5")) == given
    assert set(table_options("5.1")) == {"top", "decisions"}


def test_command_names_an_option_that_does_not_belong(tmp_path, capsys):
    assert main(["table", "4.11", "--batch", "4", "--cache", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_knows_a_folder_that_has_moved_but_no_other_of_its_name(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name / "labels").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    here, other = tmp_path / "a" / "labels", tmp_path / "b" / "labels"
    assert runs._equal("a/labels", str(here))
    assert runs._equal(str(tmp_path / "gone" / "labels"), str(here))
    assert not runs._equal(str(other), str(here))
    assert not runs._equal(str(tmp_path / "gone" / "more"), str(here))
    assert not runs._equal("scenes", "voc2012")
