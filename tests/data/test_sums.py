import pytest

from mmjax.data.catalog import make_source, make_sources
from mmjax.types import MMJaxError


def asked(source):
    return {source[i].messages[0].text for i in range(len(source))}


def test_every_pair_is_trained_on_or_tested_with():
    train, test = (make_source({"kind": "sums", "split": s, "limit": 6}) for s in ("train", "test"))
    assert (len(train), len(test)) == (29, 7)
    assert not asked(train) & asked(test)
    assert asked(train) | asked(test) == {
        f"What is {a} plus {b}?" for a in range(6) for b in range(6)
    }
    for i in range(len(test)):
        record = test[i]
        a, b = (
            int(w.strip("?")) for w in record.messages[0].text.split() if w.strip("?").isdigit()
        )
        assert record.messages[1].text == str(a + b) == record.meta["answers"][0]
        assert not record.images
    assert len(make_source({"kind": "sums", "split": "train", "size": 100})) == 100


def test_bad_arguments_say_what_is_allowed():
    with pytest.raises(MMJaxError, match="no split 'dev'; they have train, test"):
        make_source({"kind": "sums", "split": "dev"})
    with pytest.raises(MMJaxError, match="raise limit to 3"):
        make_source({"kind": "sums", "split": "train", "limit": 1})
    with pytest.raises(MMJaxError, match="data.sources.a: a data source needs a kind, one of json"):
        make_sources({"a": {"path": "a.json"}})
    for wrong in ({"kind": {}}, {"kind": ["sums"]}):  # what no table has as a key, too
        with pytest.raises(MMJaxError, match="data.sources.a: data source kind .* is unknown"):
            make_sources({"a": wrong})
