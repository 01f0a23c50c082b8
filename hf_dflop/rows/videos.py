"""What a video is, from its container's header or its list of frames, and the frames that are asked for.

Inputs: a video cell (`{"bytes", "path"}` as `datasets.Video(decode=False)` gives it, a path, a decoder that `datasets`
made, or a list of image cells that are the frames). `video_info` decodes nothing: number of frames, frames per second,
size and rotation come from the header, and where the header keeps no number of frames (Matroska, MPEG-TS), packets are
counted. `load_frames` decodes some of the frames and turns them upright, so that the two agree.

Containers are read by PyAV (`pip install "hf_dflop[video]"`); lists of frames need nothing.

Assumptions: the header tells the truth; where decoding finds another size, rotation or fewer frames, `load_frames`
raises. Frames per second are the container's average.
"""

import mimetypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import DatasetError
from hf_dflop.rows.images import image_size, load_image
from hf_dflop.rows.source import open_container

__all__ = ["VideoInfo", "load_frames", "video_cells", "video_info"]

_ROTATION = re.compile(r"display ?matrix: rotation of (-?[\d.]+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What is known of a video without decoding it."""

    num_frames: int
    height: int
    """Pixels of the upright picture."""
    width: int
    fps: float | None = None
    """Frames per second on average; a list of frames has none."""
    rotation: int = 0
    """Degrees counter-clockwise by which stored frames are turned to be upright: 0, 90, 180 or 270."""

    def metadata(self, indices: Sequence[int] | None = None) -> dict[str, Any]:
        """What video processors want to know; `indices` are the frames that were taken, all where it is `None`."""
        return {
            "total_num_frames": self.num_frames,
            "fps": self.fps,
            "duration": self.num_frames / self.fps if self.fps else None,
            "frames_indices": list(range(self.num_frames)) if indices is None else list(indices),
            "height": self.height,
            "width": self.width,
        }


def video_cells(value: Any) -> list[Any]:
    """The video cells of a column's value: one video, a list of videos, or one video as a list of its frames.

    Example:
        >>> video_cells("a.mp4"), video_cells(["a.mp4", "b.mp4"]), video_cells(["1.png", "2.png"])
        (['a.mp4'], ['a.mp4', 'b.mp4'], [['1.png', '2.png']])
    """
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        return [value]
    cells = [cell for cell in value if cell is not None and (not isinstance(cell, list | tuple) or len(cell))]
    return [cells] if cells and _is_frame(cells[0]) else cells


def video_info(cell: Any, *, where: str = "video") -> VideoInfo:
    """Number of frames, frames per second and size of a video.

    Args:
        cell (`dict`, `str`, `list` or `VideoInfo`): the video cell of a row, or what is known of it.
        where (`str`): how error messages call it, for example "row 3, column 'videos'".

    Raises:
        DatasetError: the video cannot be read, holds no frames, or its frames differ in size.
    """
    if isinstance(cell, VideoInfo):
        return cell
    if isinstance(cell, list | tuple):
        sizes = {image_size(frame, where=f"{where}, frame {i}") for i, frame in enumerate(cell)}
        if len(sizes) != 1:
            raise DatasetError(f"{where}: frames of {len(sizes)} sizes; the frames of a video must be of one size")
        ((height, width),) = sizes
        return VideoInfo(num_frames=len(cell), height=height, width=width)
    with _open(cell, where) as container:
        stream = container.streams.video[0]
        if _is_cut_off(container):
            raise DatasetError(f"{where}: the file ends before its last frame")
        num_frames = stream.frames or _packets(container, where)
        rotation, height, width = _rotation(container), stream.height, stream.width
        if rotation % 180:
            height, width = width, height
        if not num_frames or not height or not width:
            raise DatasetError(f"{where}: the container tells of {num_frames} frames of {width}x{height} pixels")
        fps = None if stream.average_rate is None else float(stream.average_rate)
    return VideoInfo(num_frames=num_frames, height=height, width=width, fps=fps, rotation=rotation)


def load_frames(cell: Any, info: VideoInfo, indices: Sequence[int], *, where: str = "video") -> npt.NDArray[np.uint8]:
    """Decoded, upright RGB frames, `(num_indices, height, width, 3)`.

    Args:
        cell (`dict`, `str`, `list` or `VideoInfo`): the video cell of a row; a `VideoInfo` has black frames.
        info (`VideoInfo`): what `video_info` says of it.
        indices (`Sequence[int]`): which frames, in any order; a frame may be asked for twice.
        where (`str`): how error messages call it.

    Raises:
        DatasetError: a frame cannot be decoded, or is not what the header says.
    """
    if isinstance(cell, VideoInfo):
        return np.zeros((len(indices), info.height, info.width, 3), dtype=np.uint8)
    wanted = set(indices)
    found: dict[int, npt.NDArray[np.uint8]] = {}
    if isinstance(cell, list | tuple):
        for i in wanted:
            found[i] = np.asarray(load_image(cell[i], where=f"{where}, frame {i}").convert("RGB"))
    else:
        with _open(cell, where) as container:
            try:
                for i, frame in enumerate(container.decode(video=0)):
                    if i in wanted:
                        if frame.rotation % 360 != info.rotation:
                            raise DatasetError(f"{where}: frame {i} is rotated otherwise than the header says")
                        found[i] = np.rot90(frame.to_ndarray(format="rgb24"), info.rotation // 90)
                    if len(found) == len(wanted):
                        break
            except DatasetError:
                raise
            except Exception as error:
                raise DatasetError(f"{where}: the video cannot be decoded: {error}") from error
    if missing := wanted - set(found):
        raise DatasetError(
            f"{where}: the header tells of {info.num_frames} frames, but frame {min(missing)} is not there; the file "
            "may be cut off"
        )
    shapes = {frame.shape for frame in found.values()}
    if shapes != {(info.height, info.width, 3)}:
        raise DatasetError(f"{where}: frames of {sorted(shapes)}, where {info.width}x{info.height} pixels were told")
    return np.stack([found[i] for i in indices])


def _open(cell: Any, where: str) -> Any:
    return open_container(
        cell,
        where=where,
        kind="video",
        stream="video",
        without="lists of frames",
        expected="a path, a dict with 'bytes' or 'path', or a list of frames (cast a column of videos with "
        "datasets.Video(decode=False))",
    )


def _packets(container: Any, where: str) -> int:
    """Frames of a container that keeps no number of them."""
    try:
        return sum(packet.size > 0 for packet in container.demux(video=0))
    except Exception as error:
        raise DatasetError(f"{where}: the video cannot be read: {error}") from error


def _is_cut_off(container: Any) -> bool:
    """Whether the file ends before the last frame that its index tells of."""
    index = container.streams.video[0].index_entries
    if not len(index) or container.size <= 0:
        return False
    last = index[len(index) - 1]
    return bool(last.pos + last.size > container.size)


def _rotation(container: Any) -> int:
    """PyAV tells the rotation of decoded frames alone, and that of the header in the text that FFmpeg prints."""
    import av

    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        told = _ROTATION.search(container.dumps_format())
    finally:
        av.logging.set_level(level)
    return 0 if told is None else round(float(told.group(1)) / 90) * 90 % 360


def _is_frame(cell: Any) -> bool:
    """Whether the items of a list are frames of one video, rather than videos."""
    if hasattr(cell, "convert") and hasattr(cell, "mode"):
        return True
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    if path is not None:
        kind = mimetypes.guess_type(str(path))[0] or ""
        return kind.startswith("image/") and kind != "image/gif"
    if not isinstance(cell, Mapping) or cell.get("bytes") is None:
        return False
    try:
        image_size(cell)
    except DatasetError:
        return False
    return True
