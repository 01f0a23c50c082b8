"""Sound files, made by PyAV."""

import io

import av
import numpy as np

CODECS = {"wav": "pcm_s16le", "flac": "flac", "ogg": "libopus", "mp3": "libmp3lame", "mp4": "aac"}


def sound(container: str, num_samples: int, rate: int = 16_000, *, layout: str = "mono") -> bytes:
    """A file of a tone of so many samples."""
    file = io.BytesIO()
    tone = np.sin(np.arange(num_samples) / 5).astype(np.float32)
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(CODECS[container], rate=rate, layout=layout)
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(np.tile(tone, (1 if layout == "mono" else 2, 1)), "fltp", layout)
        frame.sample_rate = rate
        size = stream.codec_context.frame_size or 1024
        queue = av.AudioFifo()
        for piece in av.AudioResampler(stream.codec_context.format, layout, rate).resample(frame):
            queue.write(piece)
        while queue.samples:
            for packet in stream.encode(queue.read(size, partial=True)):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)
    return file.getvalue()
