"""Tables 3.9 and 3.10: what is measured of maps of defects, and what is kept of it."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from attnviz import cam
from attnviz.data.defects import Defects
from attnviz.networks import load_network
from attnviz.tables import defects, make_table, table_options
from attnviz.tables.table import numbers


@pytest.fixture(scope="module")
def net():
    return load_network("defects")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def layers(net, cache):
    return make_table("3.10", network=net, limit=14, cache=cache, progress=False)


def _surfaces():
    return [item for item in Defects("test", 14) if item.class_ids]


def test_a_row_is_the_mean_intersection_over_union_at_the_best_threshold(net, layers):
    # Thesis Eq. 3.10, from the activation and its gradient, set by set
    for column, place in (("layer4", 4), ("layer3", 3)):
        values = np.zeros((len(_surfaces()), 99))
        for row, item in enumerate(_surfaces()):
            pieces = net.differentiable(net.preprocess(item.image))
            [gradient] = torch.autograd.grad(pieces.output[0, 0], [pieces.activations[place]])
            map = cam.layercam(pieces.activations[place].detach(), gradient)
            map = interpolate(map[None], size=(112, 112), mode="bilinear")[0, 0].double().numpy()
            true = set(zip(*np.nonzero(item.mask), strict=True))
            for k in range(0, 99, 7):
                found = (map / map.max() >= (k + 1) / 100) & (map > 0)
                found = set(zip(*np.nonzero(found), strict=True))
                values[row, k] = len(found & true) / len(found | true)
        measured = _stored(net, layers, column)
        assert measured[:, ::7] == pytest.approx(values[:, ::7], abs=2e-3)
        assert layers.rows[0][column]["ours"] == pytest.approx(
            100 * measured.mean(axis=0).max(), abs=0.006
        )


_FOUND = {}


def _stored(net, table, column):
    return _FOUND[table.n].ious["layercam", column]


@pytest.fixture(scope="module", autouse=True)
def _kept():
    # What the table was made of, as its rows show single values only.
    collect, patch = defects._layer_rows, pytest.MonkeyPatch()

    def kept(paper, found):
        _FOUND[len(found[0].image_ids)] = found[0]
        return collect(paper, found)

    patch.setattr(defects, "_layer_rows", kept)
    yield
    patch.undo()


def test_tables_have_the_rows_of_the_thesis(net, cache, layers):
    table = make_table("3.9", network=net, limit=14, cache=cache, progress=False)
    for found in (table, layers):
        result = json.loads(json.dumps(found.to_json(), allow_nan=False))
        for row, paper in zip(result["rows"], numbers()[found.id]["rows"], strict=True):
            assert list(row) == list(paper)
            for key, printed in paper.items():
                assert row[key] == printed or row[key]["paper"] == printed
        assert all(list(row) == list(found.rows[0]) for row in found.extra)
        assert found.n == len(_surfaces())
        assert "generated" in found.notes[0]
        assert len(found.to_frame(extra=True)) == len(found.rows) + len(found.extra)
    same = {row["method"]: row["miou"]["ours"] for row in table.rows}
    assert same["LayerCAM"] == layers.rows[0]["layer3"]["ours"]
    assert same["SegNet* (full)"] is None
    rates = [row["fps"]["ours"] for row in table.rows]
    assert rates[:2] == [None, None]
    assert min(rates[2:]) > 0


def test_a_threshold_held_out_is_never_better_than_the_best(layers):
    # sum over halves of m(t chosen on the other) <= sum of m(t) for either of the two
    rows = {row["method"]: row for row in layers.rows + layers.extra}
    for method in ("LayerCAM", "GradCAM", "GradCAM++"):
        for column in ("layer4", "layer3", "layer2", "layer1", "layer4+layer3"):
            best, held_out = rows[method][column], rows[f"{method}, held out"][column]
            assert held_out["ours"] <= best["ours"] <= 100


def test_a_stopped_table_goes_on_from_its_cache(net, cache, layers, monkeypatch):
    monkeypatch.setattr(defects, "stage_maps", None)  # nothing is measured again
    again = make_table("3.10", network=net, limit=14, cache=cache, progress=False)
    assert again.to_json() == layers.to_json()


def test_another_gradient_is_measured_anew(net, cache, layers):
    other = make_table(
        "3.10", network=net, limit=14, cache=cache, gradient_at="pool_up", progress=False
    )
    assert other.rows[0]["layer1"] != layers.rows[0]["layer1"]
    # after the deepest stage there is no pooling to take the gradient at
    assert other.rows[0]["layer4"] == layers.rows[0]["layer4"]


def test_pictures_without_a_true_pixel_and_ignored_pixels_do_not_count(net, tmp_path, monkeypatch):
    opened = defects.open_surfaces

    class Masked:
        def __init__(self, surface, empty):
            self.surface, self.empty = surface, empty
            self.image_id, self.defective = surface.image_id, surface.defective
            self.read = surface.read

        def read_mask(self):
            mask = self.surface.read_mask()
            return np.zeros_like(mask) if self.empty else np.where(mask == 0, 255, 1).astype("u1")

    def changed(*args, **options):
        found, notes = opened(*args, **options)
        first = next(i for i, each in enumerate(found) if each.defective)
        return [Masked(each, i == first) for i, each in enumerate(found)], notes

    monkeypatch.setattr(defects, "open_surfaces", changed)
    table = make_table("3.10", network=net, limit=14, cache=tmp_path, progress=False)
    assert table.n == len(_surfaces()) - 1
    assert any("1 defective ones have no mask" in note for note in table.notes)
    # where nothing but the defect counts, the lowest threshold finds nothing but it
    ious = _FOUND[table.n].ious["gradcam_pp", "layer4"]
    assert np.all(np.diff(ious, axis=1) <= 0)


def test_repeats_show_their_mean_and_range(tmp_path):
    options = {"limit": 16, "epochs": 1, "cache": tmp_path, "progress": False}
    twice = make_table("3.10", repeats=2, **options)
    single = [make_table("3.10", seed=seed, **options) for seed in (0, 1)]
    for column in ("layer4", "layer3"):
        values = [table.rows[0][column]["ours"] for table in single]
        cell = twice.rows[0][column]
        assert cell["ours"] == pytest.approx(np.mean(values), abs=0.011)
        assert [cell["low"], cell["high"]] == sorted(values)
    assert sum("accuracy" in note for note in twice.notes) == 2
    [run] = [path.parent for path in tmp_path.glob("*/metrics.json") if _seed(path.parent) == 1]
    weights = run / "network.safetensors"
    given = make_table("3.10", seed=1, weights=weights, limit=16, cache=tmp_path, progress=False)
    assert given.rows == single[1].rows


def _seed(run):
    return json.loads((run / "config.json").read_text())["seed"]


def test_real_tiles_are_measured_against_their_masks(real_data, net, tmp_path):
    table = make_table(
        "3.10", data="magnetic_tile", network=net, data_root=real_data, limit=12, cache=tmp_path,
        progress=False,
    )  # fmt: skip
    assert table.data == "magnetic_tile"
    assert 0 <= table.rows[0]["layer3"]["ours"] <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "voc2012"}, r"expected `data` in \('defects', .*\), got 'voc2012'"),
        ({"repeats": 0}, "expected `repeats` of at least 1, got 0"),
        ({"channels": 3}, "expected options of table 3.9 in {preset, gradient_at, .*'channels'"),
    ],
)
def test_bad_requests_are_one_line(untyped, options, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        make_table("3.9", cache=tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_a_network_that_knows_no_defects_is_refused(net, tmp_path):
    scenes = load_network("scenes_conv")
    with pytest.raises(
        ValueError, match="expected a network with a class 'defect', got scenes_conv"
    ):
        make_table("3.9", network=scenes, cache=tmp_path)
    with pytest.raises(ValueError, match="expected no `repeats`, `epochs` or `preset` with"):
        make_table("3.9", network=net, repeats=2, cache=tmp_path)


def test_both_tables_have_the_same_options():
    assert table_options("3.9") == ("preset", "gradient_at", "epochs", "repeats")
    assert table_options("3.10") == table_options("3.9")
