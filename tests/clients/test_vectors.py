"""The vectors for other languages are what the wire's own module makes of the same values."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from kit.harness import ROOT
from protocol import (
    HELLO_SIZE,
    TOTAL_MASK,
    Answer,
    BadFrame,
    Batch,
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

VECTORS: dict[str, Any] = json.loads((ROOT / "clients/vectors.json").read_text())

MEANINGS = {
    "no such session": Refused.UNKNOWN,
    "no room for another session": Refused.NO_ROOM,
    "held elsewhere, and not given up in time": Refused.HELD,
}


def numbers(texts: list[str]) -> list[int]:
    return [int(text) for text in texts]


def leaves(value: Any) -> list[Any]:
    """What a JSON value holds at its ends."""
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [value]


def test_no_number_is_one_that_a_language_could_round() -> None:
    assert {type(leaf) for leaf in leaves(VECTORS)} == {str}


@pytest.mark.parametrize("case", VECTORS["frames"], ids=lambda case: case["amount"])
def test_a_frame_is_that_of_its_amount(case: dict[str, str]) -> None:
    frame = bytes.fromhex(case["frame"])
    assert encode_frame(int(case["amount"])) == frame
    assert list(Decoder().decode_whole(frame).amounts) == [int(case["amount"])]


@pytest.mark.parametrize("case", VECTORS["wrong_frames"], ids=lambda case: case["why"])
def test_a_wrong_frame_is_refused(case: dict[str, str]) -> None:
    frame = bytes.fromhex(case["frame"])
    assert decode_control(frame) is None
    with pytest.raises(BadFrame) as refused:
        Decoder().decode_whole(frame)
    assert refused.value.reason == "checksum"


@pytest.mark.parametrize("case", VECTORS["control_frames"], ids=lambda case: case["kind"])
def test_a_control_frame_is_that_of_its_kind_and_value(case: dict[str, str]) -> None:
    kind, value = Control(case["kind"]), int(case["value"])
    assert encode_control(kind, value).hex() == case["frame"]
    assert decode_control(bytes.fromhex(case["frame"])) == (kind, value)


def test_there_is_a_control_frame_of_every_kind() -> None:
    assert {Control(case["kind"]) for case in VECTORS["control_frames"]} == set(Control)


@pytest.mark.parametrize("case", VECTORS["hellos"], ids=lambda case: case["kind"])
def test_a_hello_is_that_of_its_session(case: dict[str, str]) -> None:
    hello = Hello(int(case["session_id"], 16), Control(case["kind"]), int(case["value"]))
    assert hello.encode().hex() == case["bytes"]
    assert decode_hello(bytes.fromhex(case["bytes"])) == hello


@pytest.mark.parametrize("case", VECTORS["wrong_hellos"], ids=lambda case: case["why"])
def test_a_wrong_hello_is_refused(case: dict[str, str]) -> None:
    data = bytes.fromhex(case["bytes"])
    assert len(data) >= HELLO_SIZE
    with pytest.raises(BadFrame) as refused:
        decode_hello(data)
    assert refused.value.reason == "hello"


@pytest.mark.parametrize("case", VECTORS["answers"], ids=lambda case: case["applied"])
def test_an_answer_is_that_of_its_words(case: dict[str, Any]) -> None:
    runs = tuple((int(last), int(after)) for last, after in case["runs"])
    answer = Answer(int(case["applied"]), int(case["limit"]), runs)
    assert answer.encode().hex() == case["bytes"]
    assert decode_answer(bytes.fromhex(case["bytes"]), int(case["have"])) == (answer, b"")


def test_every_refusal_is_there_with_its_meaning() -> None:
    shown = {case["means"]: case["bytes"] for case in VECTORS["refusals"]}
    assert shown == {text: encode_total(why.value).hex() for text, why in MEANINGS.items()}


@pytest.mark.parametrize("case", VECTORS["sequences"], ids=lambda case: case["before"])
def test_the_replies_to_a_sequence_are_the_totals_after_each(case: dict[str, Any]) -> None:
    amounts = numbers(case["amounts"])
    assert b"".join(map(encode_frame, amounts)).hex() == case["frames"]
    assert Batch(amounts).replies(int(case["before"])).hex() == case["replies"]


@pytest.mark.parametrize("case", VECTORS["resumptions"], ids=lambda case: case["answer"][:16])
def test_an_answer_gives_every_total_between_and_what_to_send_again(case: dict[str, Any]) -> None:
    have, amounts = int(case["have"]), numbers(case["unanswered"])
    answer, rest = decode_answer(bytes.fromhex(case["answer"]), have)
    assert isinstance(answer, Answer)
    assert rest == b""
    totals = numbers(case["totals"])
    assert len(totals) == answer.applied - have
    # Forwards: each total is the one before it and the amount; at the end of a run it is the run's.
    for at, (total, amount) in enumerate(zip(totals, amounts, strict=False), have + 1):
        if at - 1 not in [have, *(last for last, _ in answer.runs)]:
            assert total == (totals[at - have - 2] + amount) & TOTAL_MASK
    assert [totals[last - have - 1] for last, _ in answer.runs] == [a for _, a in answer.runs]
    again = amounts[answer.applied - have :]
    assert b"".join(map(encode_frame, again)).hex() == case["send_again"]


def test_the_document_has_the_vectors_of_control_frames() -> None:
    shown = (ROOT / "docs/protocol.md").read_text()
    for kind, value, frame in re.findall(
        r"^\| `([a-z-]+):(\d+)` \| `([0-9a-f ]+)` \|$", shown, re.M
    ):
        assert encode_control(Control(kind), int(value)) == bytes.fromhex(frame)
    assert len(re.findall(r"^\| `[a-z-]+:\d+` \|", shown, re.M)) >= len(Control)
