"""Put MMC4's documents and downloaded pictures into WebDataset shards, for kind="mmc4".

python -m mmjax.data.mmc4_to_webdataset OUT docs_shard_{0..99}_v2.jsonl.zip --images PICTURES

Documents are MMC4's .jsonl.zip, or .jsonl. The pictures of the n-th of them, counted from 0, lie in
PICTURES/n/ or all in PICTURES, under their ``image_name``. Their files are taken as they are; a
picture that was not downloaded is left out of its document, and counted; the exit code is 1 when
none was found.
"""

import base64
import collections
import io
import itertools
import json
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from mmjax.cli import Parser, print_error, run_guarded
from mmjax.data.webdataset import expand_shards
from mmjax.monitor.terminal import track
from mmjax.partial import new_folder, refuse_existing
from mmjax.types import MMJaxError


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("mmjax.data.mmc4_to_webdataset", __doc__)
    parser.add_argument("out", help="the folder to write; it must not exist")
    parser.add_argument("documents", nargs="+", help=".jsonl.zip or .jsonl files, braces allowed")
    parser.add_argument("--images", required=True, help="the folder of the pictures")
    parser.add_argument("--shard_samples", type=int, default=1000, help="documents in a shard")
    args = parser.read(argv)
    out, images = Path(args.out), Path(args.images)
    refuse_existing(out)
    if not images.is_dir() or args.shard_samples < 1:
        raise MMJaxError(
            f"--images {images}, --shard_samples {args.shard_samples}: want a folder that exists "
            "and at least 1"
        )
    files = expand_shards(args.documents)
    counts: collections.Counter[str] = collections.Counter()
    every = track(enumerate(files), len(files), "files", console=Console(stderr=True))
    found = (one for number, file in every for one in _documents(file, number, images, counts))
    write_shards(found, out, args.shard_samples)
    for what, count in counts.items():
        print(f"{out}: {count:,} {what}")
    if not counts["pictures"]:
        print_error(
            f"{out}: no picture was found; --images is a folder of the pictures, or of a folder "
            "for each file of documents, named by its place, 0, 1, ..."
        )
        return 1
    return 0


def write_shards(documents: Iterator[tuple[str, dict]], out: Path, shard_samples: int) -> None:
    """Write (key, document) as ``00000.tar``, ...; the folder appears when it is whole."""
    with new_folder(out) as partial:
        numbered = itertools.groupby(enumerate(documents), lambda one: one[0] // shard_samples)
        number = None
        for number, group in numbered:
            with tarfile.open(partial / f"{number:05}.tar", "w") as shard:
                for _, (key, document) in group:
                    data = json.dumps(document).encode()
                    member = tarfile.TarInfo(f"{key}.json")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
        if number is None:
            raise MMJaxError(f"{out}: there is no document to write")


def _documents(
    file: Path, number: int, images: Path, counts: collections.Counter[str]
) -> Iterator[tuple[str, dict]]:
    """Yield the documents of a file with their pictures in them; count what is found and not."""
    folder = images / str(number) if (images / str(number)).is_dir() else images
    for line, text in enumerate(_lines(file), 1):
        if not text.strip():
            continue
        try:
            document = json.loads(text)
            listed = document["image_info"]
            names = [str(one["image_name"]) for one in listed]
        except (ValueError, KeyError, TypeError) as e:
            raise MMJaxError(f"{file}:{line}: is no MMC4 document ({type(e).__name__}: {e})") from e
        counts["documents"] += 1
        for one, name in zip(listed, names, strict=True):
            try:
                # The name alone: a document from the web does not choose folders on this disk.
                data = (folder / Path(name).name).read_bytes()
            except OSError:
                counts["pictures not found"] += 1
            else:
                one["image_base64"] = base64.b64encode(data).decode()
                counts["pictures"] += 1
        yield f"{number:05}-{line:07}", document


def _lines(file: Path) -> Iterator[bytes]:
    """Read the lines of a file, or of the first file in a zip archive, as MMC4's are."""
    if not zipfile.is_zipfile(file):
        with open(file, "rb") as opened:
            yield from opened
        return
    try:
        with zipfile.ZipFile(file) as archive, archive.open(archive.namelist()[0]) as opened:
            yield from opened
    except (zipfile.BadZipFile, zlib.error, EOFError, IndexError) as e:
        raise MMJaxError(f"{file}: a damaged archive ({e}); fetch it again") from e


if __name__ == "__main__":
    sys.exit(run_guarded(main))
