"""A panel made of numbers only, the same in the test process and in a kernel."""

import time

import numpy as np

from attnviz.panels import LayerCAMPanel

METHODS = ("layercam", "gradcam")
CLASSES = [(7, "heron", 12.25), (2, "boat", 9.5), (30, "reed <&>", 4.0)]
SIZES = [(56, 84), (28, 42), (14, 21), (7, 10), (7, 10)]


def make_panel(**settings):
    generator = np.random.default_rng(5)
    pictures = [_photograph(generator, size) for size in ((300, 448), (600, 400))]
    maps = [
        [{name: [_map(generator, size) for size in SIZES] for name in METHODS} for _ in CLASSES]
        for _ in pictures
    ]
    return LayerCAMPanel(
        pictures,
        [CLASSES, CLASSES[1:]],
        [maps[0], maps[1][1:]],
        boxes=[[(40, 30, 260, 210)], []],
        names=["pond", "portrait"],
        network="five stages",
        **settings,
    )


def _photograph(generator, size):
    height, width = size
    y, x = np.mgrid[:height, :width] / 60
    waves = [np.sin(x * a + y * b + c) for a, b, c in generator.uniform(0.3, 2.5, (3, 3))]
    noise = generator.normal(0, 6, (height, width, 3))
    return np.clip(128 + 80 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def _map(generator, size):
    height, width = size
    y, x = np.mgrid[:height, :width] / np.array(size)[:, None, None]
    map = np.zeros(size)
    for _ in range(6):
        cy, cx, spread, weight = generator.uniform((0, 0, 0.03, 0.2), (1, 1, 0.15, 1))
        map += weight * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * spread**2))
    return (map + 0.1 * generator.random(size)).astype(np.float32)


def settles(read, expected, seconds=10):
    """Tells whether `read()` becomes `expected`, asked again and again for some seconds."""
    end = time.monotonic() + seconds
    while (found := read()) != expected and time.monotonic() < end:
        time.sleep(0.05)
    return found == expected
