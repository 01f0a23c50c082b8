"""The size from the header equals the size of what `datasets` decodes, for every kind of orientation mark."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image, PngImagePlugin

from hf_dflop.errors import DatasetError
from hf_dflop.rows import image_size, load_image


def saved(format: str, orientation: int | None = None, **options: Any) -> bytes:
    picture = Image.effect_noise((40, 25), 50).convert("RGB")
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    file = BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def png_with_chunk_at_the_end(kind: bytes, data: bytes) -> bytes:
    body = saved("PNG")
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return body[:-12] + chunk + body[-12:]


def xmp_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    return saved("PNG", pnginfo=info)


def exif_bytes() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 8
    return exif.tobytes().removeprefix(b"Exif\0\0")


CASES = {
    **{f"jpeg-{i}": saved("JPEG", i) for i in (None, 1, 3, 5, 6, 7, 8)},
    **{f"{f}-{i}": saved(f, i) for f in ("PNG", "WEBP", "TIFF", "MPO") for i in (None, 3, 6)},
    "gif": saved("GIF"),
    "bmp": saved("BMP"),
    "png-xmp": xmp_png(),
    "png-exif-behind-pixels": png_with_chunk_at_the_end(b"eXIf", exif_bytes()),
    "png-xmp-behind-pixels": png_with_chunk_at_the_end(
        b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_header_size_is_the_decoded_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = {"bytes": CASES[name], "path": None}
    decoded = datasets.Image().decode_example(cell)
    assert load_image(cell).size == decoded.size
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were decoded"))
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("pixels were decoded"))
        assert image_size(cell) == decoded.size[::-1]


def test_paths_and_pictures(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(CASES["jpeg-6"])
    assert image_size(str(path)) == image_size(path) == image_size({"bytes": None, "path": str(path)}) == (40, 25)
    # A picture that is open already goes to the processor as it is, and processors do not turn it.
    assert image_size(Image.open(path)) == (25, 40)
    assert load_image(Image.open(path)).size == (40, 25)


@pytest.mark.parametrize(
    ("cell", "cause"),
    [
        ({"bytes": b"not an image", "path": None}, "row 5: the image cannot be read"),
        ({"bytes": CASES["jpeg-None"][:4], "path": None}, "row 5: the image cannot be read"),
        ({"bytes": None, "path": None}, "row 5: dict is not an image"),
        ("/nowhere/a.png", "row 5: .*No such file"),
        ("https://example.org/a.png", "is a URL"),
        (3, "int is not an image"),
    ],
)
def test_unreadable_images_are_named(cell: Any, cause: str) -> None:
    with pytest.raises(DatasetError, match=cause):
        image_size(cell, where="row 5")


def test_a_decompression_bomb_is_not_decoded() -> None:
    body = bytearray(CASES["PNG-None"])
    body[16:24] = struct.pack(">II", 65_000, 65_000)
    body[29:33] = struct.pack(">I", zlib.crc32(bytes(body[12:29])))
    with pytest.raises(DatasetError, match=r"row 5: Image size \(4225000000 pixels\) exceeds limit"):
        image_size({"bytes": bytes(body), "path": None}, where="row 5")


def test_a_damaged_body_is_named_when_decoded() -> None:
    with pytest.raises(DatasetError, match="row 5: the image cannot be decoded"):
        load_image({"bytes": CASES["PNG-None"][:200], "path": None}, where="row 5")
