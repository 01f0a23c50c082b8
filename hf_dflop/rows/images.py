"""Size of an image from its header, and the decoded picture, such that the two agree.

Inputs: an image cell (`{"bytes", "path"}` as `datasets.Image(decode=False)` gives it, a path, or a PIL image).
A picture that is still encoded is turned upright by its EXIF or XMP orientation when it is decoded, as
`datasets.Image` does; a PIL image is taken as it is, as processors take it. `image_size` knows this without
decoding a pixel.

Assumptions: the header tells the truth about the size. A file that ends too early is noticed without decoding the
others (see `ending.py`); damage further inside is not.
"""

import re
import struct
import warnings
from io import BytesIO, UnsupportedOperation
from typing import Any

from hf_dflop.errors import DatasetError
from hf_dflop.rows.ending import looks_cut_off
from hf_dflop.rows.source import file_source

__all__ = ["image_size", "load_image"]

_SIDEWAYS = (5, 6, 7, 8)
_ORIENTATION_TAG = 0x0112


def image_size(cell: Any, *, where: str = "image") -> tuple[int, int]:
    """Height and width that the processor will see, read from the header.

    Args:
        cell (`dict`, `str` or `PIL.Image.Image`): the image cell of a row.
        where (`str`): how error messages call it, for example "row 3, column 'images'".

    Raises:
        DatasetError: the image cannot be read, ends too early, or is larger than PIL's limit against decompression
            bombs.
    """
    from PIL import Image

    if isinstance(cell, Image.Image):
        return cell.height, cell.width
    with _open(cell, where) as picture:
        width, height = picture.size
        # TIFF's reader already reports the upright size.
        if picture.format != "TIFF" and _orientation(picture) in _SIDEWAYS:
            width, height = height, width
        cut_off = looks_cut_off(picture.format, picture.fp)
    if cut_off:
        load_image(cell, where=where)
    return height, width


def load_image(cell: Any, *, where: str = "image") -> Any:
    """The decoded, upright PIL image of a cell.

    Raises:
        DatasetError: the image cannot be read.
    """
    from PIL import Image, ImageOps

    if isinstance(cell, Image.Image):
        return cell
    with _open(cell, where) as picture:
        try:
            picture.load()
            return ImageOps.exif_transpose(picture) if picture.getexif().get(_ORIENTATION_TAG) else picture
        except Exception as error:
            raise DatasetError(f"{where}: the image cannot be decoded: {error}") from error


def _open(cell: Any, where: str) -> Any:
    from PIL import Image

    source = file_source(
        cell,
        where=where,
        kind="image",
        expected="a PIL image, a path, or a dict with 'bytes' or 'path' (a dataset format such as 'torch' must be "
        "reset with with_format(None))",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                return Image.open(source)
            except UnsupportedOperation:  # some readers of PIL want lines, which a buffer of arrow does not give
                return Image.open(BytesIO(cell["bytes"].to_pybytes()))
    except Image.DecompressionBombError as error:
        raise DatasetError(f"{where}: {error} Drop the row or shrink the image.") from error
    except Exception as error:
        cause = str(error) if isinstance(source, str) else f"{type(error).__name__}: no readable image header"
        raise DatasetError(f"{where}: the image cannot be read: {cause}") from error


def _orientation(picture: Any) -> int:
    """EXIF or XMP orientation; PNG's own `getexif` would decode the pixels to reach chunks behind them."""
    from PIL import Image

    if picture.format != "PNG":
        return int(picture.getexif().get(_ORIENTATION_TAG, 1))
    value = Image.Image.getexif(picture).get(_ORIENTATION_TAG)
    return int(value) if value is not None else _png_tail_orientation(picture.fp)


def _png_tail_orientation(file: Any) -> int:
    """Orientation in the chunks of a PNG, skipping the pixels by their chunk lengths."""
    from PIL import Image

    file.seek(8)
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"eXIf":
            exif = Image.Exif()
            exif.load(file.read(length))
            return int(exif.get(_ORIENTATION_TAG, 1))
        if kind == b"iTXt":
            match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', file.read(length))
            if match:
                return int(match[1])
            length = 0
        file.seek(length + 4, 1)
    return 1
