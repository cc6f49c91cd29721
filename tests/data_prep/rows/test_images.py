"""Every kind of image file that a real dataset holds is either read as upright RGB or rejected with a reason."""

import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_prep.cache.sizes import image_size
from data_prep.rows.images import (
    RejectedImage,
    image_suffixes,
    inspect_image,
    inspect_mask,
    open_cut_out,
    open_image,
    open_mask,
)

GRADIENT = np.linspace(0, 255, 64 * 48, dtype=np.uint8).reshape(48, 64)


@pytest.fixture
def photograph() -> Image.Image:
    return Image.fromarray(np.stack([GRADIENT, GRADIENT[::-1], GRADIENT[:, ::-1]], axis=-1))


def save(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


def assert_close(image: Image.Image, expected: Image.Image, tolerance: int = 3):
    assert image.mode == "RGB"
    assert image.size == expected.size
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= tolerance


def test_plain_rgb_is_unchanged(photograph, tmp_path):
    assert_close(open_image(save(photograph, tmp_path / "ünï 图.png")), photograph, 0)


def test_exif_rotation_is_applied(photograph, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn clockwise to show
    path = save(photograph.transpose(Image.Transpose.ROTATE_90), tmp_path / "phone.png", exif=exif)
    assert_close(open_image(path), photograph, 0)


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "YCbCr", "LAB"])
def test_other_colour_modes_become_rgb(mode, photograph, tmp_path):
    source = photograph if mode != "LAB" else Image.new("LAB", photograph.size)
    # compressed, as such files are: without, Pillow 12 cannot read the YCbCr that it writes
    image = open_image(save(source.convert(mode), tmp_path / "image.tif", compression="tiff_lzw"))
    assert image.mode == "RGB"
    assert image.size == photograph.size


def test_cmyk_jpeg_looks_like_its_original(tmp_path):
    red = Image.new("RGB", (32, 32), (200, 30, 40))
    assert_close(open_image(save(red.convert("CMYK"), tmp_path / "print.jpg", quality=95)), red, 6)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    expected = Image.fromarray(GRADIENT).convert("RGB")
    assert_close(open_image(save(deep, tmp_path / "deep.png")), expected, 0)
    assert_close(open_image(save(deep, tmp_path / "deep.tif")), expected, 0)


def test_palette_and_palette_with_transparency(photograph, tmp_path):
    palette = photograph.quantize(256)
    assert_close(open_image(save(palette, tmp_path / "palette.png")), palette.convert("RGB"), 0)
    transparent = open_image(save(palette, tmp_path / "hole.png", transparency=palette.getpixel((5, 5))))
    assert transparent.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode, photograph, tmp_path):
    image = photograph.convert(mode)
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 10, 10))
    image.putalpha(alpha)
    opened = open_image(save(image, tmp_path / "alpha.png"))
    assert opened.getpixel((5, 5)) == (255, 255, 255)
    assert opened.getpixel((30, 30)) == image.convert("RGB").getpixel((30, 30))


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_of_an_animation_it_is_the_first_frame(suffix, tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    path = save(frames[0], tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:])
    assert_close(open_image(path), frames[0], 6)


def test_a_wrong_extension_does_not_matter(photograph, tmp_path):
    assert_close(open_image(save(photograph, tmp_path / "liar.jpg", format="PNG")), photograph, 0)


def test_what_was_converted_is_told(photograph, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    half = photograph.convert("RGBA")
    half.putalpha(128)
    opaque = photograph.convert("RGBA")
    files = {
        "plain.png": (photograph, {}, ""),
        "opaque.png": (opaque, {}, ""),
        "palette.png": (photograph.quantize(16), {}, ""),
        "print.jpg": (photograph.convert("CMYK"), {}, "CMYK made RGB without colour management"),
        "deep.png": (Image.fromarray(GRADIENT.astype(np.uint16) * 257), {}, "16 bits made 8"),
        "half.png": (half, {}, "transparency laid on white"),
        "turned.jpg": (photograph, {"exif": exif}, "turned as its EXIF says, as every viewer does"),
        "moving.gif": (photograph, {"save_all": True, "append_images": [opaque]}, "animated: the first frame"),
        "still.gif": (photograph, {}, ""),
        "liar.jpg": (photograph, {"format": "PNG"}, "its name says JPEG, it is PNG, and is read all the same"),
        "phone.jpg": (photograph, {"format": "MPO", "save_all": True, "append_images": [photograph]}, ""),
        "noname": (photograph, {"format": "PNG"}, ""),
    }
    found = {name: inspect_image(save(image, tmp_path / name, **how)) for name, (image, how, _) in files.items()}
    told = {name: "; ".join(opened.conversions) for name, opened in found.items()}
    assert told == {name: expected for name, (_, _, expected) in files.items()}
    assert all(opened.image.mode == "RGB" for opened in found.values())


# Columns: red, green and blue in XYZ under D50. SMPTE EG 432-1 and IEC 61966-2-1, adapted by Bradford's matrix.
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def linear(values: np.ndarray) -> np.ndarray:
    """sRGB's and Display P3's curve."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encoded(values: np.ndarray) -> np.ndarray:
    """The curve's inverse, on [0, 1]."""
    values = values.clip(0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def icc_profile(primaries: np.ndarray, curve=linear) -> bytes:
    """An ICC profile, version 2, of three primaries and a curve."""
    xyz = [struct.pack(">4s4x3i", b"XYZ ", *(round(value * 65536) for value in each)) for each in primaries.T]
    white = struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061)
    points = np.round(curve(np.linspace(0, 1, 1024)) * 65535).astype(">u2").tobytes()
    curves = struct.pack(">4s4xI", b"curv", 1024) + points
    tags = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), xyz, strict=True)) | {b"wtpt": white}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curves)
    offset, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, offset + len(data), len(content))
        data += content
    size = offset + len(data)
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x3i48x", size, 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"acsp", 63190, 65536, 54061
    )
    return header + table + data


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_display_p3_becomes_srgb(mode, photograph, tmp_path):
    """Against the formula in float64. Two levels: lcms rounds to 16 bits and to 8, the profile's table has 1024 points."""
    stored = photograph.quantize(64) if mode == "P" else photograph.convert(mode)
    if mode == "RGBA":
        stored.putalpha(Image.fromarray(GRADIENT))
    opened = open_cut_out(save(stored, tmp_path / "phone.png", icc_profile=icc_profile(DISPLAY_P3)))
    colours = linear(np.asarray(stored.convert("RGB"), np.float64) / 255)
    expected = 255 * encoded(colours @ (np.linalg.inv(SRGB) @ DISPLAY_P3).T)
    assert np.abs(expected - np.asarray(stored.convert("RGB"))).max() > 20  # or there would be nothing to see
    assert np.abs(np.asarray(opened)[..., :3] - expected).max() <= 2
    assert np.array_equal(np.asarray(opened)[..., 3], GRADIENT if mode == "RGBA" else np.full_like(GRADIENT, 255))
    assert "icc_profile" not in opened.info  # or it would be applied again


def test_srgbs_own_profiles_change_nothing(photograph, tmp_path):
    created = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in {"made.png": icc_profile(SRGB), "created.png": created}.items():
        opened = inspect_image(save(photograph, tmp_path / name, icc_profile=profile))
        assert_close(opened.image, photograph, 0)
        assert opened.conversions == ()


def test_a_profile_that_is_left_out_is_told(photograph, tmp_path):
    p3 = icc_profile(DISPLAY_P3)
    assert inspect_image(save(photograph, tmp_path / "p3.jpg", icc_profile=p3)).conversions == ()
    dark = icc_profile(SRGB, lambda values: values**3)
    grey = inspect_image(save(Image.fromarray(GRADIENT), tmp_path / "grey.png", icc_profile=dark))
    assert grey.conversions == ()
    expected = 255 * encoded((GRADIENT / 255) ** 3)
    assert np.abs(np.asarray(grey.image) - expected[..., None]).max() <= 2
    left_out = ("its ICC profile is broken or for another colour space, and is ignored",)
    for name, profile in {"broken.png": b"no profile", "print.jpg": p3}.items():
        stored = photograph.convert("CMYK") if name == "print.jpg" else photograph
        opened = inspect_image(save(stored, tmp_path / name, icc_profile=profile))
        assert opened.conversions == left_out
    assert_close(open_image(tmp_path / "broken.png"), photograph, 0)


def test_a_masks_values_are_no_colours(tmp_path):
    dark = icc_profile(SRGB, lambda values: values**3)
    opened = inspect_mask(save(Image.fromarray(GRADIENT), tmp_path / "mask.png", icc_profile=dark))
    assert np.array_equal(np.asarray(opened.image), GRADIENT)
    assert opened.conversions == ()


def test_heic_is_read_upright_and_in_srgb(photograph, tmp_path):
    """HEVC keeps colours of a smooth picture within a few levels at this quality; a shift of P3 would be over 20."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = photograph.transpose(Image.Transpose.ROTATE_90)
    path = save(lying, tmp_path / "phone.heic", quality=100, chroma=444, exif=exif.tobytes())
    assert_close(open_image(path), photograph, 6)
    assert image_size(path) == (48, 64)
    assert path.suffix in image_suffixes()
    p3 = save(photograph, tmp_path / "p3.heic", quality=100, chroma=444, icc_profile=icc_profile(DISPLAY_P3))
    same = open_image(save(photograph, tmp_path / "p3.png", icc_profile=icc_profile(DISPLAY_P3)))
    assert_close(open_image(p3), same, 8)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RejectedImage, match=r"phone\.heic: "):
        open_image(path)


def cut_in_half(format):
    def write(path):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format=format)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write


BROKEN = {
    "no such file": lambda _: None,
    "zero bytes": lambda path: path.touch(),
    "not an image": lambda path: path.write_text("<html>404</html>"),
    "format that is read": lambda path: Image.new("RGB", (32, 32)).save(path, format="EPS"),
    "truncated": cut_in_half("JPEG"),
    "file is truncated": cut_in_half("PNG"),
    "directory": lambda path: path.mkdir(),
    "symbolic links": lambda path: path.symlink_to(path),
    "too thin": lambda path: Image.new("L", (3001, 30)).save(path, format="PNG"),
    "floating-point": lambda path: Image.new("F", (32, 32)).save(path, format="TIFF"),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_unusable_files_are_rejected_with_path_and_reason(reason, tmp_path):
    path = tmp_path / "image.jpg"
    BROKEN[reason](path)
    with pytest.raises(RejectedImage, match=reason) as rejection:
        open_image(path)
    assert rejection.value.path == path


@pytest.mark.parametrize("limit", [2000, 1000])  # Pillow warns above its limit and raises above twice its limit
def test_a_decompression_bomb_is_rejected(limit, photograph, tmp_path, monkeypatch):
    path = save(photograph, tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(RejectedImage, match="decompression-bomb limit"):
        open_image(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_rejected(photograph, tmp_path):
    path = save(photograph, tmp_path / "secret.png")
    path.chmod(0)
    with pytest.raises(RejectedImage, match="Permission denied"):
        open_image(path)


def test_masks_become_grey_and_transparent_means_edit(photograph, tmp_path):
    grey = open_mask(save(Image.fromarray(GRADIENT), tmp_path / "grey.png"))
    assert grey.mode == "L"
    assert np.array_equal(np.asarray(grey), GRADIENT)
    deep = open_mask(save(Image.fromarray(GRADIENT.astype(np.uint16) * 257), tmp_path / "deep.png"))
    assert np.array_equal(np.asarray(deep), GRADIENT)
    image = Image.new("RGBA", photograph.size, "white")
    image.paste((255, 255, 255, 0), (0, 0, 10, 10))
    holes = open_mask(save(image, tmp_path / "holes.png"))
    assert (holes.getpixel((5, 5)), holes.getpixel((30, 30))) == (0, 255)
