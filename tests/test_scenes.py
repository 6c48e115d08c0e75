import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from attnviz.data.draws import check_integer
from attnviz.data.scenes import (
    CLASS_CONTEXTS,
    CLASS_NAMES,
    CLASS_PARTS,
    CONTEXT_NAMES,
    FAMILIES,
    PART_NAMES,
    SHARED_PARTS,
    Scenes,
    draw_scene,
)

_PINNED = {  # index, split, seed, size, objects: start of the sha256 of the image's bytes
    (0, "train", 0, 112, "several"): "43a3f9824a8ecd9d68ff36d706fc7cf5",
    (7, "val", 0, 64, "few"): "2c7455f088a287398f96aa17b1be1f73",
    (3, "test", 5, 224, "several"): "a4a6514b8883e4e0342488cb031e2408",
}


def _digest(index, split, seed, size, objects):
    scene = draw_scene(index, split=split, seed=seed, size=size, objects=objects)
    return hashlib.sha256(scene.image.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def scenes():
    return list(Scenes("train", count=200))


# Determinism


@pytest.mark.parametrize("key", _PINNED)
def test_the_bytes_of_an_image_never_change(key):
    assert _digest(*key).startswith(_PINNED[key])


def test_another_process_draws_the_same_bytes():
    key = (11, "train", 2, 48, "several")
    program = (
        "import hashlib; from attnviz.data.scenes import draw_scene; "
        "scene = draw_scene(11, seed=2, size=48); "
        "print(hashlib.sha256(scene.image.tobytes()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == _digest(*key), run.stderr


def test_neither_order_of_access_nor_count_changes_a_scene(scenes):
    other = Scenes("train", count=60)
    for i in (59, 0, 31, 0):
        np.testing.assert_array_equal(other[i].image, scenes[i].image)


def test_masks_do_not_change_the_image(scenes):
    for i in range(20):
        plain = draw_scene(i, masks=False)
        np.testing.assert_array_equal(plain.image, scenes[i].image)
        assert plain.class_ids == scenes[i].class_ids
        assert plain.objects == ()
        assert plain.contexts == {}


def test_drawing_leaves_the_global_random_state_alone():
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002 the global state is what is tested
    draw_scene(5)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002 likewise
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_split_seed_and_kind_give_other_pictures():
    images = [
        draw_scene(4).image,
        draw_scene(4, split="val").image,
        draw_scene(4, split="test").image,
        draw_scene(4, seed=1).image,
        draw_scene(4, objects="few").image,
        draw_scene(5).image,
    ]
    assert len({image.tobytes() for image in images}) == len(images)


# Ground truth


def test_boxes_are_tight_round_the_visible_mask(scenes):
    for scene in scenes:
        for item in scene.objects:
            x0, y0, x1, y1 = item.box
            inside = item.mask[y0:y1, x0:x1]
            assert inside.sum() == item.mask.sum() > 0
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_the_parts_of_an_object_divide_its_mask(scenes):
    for scene in scenes:
        for item in scene.objects:
            np.testing.assert_array_equal(
                sum(m.astype(int) for m in item.parts.values()), item.mask
            )


def test_an_object_has_the_parts_of_its_family_and_its_own(scenes):
    family = {name: key for key, names in FAMILIES.items() for name in names}
    for scene in scenes:
        for item in scene.objects:
            name = CLASS_NAMES[item.class_id]
            assert tuple(item.parts) == (*SHARED_PARTS[family[name]], CLASS_PARTS[name])
            assert item.parts["body"].any()


def test_objects_and_contexts_are_disjoint(scenes):
    for scene in scenes:
        masks = [item.mask for item in scene.objects] + list(scene.contexts.values())
        assert sum(m.astype(int) for m in masks).max() <= 1
        assert all(m.any() for m in scene.contexts.values())


def test_class_ids_are_the_classes_of_the_objects(scenes):
    for scene in scenes:
        assert scene.class_ids == tuple(sorted({item.class_id for item in scene.objects}))


@pytest.mark.parametrize(("objects", "low", "high"), [("few", 1, 2), ("several", 2, 4)])
def test_the_number_of_objects_is_as_asked(objects, low, high):
    counts = {len(scene.objects) for scene in Scenes("val", count=60, objects=objects)}
    assert counts == set(range(low, high + 1))


def test_occlusion_is_mild(scenes):
    shares = []
    for scene in scenes:
        for item in scene.objects:
            own = item.parts[CLASS_PARTS[CLASS_NAMES[item.class_id]]]
            shares.append(own.sum() > 0.02 * item.mask.sum())
    assert np.mean(shares) > 0.97


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_the_own_part_is_small_in_the_median(name, scenes):
    shares = [
        item.parts[CLASS_PARTS[name]].sum() / item.mask.sum()
        for scene in scenes
        for item in scene.objects
        if CLASS_NAMES[item.class_id] == name
    ]
    assert 0.05 < np.median(shares) < 0.12


# Statistics


def test_classes_are_about_equally_frequent(scenes):
    class_ids = [item.class_id for scene in scenes for item in scene.objects]
    counts = np.bincount(class_ids, minlength=len(CLASS_NAMES))
    assert counts.min() > 0.75 * counts.mean()
    assert counts.max() < 1.25 * counts.mean()


def test_families_mix_within_images(scenes):
    family = {CLASS_NAMES.index(n): key for key, names in FAMILIES.items() for n in names}
    mixed = [len({family[k] for k in scene.class_ids}) > 1 for scene in scenes]
    assert 0.4 < np.mean(mixed) < 0.95


def test_a_context_follows_its_class_but_not_always(scenes):
    present, absent = [], []
    for scene in scenes:
        for class_id, name in enumerate(CLASS_NAMES):
            seen = CLASS_CONTEXTS[name] in scene.contexts
            (present if class_id in scene.class_ids else absent).append(seen)
    assert 0.5 < np.mean(present) < 0.75
    assert 0.02 < np.mean(absent) < 0.15


def test_color_tells_nothing_about_the_class(scenes):
    colors = {k: [] for k in range(len(CLASS_NAMES))}
    for scene in scenes:
        for item in scene.objects:
            colors[item.class_id].append(scene.image[item.parts["body"]].mean(0))
    means = np.array([np.mean(c, axis=0) for c in colors.values()])
    spread = np.mean([np.std(c, axis=0) for c in colors.values()])
    assert means.std(0).max() < 0.5 * spread


def test_backgrounds_are_textured(scenes):
    for scene in scenes[:50]:
        free = ~np.any([item.mask for item in scene.objects], axis=0)
        gray = scene.image.astype(float).mean(-1)
        steps = np.abs(np.diff(gray, axis=1))[free[:, 1:]]
        assert steps.mean() > 3


# The data set


def test_names_agree_with_each_other():
    assert set(CLASS_PARTS) == set(CLASS_CONTEXTS) == set(CLASS_NAMES)
    assert set(PART_NAMES) == {*CLASS_PARTS.values(), *sum(SHARED_PARTS.values(), ())}
    assert len(set(CONTEXT_NAMES)) == len(CONTEXT_NAMES)
    assert Scenes(count=1).class_names == CLASS_NAMES


def test_a_training_item_is_the_scene_without_masks(scenes):
    image, target, image_id = Scenes("train", count=200).training_item(12)
    assert image.dtype == torch.uint8
    np.testing.assert_array_equal(image.permute(1, 2, 0), scenes[12].image)
    assert tuple(target.nonzero().flatten().tolist()) == scenes[12].class_ids
    assert target.dtype == torch.float32
    assert image_id == scenes[12].image_id == "scenes-train-000012"


def test_an_index_counts_from_the_end_when_negative(scenes):
    data = Scenes("train", count=200)
    assert len(data) == 200
    assert data[-1].image_id == scenes[-1].image_id == "scenes-train-000199"


@pytest.mark.parametrize("size", [32, 33, 96, 256])
def test_any_size_from_32_works(size):
    scene = draw_scene(2, size=size)
    assert scene.image.shape == (size, size, 3)
    assert scene.image.dtype == np.uint8
    assert all(item.mask.shape == (size, size) for item in scene.objects)


def test_a_canvas_larger_than_the_textures_works():
    assert draw_scene(2, size=400, masks=False).image.shape == (400, 400, 3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": 31}, r"expected `size` >= 32, got 31; give a larger number"),
        ({"seed": -1}, r"expected `seed` >= 0, got -1"),
        ({"index": -1}, r"expected `index` >= 0, got -1"),
        ({"split": "dev"}, r"expected `split` in \{'train', 'val', 'test'\}, got 'dev'"),
        ({"objects": "many"}, r"expected `objects` in \{'few', 'several'\}, got 'many'"),
    ],
)
def test_bad_values_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        draw_scene(**{"index": 0, **arguments})


def test_a_wrong_kind_of_number_is_named():
    with pytest.raises(TypeError, match=r"expected `size` to be an integer, got float; give a"):
        check_integer("size", 112.0, 32)


def test_an_index_beyond_the_count_is_named():
    with pytest.raises(IndexError, match=r"expected an index in \[-5, 5\), got 5; make the data"):
        Scenes(count=5)[5]


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match=r"expected `count` >= 1, got 0"):
        Scenes(count=0)
