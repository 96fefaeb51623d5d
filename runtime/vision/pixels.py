"""Pixels of one picture on their way into a model: RGB, resized, cropped, looked up as float32.

Bit for bit what the NumPy transforms of transformers (`image_transforms.py`) make of 8-bit images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from stillgraph.vision.image_file import check_size, reason, refuse

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Size = tuple[int, int]  # height, width


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with anything transparent laid over white. Raises StillgraphError for a mode that cannot be."""
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow's, for the odd mode
        refuse(f"mode {image.mode} does not become RGB ({reason(error)})", "give an RGB image", error)


def resized(image: Image.Image, size: Size | int, resample: int) -> Image.Image:
    """To a (height, width), or with its shortest edge to so many pixels and the longest rounded down.

    Raises StillgraphError where the result has more than MAX_PIXELS pixels: a line 1 pixel thick grows a lot.
    """
    if isinstance(size, int):
        long = int(size * max(image.size) / min(image.size))
        size = (long, size) if image.width <= image.height else (size, long)
    target = size[1], size[0]
    check_size(target, f"an image of {image.width} x {image.height}, once resized,")
    return image.resize(target, resample=Image.Resampling(resample))


def center_crop(pixels: Bytes, size: Size) -> Bytes:
    """The middle [height, width, 3] of `pixels`, with zeros around where they are fewer.

    An odd pixel too many stays at the end; an odd zero goes to the start.
    """
    result = np.zeros((*size, pixels.shape[2]), pixels.dtype)
    taken, placed = zip(*map(_overlap, pixels.shape[:2], size), strict=True)
    result[placed] = pixels[taken]
    return result


def value_table(scale: float | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> Floats:
    """What each of the 256 values of a channel becomes, [3, 256]: (value * scale - mean) / std.

    A table is exact because a pixel has no other values. The steps keep transformers' types: the product is
    of float64 and rounded to float32, the rest is float32. None leaves a step out.
    """
    values = np.arange(256, dtype=np.float64)
    row = (values if scale is None else values * scale).astype(np.float32)
    table = np.tile(row, (3, 1))
    if mean is not None and std is not None:
        table = (table - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    return table


def looked_up(pixels: Bytes, table: Floats) -> Floats:
    """[height, width, 3] as the table's values, [3, height, width]."""
    return np.stack([table[channel][pixels[..., channel]] for channel in range(3)])


def _overlap(have: int, want: int) -> tuple[slice, slice]:
    """Along one axis: what is taken of the `have` pixels, and where among the `want` it is put."""
    if have >= want:
        start = (have - want) // 2
        return slice(start, start + want), slice(0, want)
    start = (want - have + 1) // 2
    return slice(0, have), slice(start, start + have)
