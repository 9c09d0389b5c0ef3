"""MMC4 documents and ChatGPT sequences, beside what OpenFlamingo's own loader makes of them."""

import base64
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from stub_processor import StubProcessor
from test_webdataset import write_tar

from mmjax.data.catalog import make_source
from mmjax.data.examples import make_loader
from mmjax.data.images import load_rgb
from mmjax.data.mixture import Mixture
from mmjax.data.mmc4 import Mmc4Source
from mmjax.data.mmc4_to_webdataset import main as convert
from mmjax.data.packing import BatchShape
from mmjax.data.sums import SumsSource
from mmjax.data.templates import TEMPLATES
from mmjax.types import BadSample, MMJaxError

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from make_flamingo_document_goldens import (  # noqa: E402
    FEWEST,
    MOST,
    THRESHOLD,
    chat,
    document,
    documents,
    picture,
)

PEER = json.loads((GOLDEN / "flamingo_documents.json").read_text("utf-8"))["documents"]
AS_PEER = dict(
    textsim_threshold=THRESHOLD,
    max_images=MOST,
    min_images=FEWEST,
    single_image_share=1.0,
    legacy_openflamingo=True,
)
MARKS = {"bos": "", "eos": "</s>", "eoc": "<|endofchunk|>"}


def write(path, infos):
    """Write documents, name -> document, into a shard."""
    return write_tar(path, [(f"{k}.json", json.dumps(v).encode()) for k, v in infos.items()])


@pytest.fixture
def one(tmp_path):
    """Return a function that makes the record of a single document."""

    def make(info, **options):
        write(tmp_path / "one.tar", {"d": info})
        return Mmc4Source(tmp_path / "one.tar", **options)[0]

    return make


def laid_out(record):
    """The text of the template ``interleaved``, and the numbers that the pictures show."""
    segments = TEMPLATES["interleaved"](record)
    text = "".join(
        "<image>" if s.kind == "image" else MARKS[s.value] if s.kind == "special" else s.value
        for s in segments
    )
    order = [s.value for s in segments if s.kind == "image"]
    assert order == list(range(len(record.images)))
    return text, [int(load_rgb(image)[0, 0, 0]) for image in record.images]


@pytest.mark.parametrize("name", documents())
def test_a_document_is_what_the_peer_makes_of_it(one, name):
    wanted, info = PEER[name], documents()[name]
    if "rejected" in wanted:
        with pytest.raises(BadSample) as error:
            one(info, **AS_PEER)
        assert error.value.reason == "too_few_images"
        return
    text, order = laid_out(one(info, **AS_PEER))
    # White space at a mark: the peer takes away one space, the template all of it. A sequence cut
    # at a picture keeps the <|endofchunk|> before it.
    peer = re.sub(r"\s+<\|endofchunk\|>", "<|endofchunk|>", wanted["text"])
    peer = peer.replace("<|endofchunk|><|endofchunk|></s>", "<|endofchunk|></s>")
    assert text == peer
    # Of a sequence that is cut the peer hands over a picture more, which no text looks at.
    assert order == wanted["order"][: peer.count("<image>")]


def test_pictures_stand_at_their_own_sentences_unless_the_peers_way_is_asked_for(one):
    info = documents()["sentences in another order"]
    assert laid_out(one(info)) == (
        "<image>Aa.<|endofchunk|><image>Bb.<|endofchunk|><image>Cc.<|endofchunk|></s>",
        [1, 2, 0],
    )
    assert laid_out(one(info, legacy_openflamingo=True))[1] == [0, 1, 2]
    sequence = documents()["chat in another order"]
    assert laid_out(one(sequence))[1] == [1, 0]
    assert laid_out(one(sequence, legacy_openflamingo=True))[1] == [0, 1]
    long = documents()["chat with more"]
    assert laid_out(one(long, max_images=4))[1] == [0, 1, 2, 3]
    assert laid_out(one(long, max_images=4, legacy_openflamingo=True))[1] == [0, 1, 2]
    twice = chat("A _!_IMAGE2_!_ b. _!_IMAGE2_!_ c.", 3)
    assert laid_out(one(twice)) == ("A<image>b.<|endofchunk|><image>c.<|endofchunk|></s>", [1, 1])


def test_one_to_one_gives_every_picture_a_sentence_of_its_own(one):
    sentences = ["Aa.", "Bb.", "Cc."]
    matrix = [[0.3, 0.9, 0.1], [0.2, 0.8, 0.7]]
    assert laid_out(one(document(sentences, matrix)))[0].startswith("Aa.<image><|endofchunk|><im")
    # 0.9 + 0.7 is more than 0.3 + 0.8, so the second picture gives way.
    best = laid_out(one(document(sentences, matrix), assignment="one_to_one"))
    assert best == ("Aa.<image>Bb.<|endofchunk|><image>Cc.<|endofchunk|></s>", [0, 1])
    # More pictures than sentences: one is left over. The small one takes no part.
    crowd = document(["Aa.", "Bb."], [[0.9, 0.9], [0.5, 0.3], [0.4, 0.6]], [5_000, 11_000, 11_000])
    assert laid_out(one(crowd, assignment="one_to_one"))[1] == [1, 2]
    assert laid_out(one(crowd, assignment="one_to_one", min_kilobytes=None))[1] == [0, 2]
    # A pair below the threshold goes after the assignment.
    weak = document(["Aa.", "Bb."], [[0.9, 0.0], [0.8, 0.1]])
    found = one(weak, assignment="one_to_one", single_image_share=1.0)
    assert laid_out(found) == ("<image>Aa. Bb.<|endofchunk|></s>", [0])


def test_matched_takes_the_pairs_of_the_file(one):
    info = document(["Aa.", "Bb."], [[0.9, 0.1]] * 3)
    for picture_info, index, score in zip(
        info["image_info"], (1, 0, 1), (0.3, 0.5, 0.2), strict=True
    ):
        picture_info |= {"matched_text_index": index, "matched_sim": score}
    text, order = laid_out(one(info, assignment="matched"))
    assert (text, order) == ("<image>Aa.<|endofchunk|><image>Bb.<|endofchunk|></s>", [1, 0])
    for wrong in (dict(matched_text_index=2), dict(matched_sim=10**400)):
        info["image_info"][1] |= dict(matched_text_index=1, matched_sim=0.5) | wrong
        with pytest.raises(BadSample, match="picture 1: 'matched_text.* none of 2 sent"):
            one(info, assignment="matched")


def test_single_pictures_are_kept_by_seed_and_id(tmp_path):
    infos = {f"{i:03}": document(["Aa."], [[0.5]]) for i in range(200)}
    infos["two"] = document(["Aa."], [[0.5], [0.6]])
    infos["chat"] = chat("_!_IMAGE1_!_ One.", 1)
    path = write(tmp_path / "a.tar", infos)

    def kept(**options):
        source, found = Mmc4Source(path, **options), []
        for i in range(len(source)):
            try:
                found.append(source[i].meta["id"].removeprefix("a.tar/"))
            except BadSample as error:
                assert error.reason == "single_image"
        assert found[-2:] == ["two", "chat"]
        return found[:-2]

    half = kept()
    assert 70 < len(half) < 130 and half == kept()  # three standard deviations
    assert half != kept(seed=1)
    assert set(kept(single_image_share=0.25)) < set(half)
    assert (len(kept(single_image_share=1.0)), len(kept(single_image_share=0.0))) == (200, 0)


def test_min_images_counts_what_is_left(one):
    info = documents()["at the threshold"]
    assert len(one(info, min_images=2).images) == 2
    with pytest.raises(BadSample, match=r"2 picture\(s\) are left, min_images is 3"):
        one(info, min_images=3)
    with pytest.raises(BadSample, match=r"0 picture\(s\) are left"):
        one(chat("Words.", 0))


def test_base64_that_an_old_converter_wrote_is_read(one):
    info = document(["Aa."], [[0.5], [0.5]])
    info["image_info"][1]["image_base64"] = str(picture(7).encode())
    assert laid_out(one(info))[1] == [0, 7]


def spoilt(**changes):
    return document(["Aa."], [[0.5]]) | changes


@pytest.mark.parametrize(
    "info, reason, says",
    [
        ([1], "bad_json", "expected an object, got list"),
        (spoilt(text_list="Aa."), "bad_record", "'text_list' is no list"),
        (spoilt(text_list=["an <image> tag"]), "image_mismatch", "the text itself holds <image>"),
        (spoilt(image_info={}), "bad_record", "'image_info' is no list"),
        (spoilt(similarity_matrix=[[0.5, 0.2]]), "bad_record", r"shape \[1, 2\].* 1 sentences"),
        (spoilt(similarity_matrix=[[0.5], [0.1]]), "bad_record", "one row for each of 1 pictures"),
        (spoilt(similarity_matrix=[[None]]), "bad_record", "similarity_matrix"),
        (spoilt(similarity_matrix=[[10**400]]), "bad_record", "similarity_matrix"),
        (spoilt(similarity_matrix=[[0.5], "x"]), "bad_record", "similarity_matrix"),
        (spoilt(similarity_matrix=None), "bad_record", "similarity_matrix"),
        (spoilt(image_info=[{"image_base64": 5}]), "corrupt_image", "picture 0: is int"),
        (spoilt(image_info=[{"image_base64": "!!"}]), "corrupt_image", "picture 0: not base64"),
        ({"is_gpt": 1, "example": "x"}, "bad_record", "'image_map'"),
        (chat("_!_IMAGE3_!_ x", 2), "image_mismatch", "lacks picture 3"),
    ],
)
def test_a_broken_document_is_a_bad_sample(one, info, reason, says):
    with pytest.raises(BadSample, match=says) as error:
        one(info)
    assert error.value.reason == reason
    assert re.search(r"one.tar: byte 0 \(id one.tar/d\)", str(error.value))


def test_what_is_no_document(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.json", b'{"a": '), ("1.txt", b"x")])
    source = make_source(dict(kind="mmc4", path=str(tmp_path)))
    for i, (reason, says) in enumerate(
        [("bad_json", "cannot be read as JSON"), ("bad_record", r"no json \(found txt\)")]
    ):
        with pytest.raises(BadSample, match=says) as error:
            source[i]
        assert error.value.reason == reason


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(assignment="hungarian"), "'hungarian' is none of argmax, one_to_one, matched"),
        (dict(max_images=0), "max_images 0"),
        (dict(min_images=7), "min_images 7, max_images 6"),
        (dict(single_image_share=1.5), "single_image_share 1.5"),
        (dict(min_kilobyte=3), "source.min_kilobyte; did you mean 'min_kilobytes'"),
        (dict(textsim_threshold="0.3"), "source.textsim_threshold: expected float, got str '0.3'"),
    ],
)
def test_options_are_checked_before_a_shard_is_opened(options, says):
    with pytest.raises(MMJaxError, match=says):
        Mmc4Source("gone.tar", **options)


def test_the_similarity_of_argmax_is_that_of_its_sentence(one):
    matrix = np.full((2, 3), 0.1)
    matrix[0, 2], matrix[1, 1] = 0.24, 0.3
    assert laid_out(one(document(["Aa.", "Bb.", "Cc."], matrix.tolist())))[1] == [1, 0]


@pytest.fixture
def downloaded(tmp_path):
    """Two files of documents, one of them a zip, and pictures in a folder each."""
    info = document(["Aa.", "Bb."], [[0.9, 0.1], [0.1, 0.8], [0.2, 0.7]], absent=(0, 1, 2))
    text = "\n".join(json.dumps(info) for _ in range(3)) + "\n\n"
    (tmp_path / "docs_0.jsonl").write_text(text)
    with zipfile.ZipFile(tmp_path / "docs_1.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs_1.jsonl", text)
    for folder in (0, 1):
        (tmp_path / f"pictures/{folder}").mkdir(parents=True)
        for i in (0, 2):
            data = base64.b64decode(picture(10 * folder + i))
            (tmp_path / f"pictures/{folder}/{i}.png").write_bytes(data)
    return tmp_path


def test_documents_and_pictures_become_shards(downloaded, capsys):
    out = downloaded / "out"
    arguments = [f"{downloaded}/docs_{{0.jsonl,1.jsonl.zip}}", f"--images={downloaded}/pictures"]
    assert convert([str(out), *arguments, "--shard_samples=4"]) == 0
    assert [p.name for p in sorted(out.iterdir())] == ["00000.tar", "00001.tar"]
    printed = capsys.readouterr().out
    for says in ("6 documents", "12 pictures\n", "6 pictures not found"):
        assert f"out: {says}" in printed
    source = Mmc4Source(out)
    assert len(source) == 6 and source[5].meta["id"] == "00001.tar/00001-0000003"
    assert laid_out(source[0]) == ("<image>Aa.<|endofchunk|><image>Bb.<|endofchunk|></s>", [0, 2])
    assert laid_out(source[3])[1] == [10, 12]
    secret = document(["Aa."], [[0.9]], absent=(0,))
    secret["image_info"][0]["image_name"] = "../docs_1.jsonl.zip"
    (downloaded / "docs_0.jsonl").write_text(json.dumps(secret))
    assert convert([f"{out}2", f"{downloaded}/docs_0.jsonl", *arguments[1:]]) == 1
    assert "pictures not found" in capsys.readouterr().out
    assert convert([f"{out}3", f"{downloaded}/docs_1.jsonl.zip", f"--images={out}"]) == 1
    assert "no picture was found" in capsys.readouterr().err
    with pytest.raises(MMJaxError, match="out: exists already"):
        convert([str(out), *arguments])


def test_documents_under_a_template_of_answers_are_refused_before_one_is_read(tmp_path):
    write(tmp_path / "one.tar", {"d": {}})  # would be a bad record
    one, words = Mmc4Source(tmp_path / "one.tar"), SumsSource("train")

    def load(sources, template):
        return make_loader(Mixture.of(sources), template, StubProcessor(), BatchShape(1, 8, 0, 1))

    with pytest.raises(
        MMJaxError, match="'mmc4' .* 'otter_chat' .* data.template to 'interleaved'"
    ):
        load({"mmc4": one}, "otter_chat")
    fix = "set data.template to {'mmc4': 'interleaved', 'vqa': 'fuyu_chat'}"
    with pytest.raises(MMJaxError, match=re.escape(fix)):
        load({"mmc4": one, "vqa": words}, "fuyu_chat")
    load({"mmc4": one, "vqa": words}, {"mmc4": "interleaved", "vqa": "fuyu_chat"})
    load({"mmc4": one}, lambda record: [])  # of one's own


def test_a_damaged_archive_is_named(downloaded):
    file = downloaded / "docs_1.jsonl.zip"
    data = bytearray(file.read_bytes())
    data[60:80] = bytes(20)  # within the compressed lines
    file.write_bytes(data)
    with pytest.raises(MMJaxError, match="docs_1.jsonl.zip: a damaged archive .*fetch it again"):
        convert([str(downloaded / "out"), str(file), f"--images={downloaded}/pictures"])
    assert not list(downloaded.glob("out*"))


@pytest.mark.parametrize(
    "text, says",
    [
        ("{}\n", r"docs_0.jsonl:1: is no MMC4 document \(KeyError: 'image_info'\)"),
        ('\n{"a": ', "docs_0.jsonl:2: is no MMC4 document"),
        ("\n", "no document to write"),
    ],
)
def test_a_conversion_that_fails_leaves_nothing(downloaded, text, says):
    (downloaded / "docs_0.jsonl").write_text(text)
    arguments = [f"{downloaded}/docs_0.jsonl", f"--images={downloaded}/pictures"]
    with pytest.raises(MMJaxError, match=says):
        convert([str(downloaded / "out"), *arguments])
    assert not list(downloaded.glob("out*"))
    with pytest.raises(MMJaxError, match="gone"):
        convert([str(downloaded / "out"), arguments[0], "--images=gone"])
