"""What is read of JSON is the same whether msgspec is installed or not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notifyq import InvalidData
from notifyq._codec import read_json

TEXTS = [
    "null",
    "-0",
    "1.0",
    "100",
    "12345678901234567890123456789012345678901234567890",
    "1e400",
    '[1e400, {"a": -1e400}]',
    "0.1",
    "179769313486231570000000000000000000000000000",
    '"\\u00e4\\ud83d\\ude00\\n\\"\\\\"',
    '{"": [], "a": {"b": [true, false, null, 1, 1.5, "x"]}}',
]

WITHOUT = """
import json, sys
sys.modules["msgspec"] = None
from notifyq._codec import read_json
print([read_json(text) for text in json.loads(sys.stdin.read())])
"""


def test_without_msgspec_the_same_is_read():
    pytest.importorskip("msgspec", reason="an extra: here it is to be compared with what is read without it")
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == repr([read_json(text) for text in TEXTS])


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | numbers | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner)
)


@given(values)
def test_what_is_written_is_read(value):
    read = read_json(json.dumps(value, ensure_ascii=False))
    assert repr(read) == repr(value)


def test_what_is_nested_too_deeply_is_refused():
    with pytest.raises(InvalidData, match="nested too deeply"):
        read_json("[" * 100_000 + "]" * 100_000)
