"""Tables of segmentation: what their networks learn from, and what is measured of them."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from attnviz.segment import LabelConfig, label_file
from attnviz.tables import Table, make_table, report, segmentation, sources, table_names
from attnviz.tables.sources import Source
from attnviz.tables.table import numbers
from attnviz.training import oaa_config

SMALL = {"limit": 16, "epochs": 2, "segment_epochs": 1, "progress": False}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(cache):
    return make_table("4.7", rule="affinity", cache=cache, **SMALL)


def test_rows_are_those_of_the_thesis_with_both_kinds_of_masks(made):
    json.dumps(made.to_json(), allow_nan=False)
    assert [row["setting"] for row in made.rows] == [
        row["setting"] for row in numbers()["4.7"]["rows"]
    ]
    for row in made.rows:
        assert 0 <= row["miou"]["low"] <= row["miou"]["ours"] <= row["miou"]["high"] <= 100
    names = [row["setting"] for row in made.extra]
    assert "10582 weak (100%), with dense CRF" in names
    assert "10582 weak (100%), its labels" in names
    assert "10582 pixel, its labels" not in names
    assert "generated" in made.notes[0]


def test_shares_of_weak_and_true_masks_are_those_of_the_row(made, cache):
    runs = [json.loads(path.read_text()) for path in cache.glob("SegmentConfig-*/config.json")]
    found = {(run["limit"], run["true_count"], run["labels"] == "true") for run in runs}
    assert found == {  # of 16: 2116, 5291 and 8466 of 10582 are 3, 8 and 13
        (3, 0, False), (8, 0, False), (13, 0, False), (16, 0, False),
        (16, 3, False), (16, 8, False), (16, 13, False), (16, 0, True),
    }  # fmt: skip


def test_everything_is_made_once(made, cache):
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    again = make_table("4.7", rule="affinity", cache=cache, **SMALL)
    assert again.to_json() == made.to_json()
    now = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    changed = {path for path in files if now[path] != files[path]}
    assert not {path.suffix for path in changed} & {".png", ".safetensors", ".json"}


def test_a_cache_that_has_moved_or_is_named_otherwise_is_taken(made, cache, tmp_path, monkeypatch):
    copy = shutil.copytree(cache, tmp_path / "copy")
    for name in ("train_segment", "write_labels", "evaluate"):
        monkeypatch.setattr(segmentation, name, None)  # nothing is made again
    monkeypatch.setattr(sources, "train_oaa", None)
    monkeypatch.chdir(tmp_path)
    for place in (copy, "copy"):
        again = make_table("4.7", rule="affinity", cache=place, **SMALL)
        assert again.to_json() == made.to_json()


def test_damaged_results_are_made_again(made, cache):
    labels, *_ = (path for path in cache.glob("LabelConfig-*") if path.is_dir())
    run = next(path for path in cache.glob("SegmentConfig-*") if path.is_dir())
    for path in (labels / "quality.json", run / "metrics.json"):
        path.write_bytes(path.read_bytes()[:5])
    again = make_table("4.7", rule="affinity", cache=cache, **SMALL)
    assert again.to_json() == made.to_json()
    assert json.loads((labels / "quality.json").read_text())
    assert json.loads((run / "metrics.json").read_text())["training_images"]


def test_stages_count_from_the_deepest_and_the_class_stays_out():
    config = oaa_config("small")
    plans = segmentation._plans("3.12", config, "scenes", None)
    stages = {row["stages"]: plans[place, ""].source.stages
              for place, row in enumerate(numbers()["3.12"]["rows"])}  # fmt: skip
    assert stages["S5"] == (-1,)
    assert stages["S5+S4+S3"] == (-1, -2, -3)
    assert stages["S1"] == (-5,)
    plans = segmentation._plans("3.11", config, "scenes", None)
    assert {place for place, _ in plans} == {0, 1, 2}  # none for ResNet-101


def test_variants_are_two_choices(cache):
    plans = segmentation._plans("4.1", oaa_config("small"), "scenes", None)
    rows = numbers()["4.1"]["rows"]
    found = {rows[place]["method"]: plan.source for (place, _), plan in plans.items()}
    assert found.pop("upper bound (full supervision)") is None
    described = {
        name: (source.oaa.drop, source.integral is None, source.maps)
        for name, source in found.items()
    }
    assert described == {
        "OAA": ("none", True, "accumulated"), "OAA++": ("image", True, "accumulated"),
        "OAA+": ("none", False, "final"), "OAA+++": ("image", False, "final"),
    }  # fmt: skip


def test_quality_of_labels_is_counted_where_they_label(tmp_path):
    class Item:
        image_id = "one"

        def read_mask(self):
            return np.array([[0, 1, 2], [0, 1, 255]], np.uint8)

    class Pictures:
        class_names = ("a", "b")

        def __len__(self):
            return 1

        def item(self, i):
            return Item()

    labels = np.array([[0, 1, 1], [255, 2, 0]], np.uint8)
    Image.fromarray(labels).save(label_file(tmp_path, "one"))
    found = segmentation._quality(Pictures(), tmp_path, progress=False)
    # counted: (0,0) right, (1,1) right, (2,1), (1,2); one of five is not labeled
    assert found == {"miou": pytest.approx((1 + 1 / 3 + 0) / 3), "labeled": 4 / 5}


def test_of_a_method_of_other_authors_only_the_seeds_are_made(cache):
    table = make_table("3.13", cache=cache, **SMALL)
    assert [row["val"] for row in table.rows] == [
        {"paper": row["val"], "ours": None, "low": None, "high": None}
        for row in numbers()["3.13"]["rows"]
    ]
    names = [row["method"] for row in table.extra]
    assert names == ["DGCN-CAM, its labels", "DGCN-LayerCAM, its labels"]
    assert "quoted" in " ".join(table.notes)


def test_networks_without_such_stages_leave_the_row_out(cache):
    config = oaa_config("small", limit=16, epochs=2)
    label = LabelConfig(rule="affinity")
    maker = segmentation._Maker(cache, None, label, {"epochs": 1}, False, False, False, 0, False)
    source = Source(config, maps="final", method="layercam", stages=(-6,))
    assert maker.scores(segmentation.Plan(source, "scenes"), config) is None


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("4.1", {"data": "cub"}, "expected `data` with masks of several classes for table 4.1"),
        ("4.1", {"repeats": 0}, "expected `repeats` of at least 1, got 0"),
        ("4.11", {"measure": "segmentation"}, "expected `measure` 'maps' for table 4.11"),
        ("4.5", {"measure": "boxes"}, "expected `measure` in"),
        ("4.1", {"rule": "none"}, "expected `rule` in"),
    ],
)
def test_bad_values_are_named(id, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_table(id, cache=tmp_path, **SMALL | options)


def test_report_has_every_table_or_says_why_not(tmp_path, monkeypatch):
    made = []

    def make(id, **options):
        made.append((id, options))
        if id == "3.2":
            raise ValueError("expected <b>more</b>, got less")
        row = {"method": "<i>mine</i>", "miou": {"paper": 1.0, "ours": 2.0, "low": 1, "high": 3}}
        return Table(id=id, title=f"title {id}", data="scenes", network="n", preset="p", seed=0,
                     versions={"attnviz": "0"}, n=5, rows=[row], extra=[], notes=[],
                     weights={})  # fmt: skip

    monkeypatch.setattr(report, "make_table", make)
    found = report.write_report(tmp_path / "all.html", cache=tmp_path, segment_epochs=7)
    names = [name for name, _ in table_names()]
    assert [id for id, _ in made] == names
    assert found["missing"] == {"3.2": "expected <b>more</b>, got less"}
    assert set(found["tables"]) == set(names) - {"3.2"}
    page = (tmp_path / "all.html").read_text()
    assert "<i>mine" not in page
    assert "expected &lt;b&gt;more" in page
    assert all(f'id="t{name}"' in page for name in names)
    assert not re.search(r"https?://|src=", page)
    options = dict(made)
    assert options["4.5"]["segment_epochs"] == 7
    assert "segment_epochs" not in options["3.1"]
    assert options["3.1"]["limit"] == report.QUICK["3"]["limit"]
    made.clear()
    report.write_report(tmp_path / "all.html", limit=9)
    assert {options.get("limit") for _, options in made} == {9}
    assert not any("epochs" in options for _, options in made)
