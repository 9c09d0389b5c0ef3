"""Images from any source to RGB, to a size that fits, and to patches; numpy and Pillow only.

Everything here is a pure function of its arguments: no randomness, no global state. Importing this
silences Pillow's own warnings.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mmjax.types import BadSample, ImageSource

MAX_PIXELS = 89_478_485
"""Pixels above which an image is refused unread: Pillow's own threshold for a bomb warning."""

# Sizes are checked here and broken files raise: nothing is left to warn of. Once for the process:
# filters that are changed around a call and put back are mixed up by threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_STRIPE_PIXELS = 500_000  # below, starting a thread costs more than it saves
_LONG_NAME = 300  # of a path; longer ones are pictures in base64, or the like
_SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N"}
_SCALE = ("mmjax", "scale")  # in ``info`` of an image; no file has such a key


def source_name(source: ImageSource) -> str:
    """Name an image source for a message: its path, or what kind of object it is and how large."""
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        return name if len(name) <= _LONG_NAME else f"{name[:_LONG_NAME]}... ({len(name)} long)"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"PIL image {source.mode} {source.size}"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"<{len(source)} bytes>"
    if isinstance(source, list | tuple):
        return f"<{type(source).__name__} of {len(source)}>"
    return f"<array {getattr(source, 'dtype', type(source).__name__)}{np.shape(source)}>"


def to_numpy(source: Any) -> np.ndarray:
    """Return an array of any library as numpy's.

    Raises BadSample("bad_image_type") for what numpy cannot hold or reach, as a tensor of bfloat16
    or on a GPU.
    """
    try:
        return np.asarray(source)
    except (TypeError, RuntimeError) as error:  # torch's, of which JAX's arrays have none
        raise BadSample(
            "bad_image_type",
            f"{source_name(source)}: cannot be read as a numpy array ({error}); give "
            "x.detach().float().cpu().numpy() of a tensor x",
        ) from error


def open_image(
    source: ImageSource, *, max_pixels: int | None = MAX_PIXELS, transpose: bool = False
) -> Image.Image:
    """Open an image by its header alone; the pixels are decoded by ``to_rgb``.

    source: a path, encoded bytes, a PIL image, or uint8[h,w], [h,w,1|3|4] or [1|3|4,h,w].
    max_pixels: refuse more than this many, None for no limit but Pillow's own.
    transpose: apply the EXIF orientation. The peers do not, so neither does the default.
    Raises BadSample: missing_image, corrupt_image, image_too_large, bad_image_type.
    """
    name = source_name(source)
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        image = _open_encoded(source, name)
    else:
        image = _from_array(source, name)
    pixels = image.width * image.height
    if pixels == 0:
        raise BadSample("corrupt_image", f"{name}: the image is empty ({image.size})")
    if max_pixels is not None and pixels > max_pixels:
        raise BadSample(
            "image_too_large",
            f"{name}: {image.width}x{image.height} is {pixels} pixels, above the limit of "
            f"{max_pixels}; shrink the file or raise max_pixels",
        )
    return _decoding(name, ImageOps.exif_transpose, image) if transpose else image


def to_rgb(image: Image.Image, name: str | None = None) -> Image.Image:
    """Decode an opened image into RGB: alpha is dropped, the first frame taken, 16 bits cut to 8.

    Raises BadSample("corrupt_image") naming the source when the data is truncated or broken.
    """
    return _decoding(name or source_name(image), _convert, image)


def load_rgb(source: ImageSource, **options: Any) -> np.ndarray:
    """Read any source into uint8[h,w,3]; options and errors are those of ``open_image``."""
    return np.asarray(to_rgb(open_image(source, **options), source_name(source)))


def scale_of(image: Image.Image) -> float:
    """Return the height of an opened image over that of the picture it was resized from.

    1.0 where ``with_origin`` noted none. Coordinates in a text mean the picture as it was.
    """
    return image.info.get(_SCALE, 1.0)


def with_origin(
    pixels: np.ndarray, image: Image.Image, *, mirrored: bool = False, scale: float = 1.0
) -> np.ndarray | Image.Image:
    """Return uint8[h,w,3] made of an image with what must not be lost of that one.

    That is its EXIF orientation, for ``open_image`` to apply, and its ``scale_of`` times ``scale``,
    by which this step resized it. The pixels as they are where there is neither. mirrored: they
    were mirrored left to right, and come out so when the orientation is applied, too.
    """
    orientation, scale = _orientation(image), scale * scale_of(image)
    if orientation is None and scale == 1.0:
        return pixels
    kept = Image.fromarray(pixels)
    kept.info[_SCALE] = scale
    if orientation is not None:
        # Quarter turns and the two diagonals change places in a mirror.
        turned = {5: 7, 6: 8, 7: 5, 8: 6} if mirrored else {}
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = turned.get(orientation, orientation)
        kept.info["exif"] = exif.tobytes()
    return kept


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation, 2 to 8; None for an image that stands upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF, of which Pillow raises nearly anything, says nothing
        return None
    return orientation if orientation in range(2, 9) else None


def fit_size(
    width: int, height: int, max_width: int | None, max_height: int | None
) -> tuple[int, int]:
    """Fit (width, height) into a box, keeping the aspect: never enlarged, sizes truncated.

    None lifts that limit. The products are taken in the peers' order, because truncation after a
    float product decides whether 1440 becomes 1080 or 1079.
    """
    scale_h = math.inf if max_height is None else max_height / height
    scale_w = math.inf if max_width is None else max_width / width
    scale = min(scale_h, scale_w)
    if scale >= 1:
        return width, height
    return max(1, int(width * scale)), max(1, int(height * scale))


def resize(image: Image.Image, width: int, height: int, resample: int = 2) -> np.ndarray:
    """Resize with Pillow's antialiased filter (2 is bilinear) into uint8[h,w,c].

    First along the rows, then along the columns, with grey levels in between, as torchvision does;
    Pillow in one call picks the cheaper order, which moves some values by one grey level, and more
    with the filters that overshoot (1 and 3), for what leaves 0 to 255 is cut in between. Each pass
    of a large image is cut into stripes for threads (Pillow lets the interpreter go while it
    works); a pass never looks across its stripes, so the result is the same bit for bit.
    """
    if image.size == (width, height):
        return np.asarray(image)
    image.load()
    large = image.width * image.height >= _STRIPE_PIXELS
    stripes = min(4, _CORES, image.height, width) if large else 1
    filter_ = Image.Resampling(resample)

    def rows(first: int, last: int) -> Image.Image:
        part = image.crop((0, first, image.width, last)) if stripes > 1 else image
        return part.resize((width, last - first), filter_)

    def columns(first: int, last: int) -> np.ndarray:
        part = wide.crop((first, 0, last, wide.height)) if stripes > 1 else wide
        return np.asarray(part.resize((last - first, height), filter_))

    if stripes == 1:
        wide = rows(0, image.height)
        return columns(0, width)
    edges = [image.height * i // stripes for i in range(stripes + 1)]
    wide = Image.new(image.mode, (width, image.height))
    # Threads of this call alone: a pool that outlives it would hang in a forked data worker.
    with ThreadPoolExecutor(stripes) as pool:
        for top, part in zip(edges, pool.map(rows, edges[:-1], edges[1:]), strict=False):
            wide.paste(part, (0, top))
        edges = [width * i // stripes for i in range(stripes + 1)]
        return np.concatenate(list(pool.map(columns, edges[:-1], edges[1:])), 1)


def resize_shortest(image: Image.Image, side: int, resample: int = 3) -> Image.Image:
    """Resize so that the shortest side is ``side``, the other one truncated (3 is bicubic).

    One call of Pillow's, as CLIP's transform makes it in torchvision and in transformers alike.
    Raises BadSample("image_too_large") where the longer side would come out above MAX_PIXELS.
    """
    short, long = sorted(image.size)
    long = int(side * long / short)
    if side * long > MAX_PIXELS:
        raise BadSample(
            "image_too_large",
            f"{source_name(image)}: {image.width}x{image.height} with its shortest side brought to "
            f"{side} is {side}x{long}, above the limit of {MAX_PIXELS} pixels; crop it",
        )
    size = (side, long) if image.width <= image.height else (long, side)
    return image if size == image.size else image.resize(size, Image.Resampling(resample))


def center_crop(image: Image.Image, side: int, *, round_down: bool = False) -> np.ndarray:
    """Cut side x side pixels out of the middle of a larger image: uint8[side,side,c].

    Where an odd number of rows is left over, half of it is rounded to the even number, as
    torchvision does; round_down: to the lower one, as transformers does.
    """
    left, top = ((n - side) // 2 if round_down else round((n - side) / 2) for n in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Put an RGB image into the middle of a square of one colour; an odd rest goes to the end."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def pad_to_multiple(pixels: np.ndarray, multiple: int, value: float) -> np.ndarray:
    """Pad [h,w,c] at the bottom and the right until both sides divide by ``multiple``."""
    height, width, channels = pixels.shape
    rows, cols = -(-height // multiple), -(-width // multiple)
    if (rows * multiple, cols * multiple) == (height, width):
        return pixels
    padded = np.full((rows * multiple, cols * multiple, channels), value, pixels.dtype)
    padded[:height, :width] = pixels
    return padded


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """Cut [h,w,c] into patches [p, patch*patch*c]: row-major, and inside rows, columns, channels.

    Raises ValueError when a side does not divide by the patch.
    """
    height, width, channels = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"{height}x{width} (height x width) does not divide by patch {patch}")
    grid = pixels.reshape(height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, patch * patch * channels)


def _open_encoded(source: Any, name: str) -> Image.Image:
    """Read the header of a file or of bytes, turning Pillow's many errors into BadSample."""
    if isinstance(source, str | os.PathLike):
        if not os.path.isfile(source):
            raise BadSample("missing_image", f"{name}: no such image file; check the image folder")
        stream: Any = os.fspath(source)
    else:
        stream = io.BytesIO(source)
    return _decoding(name, Image.open, stream)


def _from_array(source: Any, name: str) -> Image.Image:
    """Wrap uint8 pixels in a PIL image, whichever side the channels stand on."""
    array = np.zeros(0) if isinstance(source, list | tuple) else to_numpy(source)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise BadSample(
            "bad_image_type",
            f"{name}: an image is a path, bytes, a PIL image, or uint8 pixels [h,w] or [h,w,3]",
        )
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[2] not in (3, 4):
        raise BadSample("bad_image_type", f"{name}: expected 1, 3 or 4 channels, first or last")
    if array.size == 0:
        raise BadSample("corrupt_image", f"{name}: the image is empty")
    return Image.fromarray(np.ascontiguousarray(array))


def _convert(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB in one documented way; Pillow would clip 16-bit grey to white."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I":  # 16-bit grey in a 32-bit container
        grey = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.clip(np.nan_to_num(np.asarray(image)), 0, 255)
        return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # without the detour Pillow warns
    return image.convert("RGB")


def _decoding(name: str, function: Any, image: Any) -> Any:
    """Call a Pillow function on untrusted data; every failure becomes a BadSample."""
    try:
        return function(image)
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", f"{name}: {error}") from error
    except MemoryError:
        raise
    # Broken files make Pillow's parsers raise nearly anything: OSError, SyntaxError, struct.error,
    # ValueError, IndexError, zlib.error. All of them mean the same here.
    except Exception as error:
        says = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # its own words hold an object's address
            says = "it is empty, cut off, or of no known format"
        raise BadSample(
            "corrupt_image",
            f"{name}: cannot be read as an image ({says}); replace the file or drop the record",
        ) from error
