"""From a dataset row to what the processor gets, and to the labels of its tokens.

    layout.py   columns of a dataset → `Row` (messages with content parts, image cells, video cells)
    turns.py    turns as written → turns with content parts
    images.py   image cell → size from its header, or the decoded picture
    videos.py   video cell → length and size from its header, or the frames that are asked for
    video_run.py a processor run on a video that has a length and a size, but no pixels
    render.py   `Row` → text with one placeholder per image and video, and the spans that are learned
    template.py the chat template as a quick function
    labels.py   spans and token offsets → which tokens are labels
    encode.py   rows → the batch of tensors that the model gets

`encode` is the one place where samples become tensors: the collator trains on it, and the profile is verified
against it. Everything that counts tokens without pixels shares `layout`, `render` and `labels` with it.
"""

from hf_dflop.rows.encode import encode
from hf_dflop.rows.images import image_size, load_image
from hf_dflop.rows.layout import Layout, Row, detect_layout, read_row
from hf_dflop.rows.render import Rendered, Renderer, image_token
from hf_dflop.rows.videos import video_info

__all__ = [
    "Layout",
    "Rendered",
    "Renderer",
    "Row",
    "detect_layout",
    "encode",
    "image_size",
    "image_token",
    "load_image",
    "read_row",
    "video_info",
]
