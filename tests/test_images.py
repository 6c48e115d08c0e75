import numpy as np
import pytest
from PIL import Image

from attnviz.images import network_size, read_image, to_pixels


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def test_every_mode_becomes_upright_rgb(tmp_path, picture):
    base = Image.fromarray(picture)
    for mode, suffix in [
        ("L", "png"),
        ("P", "png"),
        ("CMYK", "jpg"),
        ("RGBA", "png"),
        ("1", "png"),
    ]:
        path = tmp_path / f"{mode}.{suffix}"
        base.convert(mode).save(path)
        image = read_image(path)
        assert (image.mode, image.size) == ("RGB", (40, 24))


def test_transparent_pixels_are_white(tmp_path, picture):
    alpha = np.zeros((24, 40, 1), dtype=np.uint8)
    alpha[:, 20:] = 255
    Image.fromarray(np.concatenate([picture, alpha], 2)).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    assert (pixels[:, :20] == 255).all()
    assert (pixels[:, 20:] == picture[:, 20:]).all()


def test_16_bit_grey_keeps_its_range(tmp_path):
    ramp = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))[:, :, 0]
    assert abs(pixels.astype(int) - (ramp // 257).astype(int)).max() <= 1


def test_exif_orientation_is_applied(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert (np.asarray(read_image(tmp_path / "a.png")) == np.rot90(picture, -1)).all()


def test_arrays_of_any_common_kind_become_pixels(picture):
    assert (to_pixels(picture) == picture).all()
    assert (to_pixels(picture / 255) == picture).all()
    assert to_pixels(picture[:, :, 0]).shape == (24, 40, 3)
    assert to_pixels(picture[:, :, :1]).shape == (24, 40, 3)


def _write(path, data):
    path.write_bytes(data)
    return path


def test_bad_files_get_one_clear_line(tmp_path, picture):
    with pytest.raises(FileNotFoundError, match="which is not there"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match="which no picture format matches"):
        read_image(_write(tmp_path / "text.jpg", b"hello"))
    with pytest.raises(ValueError, match="which no picture format matches"):
        read_image(_write(tmp_path / "empty.jpg", b""))
    Image.fromarray(picture).resize((200, 200)).save(tmp_path / "whole.jpg")
    half = (tmp_path / "whole.jpg").read_bytes()[:3000]
    with pytest.raises(ValueError, match=r"expected a whole picture, got .*cut\.jpg"):
        read_image(_write(tmp_path / "cut.jpg", half))
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 1 x 1"):
        read_image(tmp_path / "one.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "vast.png")
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="at most 100 million pixels, got 20000 x 20000"):
        read_image(tmp_path / "vast.png")
    assert limit == Image.MAX_IMAGE_PIXELS


def test_bad_arrays_get_one_clear_line(picture):
    with pytest.raises(TypeError, match="got list"):
        to_pixels([1, 2])
    with pytest.raises(ValueError, match=r"got an array \(3, 24, 40\)"):
        to_pixels(picture.transpose(2, 0, 1))
    with pytest.raises(ValueError, match="divide by 255"):
        to_pixels(picture.astype(float))
    with pytest.raises(ValueError, match="got int64"):
        to_pixels(picture.astype(np.int64))


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((300, 451), 224, (224, 352)),
        ((451, 300), 224, (352, 224)),
        ((20, 2000), 224, (224, 896)),
        ((300, 451), (112, 112), (112, 112)),
    ],
)
def test_network_size_keeps_the_ratio_within_reason(size, target, expected):
    assert network_size(size, target) == expected
