"""Any bytes are a message of the schema, or refused as one kind of error."""

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flaxmpc.secure.deploy import messages as m

KINDS = [kind for kind in vars(m).values() if isinstance(kind, type) and issubclass(kind, m.Message)]
# Bytes that begin a map, an array, a string or a number, among any others: so the content goes deeper than one byte.
BEGINNINGS = st.sampled_from([0x80, 0x81, 0x82, 0x91, 0x92, 0xA1, 0xA2, 0xC4, 0xCA, 0xDE, 0xDF])
CONTENT = st.lists(st.one_of(BEGINNINGS, st.integers(0, 255)), max_size=40).map(bytes)
NO_TEXT = b"\x81\xa2\xff\xfe\x01"  # a field whose name is not UTF-8


@given(CONTENT, st.sampled_from(KINDS))
@example(NO_TEXT, m.Infer)
def test_any_bytes_are_a_message_or_refused(content, kind):
    try:
        message = m.decode(content, kind)
    except msgspec.MsgspecError:
        return
    assert m.decode(m.encode(message), kind) == message


def test_a_message_comes_back_as_it_was():
    message = m.Publish("s", "l", "name", "h", [], {"2x4": m.ModelProgram(b"\xff", (), (), 2, 4)})
    assert m.decode(m.encode(message), m.Publish) == message
    with pytest.raises(msgspec.MsgspecError):
        m.decode(m.encode(message), m.Infer)
