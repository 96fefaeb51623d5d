"""Pictures as a vision model takes them: the steps a checkpoint's preprocessor_config.json says.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillgraph.calling import ImagePreprocessing, Number, Triple
from stillgraph.errors import StillgraphError
from stillgraph.tokenizer import read_json
from stillgraph.vision.image_file import ImageSource, open_image, refuse
from stillgraph.vision.pixels import Floats, Size, center_crop, looked_up, resized, to_rgb, value_table

__all__ = ["ImageSource", "Preprocessor", "open_image"]

CONFIG, NESTED = "preprocessor_config.json", "processor_config.json"
# A step, and the values that it needs.
NEEDS: dict[str, tuple[str, ...]] = {
    "do_convert_rgb": (),
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}
UNREAD = ("use_square_size", "auto_map")  # other pixels, and code of the checkpoint's own
HALF = (0.5, 0.5, 0.5)
COMMON: dict[str, Any] = dict.fromkeys(NEEDS, True) | {"do_center_crop": False, "rescale_factor": 1 / 255}
CLIP: dict[str, Any] = COMMON | {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "default_to_square": False,
    "resample": 3,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
SIGLIP: dict[str, Any] = COMMON | {
    "size": {"height": 224, "width": 224},
    "default_to_square": False,
    "resample": 3,
    "image_mean": HALF,
    "image_std": HALF,
}
# A processor's own values, where its config says nothing; transformers has them as class attributes.
DEFAULTS = {
    "CLIPImageProcessor": CLIP,
    "LlavaImageProcessor": CLIP,
    "SiglipImageProcessor": SIGLIP,
    "Gemma3ImageProcessor": SIGLIP | {"default_to_square": True, "resample": 2},
}


class Options(BaseModel):
    """What is read of a config file. All else there is ignored, as transformers ignores it."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    do_resize: bool
    do_center_crop: bool
    do_rescale: bool
    do_normalize: bool
    do_convert_rgb: bool
    default_to_square: bool
    size: int | list[int] | dict[str, int] | None
    crop_size: int | list[int] | dict[str, int] | None = None
    resample: Annotated[int, Field(ge=0, le=5)] | None
    rescale_factor: Number | None
    image_mean: Number | Annotated[Triple, Field(strict=False)] | None
    image_std: Number | Annotated[Triple, Field(strict=False)] | None


class Preprocessor(ImagePreprocessing):
    """The steps from a picture to `pixel_values`, carried out; scale, mean, std: see `value_table`."""

    @classmethod
    def read(cls, path: str | Path) -> Preprocessor:
        """Of a preprocessor_config.json, of a processor_config.json with one inside, or of their folder.

        Raises StillgraphError where there is none, and where `of` does.
        """
        path = Path(path)
        files = [path / NESTED, path / CONFIG] if path.is_dir() else [path]
        for file in files:  # in transformers' order: the nested one counts
            raw = read_json(file)
            nested = raw.get("image_processor")
            if isinstance(nested, dict):
                return cls.of(nested)
            if raw and file.name != NESTED:
                return cls.of(raw)
        return _unread(f"{path} has no image processor", f"give a checkpoint's {CONFIG}")

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Preprocessor:
        """Of a config's values. `...Fast` and `...Pil` are read as the same processor: Pillow's.

        Raises StillgraphError for a processor or a step that is not known here, and for wrong values.
        """
        kind = _kind(raw)
        values = _filled(kind, raw)
        _check_steps(kind, values)
        try:
            return cls(**_steps(Options.model_validate(values)))
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            _unread(f"{kind}: {name} is {values.get(name)!r}", f"fix {CONFIG}")

    def pixel_values(self, images: Sequence[ImageSource]) -> Floats:
        """float32 [B, 3, H, W] of `images` (see `open_image`), bit for bit those of transformers' `...Pil`.

        One difference: with neither rescaling nor normalization they are float32 here and uint8 there.
        Raises StillgraphError ("read image") for no images, one that cannot be read, and sizes that differ
        where no step makes them equal.
        """
        if isinstance(images, str | Path | bytes | Image.Image) or not images:
            refuse(f"no list of images, but {type(images).__name__}", "give a list of at least one")
        table = value_table(self.scale, self.mean, self.std)
        rows = [self._one(open_image(source), table) for source in images]
        sizes = sorted({row.shape[1:] for row in rows})
        if len(sizes) > 1:
            problem = f"images become {sizes[0]} and {sizes[-1]} pixels, (height, width)"
            refuse(problem, "give images of one size, or one at a time")
        return np.stack(rows)

    def _one(self, image: Image.Image, table: Floats) -> Floats:
        if self.convert_rgb:
            image = to_rgb(image)
        elif image.mode != "RGB":
            refuse(f"mode {image.mode}, and the model's processor does not convert", "give an RGB image")
        if self.size is not None and self.resample is not None:
            image = resized(image, self.size, self.resample)
        pixels = np.asarray(image)  # [H, W, 3]
        return looked_up(pixels if self.crop is None else center_crop(pixels, self.crop), table)


def _kind(raw: Mapping[str, Any]) -> str:
    """The processor's name without its backend's. Raises StillgraphError for one that is not known."""
    old = str(raw.get("feature_extractor_type") or "").replace("FeatureExtractor", "ImageProcessor")
    name = str(raw.get("image_processor_type") or old)
    kind = name.removesuffix("Fast").removesuffix("Pil")
    if kind not in DEFAULTS:
        problem = (
            f"image_processor_type {name!r} is not known" if name else "no image_processor_type is given"
        )
        _unread(problem, "use a model with one of " + ", ".join(sorted(DEFAULTS)))
    return kind


def _filled(kind: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` over the processor's own values. A null is no value of its own: it leaves a step out.

    Except for do_convert_rgb: Gemma 3's checkpoints have null there, and Gemma3Processor then asks for it.
    """
    off = dict.fromkeys([*NEEDS, "default_to_square"], False) | {"do_convert_rgb": True}
    values = DEFAULTS[kind] | dict(raw)
    return values | {name: value for name, value in off.items() if values[name] is None}


def _check_steps(kind: str, values: Mapping[str, Any]) -> None:
    """Raises StillgraphError for a step that is not known here, and for one without its numbers."""
    known = NEEDS.keys() - ({"do_center_crop"} if kind == "Gemma3ImageProcessor" else set())
    for name, value in values.items():
        if value and (name in UNREAD or (name.startswith("do_") and name not in known)):
            _unread(f"{kind}: {name} is not supported", "use a model whose processor does not need it")
        if value and (missing := [need for need in NEEDS.get(name, ()) if values.get(need) is None]):
            _unread(f"{kind}: {name} without {missing[0]}", f"fix {CONFIG}")


def _steps(options: Options) -> dict[str, Any]:
    """The fields of a Preprocessor. Raises StillgraphError for numbers that no picture can be made with."""
    std = _triple(options.image_std) if options.do_normalize else None
    if std and not all(np.float32(value) for value in std):
        _unread("image_std is 0", f"fix {CONFIG}")
    crop = _size("crop_size", options.crop_size, square=True) if options.do_center_crop else None
    if isinstance(crop, int):
        _unread("crop_size has no height and width", f"fix {CONFIG}")
    return {
        "size": _size("size", options.size, options.default_to_square) if options.do_resize else None,
        "resample": options.resample if options.do_resize else None,
        "crop": crop,
        "scale": options.rescale_factor if options.do_rescale else None,
        "mean": _triple(options.image_mean) if options.do_normalize else None,
        "std": std,
        "convert_rgb": options.do_convert_rgb,
    }


def _size(name: str, value: int | list[int] | dict[str, int] | None, square: bool) -> Size | int:
    """(height, width), or a shortest edge. Raises StillgraphError for another kind, or for 0."""
    size: Size | int | None = None
    if isinstance(value, int):
        size = (value, value) if square else value
    elif isinstance(value, list) and len(value) == 2:
        size = value[0], value[1]
    elif isinstance(value, dict) and value.keys() == {"height", "width"}:
        size = value["height"], value["width"]
    elif isinstance(value, dict) and value.keys() == {"shortest_edge"}:
        size = value["shortest_edge"]
    if size is None or np.min(size) < 1:
        _unread(f"{name} {value} is not supported", "use a model with height and width or shortest_edge")
    return size


def _triple(value: float | Triple | None) -> Triple | None:
    return (value, value, value) if isinstance(value, float | int) else value


def _unread(problem: str, remedy: str) -> NoReturn:
    raise StillgraphError("read image processor", problem, remedy)
