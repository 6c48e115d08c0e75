import subprocess
import sys

import numpy as np
import pytest
from matplotlib import colormaps

from attnviz import colors


def test_palettes_are_matplotlibs_tables():
    for name in colors.PALETTES:
        table = colors.palette(name)
        assert table.shape == (256, 3)
        assert table.dtype == np.uint8
        expected = np.array([colormaps[name](level)[:3] for level in range(256)]) * 255
        np.testing.assert_allclose(table, expected, atol=0.5)


def test_inferno_runs_from_black_to_pale_yellow_and_is_the_default():
    np.testing.assert_array_equal(colors.palette()[[0, 255]], [[0, 0, 4], [252, 255, 164]])


def test_default_palette_grows_steadily_lighter():
    lightness = colors.palette().astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -0.75).all()


@pytest.mark.usefixtures("untyped")
def test_unknown_palette_lists_the_choices():
    with pytest.raises(ValueError, match=r"expected `palette` in \('inferno', .*got 'rainbow'"):
        colors.palette("rainbow")


def test_colorize_rounds_half_up_and_clips():
    map = np.array([[0.0, 0.5 / 255, 1.0], [-1.0, 0.4999 / 255, 2.0]])
    table = colors.palette("viridis")
    np.testing.assert_array_equal(
        colors.colorize(map, "viridis"), table[[[0, 1, 255], [0, 0, 255]]]
    )


def test_overlay_equals_its_equation_pixel_by_pixel():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    map = generator.random((5, 7))
    result = colors.overlay(image, map, opacity=0.6, palette="turbo")
    for y in range(5):
        for x in range(7):
            level = int(map[y, x] * 255 + 0.5)
            weight = 0.6 * (level / 255) ** 0.5
            color = colors.palette("turbo")[level].astype(float)
            expected = (1 - weight) * image[y, x] + weight * color
            np.testing.assert_array_equal(result[y, x], (expected + 0.5).astype(int))


def test_overlay_leaves_the_picture_where_the_map_is_zero():
    image = np.full((4, 4, 3), 200, np.uint8)
    np.testing.assert_array_equal(colors.overlay(image, np.zeros((4, 4))), image)
    np.testing.assert_array_equal(colors.overlay(image, np.ones((4, 4)), opacity=0.0), image)


def test_overlay_of_full_opacity_shows_the_color_where_the_map_is_one():
    image = np.full((2, 2, 3), 90, np.uint8)
    result = colors.overlay(image, np.ones((2, 2)), opacity=1.0, palette="gray")
    np.testing.assert_array_equal(result, np.full((2, 2, 3), 255))


def test_arguments_stay_as_they_were():
    image, map = np.full((2, 2, 3), 7, np.uint8), np.full((2, 2), 2.0)
    colors.overlay(image, map)
    assert (image == 7).all()
    assert (map == 2).all()


def test_importing_colors_needs_no_matplotlib():
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('c', sys.argv[1]); "
        "s.loader.exec_module(u.module_from_spec(s)); assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, colors.__file__], check=True)
