"""Sessions on the wire: control frames, the hello and its answer, to the byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import (
    HELLO_SIZE,
    MAX_WINDOW,
    REQUEST_SIZE,
    Answer,
    BadFrame,
    Control,
    Decoder,
    Hello,
    Refused,
    decode_answer,
    decode_control,
    decode_hello,
    encode_control,
    encode_frame,
    encode_total,
)

PROPERTY = settings(deadline=None, derandomize=True)

# docs/protocol.md has the same.
VECTORS = [
    (Control.ID_HIGH, 1, "0000000000000001 9cb8791a3ff485f8"),
    (Control.ID_LOW, 2, "0000000000000002 cdd51acc0ce19adc"),
    (Control.OPEN, 1, "0000000000000001 4168af2444a5e7bb"),
    (Control.OPEN, 1024, "0000000000000400 2204a6ca8db524f0"),
    (Control.RESUME, 0, "0000000000000000 d9b99e4cac7aedb7"),
    (Control.RESUME, 5, "0000000000000005 b9dc6d8feeb989f3"),
    (Control.END, 5, "0000000000000005 3cc14317be3da406"),
]

words = st.integers(0, 2**64 - 1)
hellos = st.builds(
    Hello, st.integers(0, 2**128 - 1), st.just(Control.OPEN), st.integers(1, MAX_WINDOW)
) | st.builds(Hello, st.integers(0, 2**128 - 1), st.just(Control.RESUME), words)


@st.composite
def answers(draw: st.DrawFn) -> tuple[Answer, int]:
    """An answer, and how many replies its client has."""
    have = draw(st.integers(0, 2**40))
    gaps = draw(st.lists(st.integers(1, MAX_WINDOW), max_size=20))
    runs, last = [], have
    for gap in gaps:
        last += gap
        runs.append((last, draw(words)))
    return Answer(last, draw(words), tuple(runs)), have


@pytest.mark.parametrize(("kind", "value", "text"), VECTORS)
def test_a_control_frame_is_these_bytes(kind: Control, value: int, text: str) -> None:
    frame = bytes.fromhex(text)
    assert encode_control(kind, value) == frame
    assert decode_control(frame) == (kind, value)


@PROPERTY
@given(st.sampled_from(Control), words)
def test_no_control_frame_asks_to_add_anything(kind: Control, value: int) -> None:
    with pytest.raises(BadFrame, match="checksum"):
        Decoder().decode(encode_control(kind, value))


@PROPERTY
@given(words)
def test_no_plain_frame_is_a_control_frame(amount: int) -> None:
    assert decode_control(encode_frame(amount)) is None


@PROPERTY
@given(hellos, st.integers(0, HELLO_SIZE - 1))
def test_a_hello_is_whole_after_48_bytes_and_not_before(hello: Hello, cut: int) -> None:
    data = hello.encode()
    assert len(data) == HELLO_SIZE
    assert decode_hello(data) == hello
    assert decode_hello(data[:cut]) is None


@PROPERTY
@given(hellos, st.integers(0, HELLO_SIZE * 8 - 1))
def test_a_hello_with_one_bit_wrong_is_refused(hello: Hello, bit: int) -> None:
    wrong = (int.from_bytes(hello.encode()) ^ 1 << bit).to_bytes(HELLO_SIZE)
    with pytest.raises(BadFrame) as refused:
        decode_hello(wrong)
    assert refused.value.reason == "hello"


@pytest.mark.parametrize("place", range(3))
def test_a_hello_whose_frames_are_others_is_refused_at_the_first(place: int) -> None:
    data = Hello(5, Control.OPEN, 7).encode()
    at = place * REQUEST_SIZE
    for other in (encode_frame(1), encode_control(Control.END, 0), bytes(REQUEST_SIZE)):
        with pytest.raises(BadFrame, match="a hello has"):
            decode_hello(data[:at] + other)


@pytest.mark.parametrize("window", [0, MAX_WINDOW + 1, 2**64 - 1])
def test_a_window_that_is_none_is_refused_with_its_number(window: int) -> None:
    with pytest.raises(BadFrame, match=f"a window of {window} frames: 1 to 4096"):
        decode_hello(Hello(5, Control.OPEN, window).encode())


def test_what_comes_behind_a_hello_before_its_answer_is_refused() -> None:
    with pytest.raises(BadFrame, match="not answered yet"):
        decode_hello(Hello(5, Control.OPEN, 7).encode() + b"x")


@PROPERTY
@given(answers(), st.binary(max_size=20))
def test_an_answer_is_read_whole_and_no_byte_more(case: tuple[Answer, int], behind: bytes) -> None:
    answer, have = case
    assert decode_answer(answer.encode() + behind, have) == (answer, behind)


@PROPERTY
@given(answers(), st.data())
def test_an_answer_that_is_cut_anywhere_is_not_whole(
    case: tuple[Answer, int], data: st.DataObject
) -> None:
    answer, have = case
    whole = answer.encode()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert decode_answer(cut, have) == (None, cut)


@pytest.mark.parametrize("refused", Refused)
def test_a_refusal_is_eight_bytes(refused: Refused) -> None:
    assert decode_answer(encode_total(refused.value)) == (refused, b"")


def test_an_answer_without_runs_is_one_to_a_client_that_has_more() -> None:
    lost = Answer(3, 100)
    assert decode_answer(lost.encode(), have=7) == (lost, b"")


@pytest.mark.parametrize("run", [(5, 0), (4, 0), (9, 0)])
def test_runs_that_do_not_rise_to_what_was_applied_are_refused(run: tuple[int, int]) -> None:
    with pytest.raises(BadFrame, match="a run ends with frame"):
        decode_answer(Answer(8, 100, (run,)).encode(), have=5)
