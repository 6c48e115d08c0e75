"""A pytest plugin: while nbval runs a chapter, its pictures are compared with the stored ones.

nbval compares text; a picture's bytes differ from one matplotlib or font to the next, so here the
mean difference in grey levels counts.
"""

import base64
import io

import numpy as np
import pytest
from nbval.plugin import IPyNbCell
from PIL import Image

PICTURES = ("image/png", "image/jpeg")
LIMIT = 4  # grey levels of 255


def decode_pictures(outputs):
    found = []
    for output in outputs:
        kind = next((kind for kind in PICTURES if kind in output.get("data", {})), None)
        if kind:
            with Image.open(io.BytesIO(base64.b64decode(output["data"][kind]))) as image:
                found.append(np.asarray(image.convert("RGB"), dtype=float))
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if isinstance(item, IPyNbCell):
        stored, fresh = decode_pictures(item.cell.outputs), decode_pictures(item.test_outputs)
        assert [picture.shape for picture in fresh] == [picture.shape for picture in stored]
        for old, new in zip(stored, fresh):
            assert np.abs(old - new).mean() < LIMIT
    return result
