"""A picture from a file, from bytes or from Pillow, decoded once, or refused in one sentence."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import IO, NoReturn, TypeAlias

from PIL import Image, ImageOps, UnidentifiedImageError

from stillgraph.errors import StillgraphError

ImageSource: TypeAlias = "str | Path | bytes | Image.Image"

# Where Pillow begins to warn of a decompression bomb: a quarter of a GiB at 3 bytes a pixel.
MAX_PIXELS = 89_478_485
# Pillow reads forty more. Left out is what starts a program (EPS), changes size once decoded (ICO, ICNS),
# or has no signature at its start (TGA). MPO, a photo with previews behind it, comes as JPEG.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
KNOWN = "give an image as " + ", ".join(FORMATS[:-1]) + " or " + FORMATS[-1]


def open_image(source: ImageSource) -> Image.Image:
    """The picture of a path (never a URL), of a file's bytes, or of Pillow, decoded.

    Path and bytes: what `transformers.image_utils.load_image` gives, that is RGB, upright as EXIF says, with
    alpha left out. An image of Pillow comes back as it is, mode, alpha, frame and orientation: what a
    processor of transformers is given then too. 16-bit and float gray is not scaled: Pillow clips to 0..255.
    Raises StillgraphError ("read image") for anything that is not a single picture of 1 to MAX_PIXELS pixels;
    the count is read from the header, before anything is decoded.
    """
    if isinstance(source, Image.Image):
        check_size(source.size, "the image")
        return _loaded(source, "the image")
    if isinstance(source, bytes):
        return _decode(BytesIO(source), "the data", len(source))
    if not isinstance(source, str | Path):
        kind = type(source).__name__
        refuse(f"an image was given as {kind}", "give a path, the bytes of a file or an image of Pillow")
    path = Path(source)
    try:
        if not path.is_file():
            there = "is not a file" if path.exists() else "does not exist"
            refuse(f"{path} {there}", "give the path of an image file")
        with path.open("rb") as file:
            return _decode(file, str(path), path.stat().st_size)
    except OSError as error:
        refuse(f"{path} cannot be read ({error.strerror})", "check the path and its permissions", error)


def check_size(size: tuple[int, int], name: str) -> None:
    """Refuse a (width, height) of no pixels, or of more than MAX_PIXELS. Raises StillgraphError."""
    width, height = size
    if width * height == 0:
        refuse(f"{name} has no pixels ({width} x {height})", "give one of at least 1 x 1")
    if width * height > MAX_PIXELS:
        refuse(f"{name} is {width} x {height}, over {MAX_PIXELS} pixels", "make it smaller first")


def refuse(problem: str, remedy: str, cause: Exception | None = None) -> NoReturn:
    """Raise the StillgraphError of this file's stage."""
    raise StillgraphError("read image", problem, remedy) from cause


def reason(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _decode(file: IO[bytes], name: str, nbytes: int) -> Image.Image:
    if nbytes == 0:
        refuse(f"{name} is empty", KNOWN)
    try:
        image = Image.open(file, formats=FORMATS)
        check_size(image.size, name)
        # MPO: a phone's photo with previews of it behind
        if image.format != "MPO" and getattr(image, "is_animated", False):
            refuse(f"{name} has more than one frame", "give one frame of it")
    except StillgraphError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        refuse(f"{name} is over {MAX_PIXELS} pixels", "make it smaller first", error)
    except UnidentifiedImageError as error:
        refuse(f"{name} is not an image of a known kind", KNOWN, error)
    except Exception as error:  # what a decoder raises for bad data is not documented, and differs by format
        refuse(f"{name} cannot be decoded ({reason(error)})", "save the image again", error)
    return _loaded(image, name, upright=True)


def _loaded(image: Image.Image, name: str, upright: bool = False) -> Image.Image:
    try:
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB") if upright else image
    except Exception as error:  # as above
        refuse(f"{name} cannot be decoded ({reason(error)})", "save the image again", error)
