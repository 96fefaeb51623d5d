"""Pictures of a prompt: read, turned into features once, and put in the place of their tokens.

Input ids name tokens from 0 on. A feature of a picture has an input id below zero, the same one whenever the
same pixels come again: so a cache that holds a prompt knows its pictures.
Shapes: T features of a picture, S tokens, H height, W width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from stillgraph.errors import StillgraphError
from stillgraph.manifest import GraphEntry
from stillgraph.session import Array, Runner, empty, return_memory
from stillgraph.spec import VisionSpec

if TYPE_CHECKING:
    from stillgraph.vision.preprocessor import ImageSource, Preprocessor

Load = Callable[[GraphEntry], Runner]
STAGE = "read prompt"


class Vision:
    """The pictures of a bundle's prompts, and the graph that sees them.

    one_at_a_time: the graph is in memory only while it runs. load_seconds, seconds: spent so far on loading
    it, and on running it.
    """

    def __init__(
        self,
        spec: VisionSpec,
        entry: GraphEntry | None,
        preprocessor: Callable[[], Preprocessor],
        load: Load,
        one_at_a_time: bool = False,
    ) -> None:
        self.spec, self._entry, self._load, self.one_at_a_time = spec, entry, load, one_at_a_time
        self._read_preprocessor = preprocessor
        self._preprocessor: Preprocessor | None = None
        self._numbers = dict[bytes, int]()  # of pictures, by a hash of their pixels; never reused
        self._pixels = dict[int, Array]()  # [3, H, W] of pictures whose features are still to be made
        self._features = dict[int, Array]()  # [T, hidden], of the last request's pictures
        self._call: Callable[[], None] | None = None
        self.load_seconds = self.seconds = 0.0
        if entry is not None and not one_at_a_time:
            self._open(entry)

    def expanded(self, text: str, token: str) -> str:
        """A prompt's text with each mark as the image tokens of a picture. token: the image token's text."""
        spec = self.spec
        return text.replace(spec.mark, spec.before + token * spec.image_tokens + spec.after)

    def place(self, ids: Sequence[int], images: Sequence[ImageSource]) -> list[int]:
        """The ids with those of these pictures' features in place of image tokens. Raises StillgraphError."""
        found, each = list(ids).count(self.spec.image_token), self.spec.image_tokens
        if found != each * len(images):
            marks = f"{found // each} pictures ({found} image tokens of {each} a picture)"
            problem = f"the prompt has room for {marks} and {len(images)} images are given"
            raise StillgraphError(STAGE, problem, f"write {self.spec.mark} once for each image")
        input_ids = (input_id for number in self._numbered(images) for input_id in self._input_ids(number))
        return [next(input_ids) if token == self.spec.image_token else token for token in ids]

    def see(self, prompts: Sequence[Sequence[int]], release: Callable[[], None]) -> None:
        """Make the features that these prompts need and that are not there; forget all others.

        release: called where other graphs are to leave memory first.
        """
        needed = {self._number(input_id) for prompt in prompts for input_id in prompt if input_id < 0}
        self._features = {number: rows for number, rows in self._features.items() if number in needed}
        missing = sorted(needed - set(self._features))
        if missing and self._call is None:
            release()
            self._open(self._graph())
        began = time.perf_counter()
        for number in missing:
            assert self._call is not None
            self._input[:] = self._pixels[number]
            self._call()
            self._features[number] = self._output[0].copy()
        self.seconds += time.perf_counter() - began
        self._pixels.clear()
        if self.one_at_a_time and self._call is not None:
            self._call = None
            return_memory()

    def reset(self) -> None:
        """Forget all features; a picture that comes again is seen again."""
        self._features.clear()

    def fill(self, input_ids: Sequence[int], rows: Array) -> None:
        """Put the features of the ids below zero into their rows of [S, hidden]."""
        for index, input_id in enumerate(input_ids):
            if input_id < 0:
                rows[index] = self._features[self._number(input_id)][(-1 - input_id) % self.spec.image_tokens]

    def _input_ids(self, number: int) -> Iterator[int]:
        first = number * self.spec.image_tokens
        return (-1 - (first + index) for index in range(self.spec.image_tokens))

    def _number(self, input_id: int) -> int:
        return (-1 - input_id) // self.spec.image_tokens

    def _numbered(self, images: Iterable[ImageSource]) -> Iterator[int]:
        """The number of each picture."""
        for pixels in self._read(list(images)):
            digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
            number = self._numbers.setdefault(digest, len(self._numbers))
            self._pixels[number] = pixels
            yield number

    def _read(self, images: list[ImageSource]) -> Sequence[Array]:
        """float32 [3, H, W] each. Raises StillgraphError for an image or a config that cannot be read."""
        if not images:
            return []
        self._graph()
        if self._preprocessor is None:
            self._preprocessor = self._read_preprocessor()
        pixels: Array = self._preprocessor.pixel_values(images)
        wanted = self.spec.channels, self.spec.height, self.spec.width
        if pixels.shape[1:] != wanted:
            problem = f"images become {pixels.shape[1:]} pixels and the vision graph takes {wanted}"
            raise StillgraphError(
                "read image", problem, "fix the checkpoint's preprocessor_config.json and export again"
            )
        return list(pixels)

    def _graph(self) -> GraphEntry:
        if self._entry is None:
            remedy = "add one with 'stillgraph export vision' into the same --out"
            raise StillgraphError(STAGE, "the bundle has no vision graph", remedy)
        return self._entry

    def _open(self, entry: GraphEntry) -> None:
        began = time.perf_counter()
        pixels, features = entry.input("pixels"), entry.output("image_features")
        self._input, self._output = empty(pixels), empty(features)
        self._call = self._load(entry).bind({pixels.name: self._input, features.name: self._output})
        self.load_seconds += time.perf_counter() - began
