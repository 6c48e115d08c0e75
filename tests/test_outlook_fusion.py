import numpy as np
import pytest
import torch

import attnviz
from attnviz import labels, metrics
from attnviz.cam import fuse, normalize
from attnviz.data.scenes import Scenes


def test_stages_that_agree_raise_one_another():
    shallow, deep = torch.tensor([[[4.0, 2.0, 0.0]]]), torch.tensor([[[8.0, 4.0, 6.0]]])
    found = fuse([shallow, deep], scaled="none", rule="or")
    torch.testing.assert_close(found, torch.tensor([[[1.0, 1 - 0.5 * 0.5, 0.75]]]))
    torch.testing.assert_close(fuse([deep], rule="or"), normalize(deep))


def test_joined_stages_lie_between_the_largest_and_one_in_any_order(generator):
    maps = [torch.rand(3, 6, 6, generator=generator) for _ in range(4)]
    found = fuse(maps, rule="or")
    assert (found >= fuse(maps) - 1e-6).all()
    assert found.max() <= 1 + 1e-6
    backwards = fuse(maps[::-1], scaled=(1, 2, 3), rule="or")
    torch.testing.assert_close(found, backwards)
    nothing = torch.zeros(3, 2, 2)
    torch.testing.assert_close(fuse([nothing, *maps], rule="or"), found)
    assert fuse(maps, scaling="tan", scaled="all", rule="or").max() <= 1  # tan 1 is above 1


def test_an_unknown_rule_is_refused(untyped):
    with pytest.raises(ValueError, match=r"`rule` in \('max', 'or'\), got 'sum'"):
        fuse([torch.ones(1, 2, 2)], rule="sum")


@pytest.fixture(scope="module")
def measured():
    """IoU of maps with true masks, each at the threshold that is best for the other half."""
    net = attnviz.load_network("scenes_fc")
    thresholds, ious = np.arange(1, 100) / 100, {}
    for scene in Scenes("val", count=30):
        images, classes = net.preprocess(scene.image), [list(scene.class_ids)]
        maps = attnviz.stage_maps(net, images, classes, stages=[3, 4, 5])["layercam"]
        fused = {rule: fuse(maps, rule=rule, size=(112, 112))[0] for rule in ("max", "or")}
        regions = labels.superpixels(scene.image, "felzenszwalb", 100)
        fused["superpixels"] = labels.superpixel_mean(fused["max"], regions)
        for name, stack in fused.items():
            for map, class_id in zip(stack, scene.class_ids):
                masks = [item.mask for item in scene.objects if item.class_id == class_id]
                mask = torch.from_numpy(np.any(masks, axis=0))
                found = metrics.sweep_region_ious(map, mask, thresholds)
                ious.setdefault(name, []).append(found)
    scored = np.arange(len(found := ious["max"])) < len(found) // 2
    return {
        name: np.concatenate([
            np.array(rows)[half][:, np.array(rows)[~half].mean(axis=0).argmax()]
            for half in (scored, ~scored)
        ])
        for name, rows in ious.items()
    }  # fmt: skip


@pytest.mark.parametrize("better", ["or", "superpixels"])
def test_it_is_nearer_to_the_true_masks_than_the_largest_value(measured, better):
    low, _ = metrics.bootstrap_interval(measured[better] - measured["max"])
    assert low > 0
