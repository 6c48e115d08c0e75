import numpy as np
import pytest
import torch
from test_stages import _trace
from torch import nn

from attnviz.data.scenes import CLASS_NAMES, Scene, SceneObject, draw_scene
from attnviz.networks import load_network
from attnviz.probes.context import (
    concept_detectors,
    concept_overlap,
    label_regions,
    label_shares,
    map_labels,
    scene_concepts,
    scene_regions,
)
from attnviz.stages import staged
from attnviz.tree import evidence


def _square(rows, columns, size=16):
    mask = np.zeros((size, size), bool)
    mask[rows, columns] = True
    return mask


LEFT, RIGHT = np.s_[4:8, 2:6], np.s_[4:8, 10:14]


def _colors(classes=12):
    # Channel 0 sees red, 1 green, 2 blue; class 0 is what is red, class 1 what is green or blue.
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(3, classes, bias=False))  # fmt: skip
    model[0].weight.data = torch.eye(3)[:, :, None, None].clone()
    model[4].weight.data.zero_()
    model[4].weight.data[0, 0] = model[4].weight.data[1, 1] = 1.0
    model[4].weight.data[1, 2] = 0.5
    return staged(model, ["1"], image_size=(16, 16), mean=[0.0] * 3, std=[1.0] * 3)


def _scene():
    image = np.zeros((16, 16, 3), np.uint8)
    image[LEFT][..., 0], image[RIGHT][..., 1] = 200, 200
    image[12:16, :, 2] = 100
    part, body = _square(*LEFT), _square(np.s_[8:12], LEFT[1])
    deer = SceneObject(0, (2, 4, 6, 12), part | body, {"antlers": part, "body": body})
    other = _square(*RIGHT)
    ox = SceneObject(1, (10, 4, 14, 8), other, {"horns": other, "body": other & False})
    grass = _square(np.s_[12:16], np.s_[:])
    return Scene(image, (0, 1), (deer, ox), {"grass": grass}, "a scene")


def test_regions_of_masks_and_scenes():
    mask = np.array([[0, 1, 3], [255, 3, 3]], np.uint8)
    regions = label_regions(mask, ["sky", "sea", "boat"])
    assert {name: region.sum() for name, region in regions.items()} == {"sky": 1, "boat": 3}
    scene = draw_scene(4, objects="several")
    regions, concepts = scene_regions(scene), scene_concepts(scene)
    for item in scene.objects:
        name = CLASS_NAMES[item.class_id]
        assert (regions[name] >= item.mask).all()
    assert set(scene.contexts) <= set(concepts)
    parts = [mask for name, mask in concepts.items() if name not in scene.contexts]
    assert np.array_equal(np.any(parts, axis=0), np.any([o.mask for o in scene.objects], axis=0))


def test_a_map_gets_the_label_of_its_largest_overlap():
    net, scene = _colors(), _scene()
    tree = evidence(net, net.preprocess(scene.image), 1)
    rows = map_labels(tree, scene_regions(scene)).set_index("channel")
    assert rows.loc[1, "label"] == "ox"
    assert rows.loc[1, "iou"] == 1
    assert rows.loc[2, "label"] == "grass"  # evidence from the context
    assert rows.loc[2, "iou"] == 1
    assert rows["share"].sum() == pytest.approx(1)
    half = {"top": _square(np.s_[4:6], RIGHT[1]), "all": _square(np.s_[:], np.s_[:])}
    rows = map_labels(tree, half).set_index("channel")
    assert rows.loc[1, ["label", "iou"]].tolist() == ["top", 8 / 16]
    assert map_labels(tree, {})["label"].isna().all()


def test_shares_of_labels_sum_to_one_for_each_class():
    net, scene = _colors(), _scene()
    tree = evidence(net, net.preprocess(scene.image), 1)
    rows = map_labels(tree, scene_regions(scene))
    shares = label_shares(rows)
    assert shares.loc[1].to_dict() == {"ox": 0.5, "grass": 0.5}
    assert label_shares(rows.assign(stage=[1, 2]), stage=2).loc[1].sum() == 1


def test_evidence_overlaps_part_and_context_and_random_channels_do_not():
    net = _colors()
    table = concept_overlap(net, [_scene()], top=1)
    rows = table[table["chosen"] == "evidence"].set_index("class_id")
    assert rows["channel"].to_dict() == {0: 0, 1: 1}
    assert rows.loc[0, "part"] == 1
    assert rows.loc[0, "object"] == pytest.approx(16 / 32)
    assert np.isnan(rows.loc[0, "context"])  # a deer's is snow, which is not in sight
    assert rows.loc[1, ["part", "context", "best"]].tolist() == [1, 0, "horns"]
    control = table[table["chosen"] == "random"].set_index("class_id")
    assert control["channel"].to_dict() == {1: 2}  # class 0 depends on no other
    assert control.loc[1, ["part", "context", "best"]].tolist() == [0, 1, "grass"]
    net.model[4].weight.data[0, 2] = -1.0  # what speaks against a class may be drawn as well
    table = concept_overlap(net, [_scene()], top=1).query("class_id == 0 and chosen == 'random'")
    assert table[["channel", "best", "best_iou", "share"]].iloc[0].tolist() == [2, "grass", 1, 0]


def test_the_control_follows_its_seed_and_leaves_out_the_evidence():
    net = load_network("scenes_conv")
    scenes = [draw_scene(i, split="val") for i in range(4)]
    tables = [concept_overlap(net, scenes, seed=seed) for seed in (1, 1, 2)]
    assert tables[0].equals(tables[1])
    assert not tables[0]["channel"].equals(tables[2]["channel"])
    for _, rows in tables[0].groupby(["image_id", "class_id"]):
        assert not rows["channel"].duplicated().any()
        counts = rows["chosen"].value_counts()
        assert counts["evidence"] == counts["random"] == 3
    for name in ("part", "context", "object", "best_iou"):
        assert tables[0][name].dropna().between(0, 1).all()


def test_detectors_find_the_concept_of_each_channel():
    net = _colors()
    found = concept_detectors(net, [_scene()] * 2, quantile=0.5, batch_size=1)
    assert found.loc[0, "antlers"] == 1
    assert found.loc[1, "horns"] == 1
    assert found.loc[2, "grass"] == 1
    assert found.loc[0, "grass"] == 0
    assert found.idxmax(axis=1).tolist() == ["antlers", "horns", "grass"]
    # over two scenes sums are divided, not ratios averaged
    bare = Scene(
        np.zeros((16, 16, 3), np.uint8), (), (), {"grass": _square(np.s_[:4], np.s_[:])}, "b"
    )
    found = concept_detectors(net, [_scene(), bare], quantile=0.5)
    assert found.loc[2, "grass"] == pytest.approx(64 / (64 + 64))


def test_no_trace_is_left():
    net = _colors()
    net.model.train()
    before = _trace(net.model)
    concept_overlap(net, [_scene()])
    concept_detectors(net, [_scene()])
    with pytest.raises(ValueError, match="from 1 to 1"):
        concept_overlap(net, [_scene()], stage=2)
    assert _trace(net.model) == before
