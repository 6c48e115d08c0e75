"""A label panel made of numbers only, and settings to try on it."""

import numpy as np

from attnviz.panels import explore_labels

NAMES = ("boat", "heron", "</script><b>reed", "cloud")
SIZE = (48, 64)


def make_panel(**settings):
    """A picture of two discs with maps that spill over them, and everything else there is."""
    generator = np.random.default_rng(8)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    discs = [(y - 18) ** 2 + (x - 20) ** 2 < 130, (y - 30) ** 2 + (x - 46) ** 2 < 90]
    truth = np.where(discs[0], 1, np.where(discs[1], 3, 0)).astype(np.uint8)
    truth[(truth == 0) & (generator.random(SIZE) < 0.01)] = 255
    image = np.stack([60 + 2 * y, 80 + x, 100 + 90 * (truth > 0)], axis=-1)
    image = np.clip(image + generator.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    maps = {
        0: _spot(12, 16, (18, 22), 40.0) + 0.1 * generator.random((12, 16)),
        2: _spot(7, 9, (30, 44), 60.0) + 0.2 * generator.random((7, 9)),
    }
    saliency = np.clip(0.7 * (truth % 255 > 0) + 0.3 * generator.random(SIZE), 0, 1)
    rolled = np.roll(truth, 3, axis=1)
    masks = {"plain": np.where(rolled == 255, 0, rolled), "with CRF": np.where(discs[0], 1, 4)}
    return explore_labels(
        image, maps, NAMES, saliency=saliency, truth=truth, network="five stages",
        predictions={name: mask.astype(np.uint8) for name, mask in masks.items()}, **settings,
    )  # fmt: skip


def settings_of(seed):
    """Thresholds drawn from wide ranges, in steps of the sliders."""
    generator = np.random.default_rng(seed)
    return {
        "floor": round(float(generator.uniform(0, 0.8)), 2),
        "conflict": round(float(generator.uniform(0.3, 1)), 2),
        "salient": int(generator.integers(0, 256)) / 255,
        "strong": round(float(generator.uniform(0.3, 1)), 2),
        "least": float(generator.choice([0.0, 0.01, 0.2], p=[0.3, 0.5, 0.2])),
        "power": float(generator.choice([1, 2, 4, 8.5, 32])),
        "constant": round(float(generator.uniform(0.05, 0.7)), 2),
        "averaged": bool(generator.random() < 0.4),
        "regions": "slic",
    }


def _spot(rows, columns, center, spread):
    y = (np.arange(rows)[:, None] + 0.5) * SIZE[0] / rows
    x = (np.arange(columns) + 0.5) * SIZE[1] / columns
    return np.exp(-((y - center[0]) ** 2 + (x - center[1]) ** 2) / (2 * spread))
