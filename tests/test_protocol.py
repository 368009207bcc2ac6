"""The wire, to the byte: vectors, every way bytes can arrive, and what is refused."""

from __future__ import annotations

import ipaddress
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh64_intdigest

from protocol import (
    MAX_AMOUNT,
    MAX_UNREAD_FRAMES,
    REPLY_SIZE,
    REQUEST_SIZE,
    TABLE_SIZE,
    TOTAL_MASK,
    AddressError,
    AmountError,
    BadFrame,
    Batch,
    CounterError,
    Decoder,
    decode_totals,
    encode_frame,
    encode_total,
    format_address,
    parse_address,
)

PROPERTY = settings(deadline=None, derandomize=True)
DECODER = Decoder()
LIMITED = Decoder(max_amount=1000)

VECTORS = [
    (0, "0000000000000000 633457081244afec"),
    (1, "0000000000000001 b7b41276360564d4"),
    (10, "000000000000000a 4b48550ea3b07f17"),
    (123, "000000000000007b 3c697d223fa7e885"),
    (7016996765293437281, "6161616161616161 588f55d90f147231"),
    (2**63, "8000000000000000 3f4a8fcea23d52a3"),
    (2**64 - 1, "ffffffffffffffff 8d1f8f6d8dfa7c47"),
]

amounts_of_all_sizes = (
    st.integers(0, 3) | st.integers(0, 2 * TABLE_SIZE) | st.integers(0, 2**64 - 1)
)


@dataclass
class Reading:
    """What a decoder made of a stream: the amounts, what was left over, why it stopped."""

    amounts: list[int]
    rest: bytes = b""
    reason: str = ""


def read_pieces(decoder: Decoder, pieces: Iterable[bytes]) -> Reading:
    """Decodes a stream as a connection does: what is left over goes before the next piece."""
    reading = Reading([])
    for piece in pieces:
        try:
            batch, reading.rest = decoder.decode(reading.rest + piece)
        except BadFrame as bad:
            return Reading([*reading.amounts, *bad.batch.amounts], b"", bad.reason)
        reading.amounts += batch.amounts
    return reading


def single_bytes(data: bytes) -> Iterator[bytes]:
    return (data[place : place + 1] for place in range(len(data)))


def cut_at(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def encode_frames(amounts: Iterable[int]) -> bytes:
    return b"".join(map(encode_frame, amounts))


def frame_of(amount: int) -> bytes:
    """A frame made without the code under test."""
    checksum = xxh64_intdigest(str(amount).encode(), seed=0)
    return amount.to_bytes(8, "big") + checksum.to_bytes(8, "big")


def change_byte(data: bytes, place: int, by: int = 0xFF) -> bytes:
    changed = bytearray(data)
    changed[place] ^= by
    return bytes(changed)


# Vectors


@pytest.mark.parametrize(("amount", "frame"), VECTORS)
def test_a_vector_is_encoded_to_the_byte(amount: int, frame: str) -> None:
    assert encode_frame(amount) == bytes.fromhex(frame)


@pytest.mark.parametrize(("amount", "frame"), VECTORS)
def test_a_vector_is_decoded_to_its_amount(amount: int, frame: str) -> None:
    assert read_pieces(DECODER, [bytes.fromhex(frame)]) == Reading([amount])


@pytest.mark.parametrize(("amount", "frame"), VECTORS)
def test_a_vector_is_what_an_independent_encoder_makes(amount: int, frame: str) -> None:
    assert frame_of(amount) == bytes.fromhex(frame)


@PROPERTY
@given(amounts_of_all_sizes)
def test_any_amount_is_encoded_as_an_independent_encoder_does(amount: int) -> None:
    assert encode_frame(amount) == frame_of(amount)


@pytest.mark.parametrize(
    ("total", "reply"),
    [
        (0, "0000000000000000"),
        (1, "0000000000000001"),
        (16_423_170, "0000000000fa9902"),
        (2**63, "8000000000000000"),
        (2**64 - 1, "ffffffffffffffff"),
    ],
)
def test_a_total_is_eight_bytes_big_endian_both_ways(total: int, reply: str) -> None:
    assert encode_total(total) == bytes.fromhex(reply)
    assert decode_totals(bytes.fromhex(reply)) == ((total,), b"")


# Every case whole, byte by byte, and with a tail

GOOD = {
    "nothing": (b"", []),
    "one frame": (frame_of(1), [1]),
    "one of zero": (frame_of(0), [0]),
    "equal frames joined": (frame_of(1) * 3, [1, 1, 1]),
    "the vectors joined": (b"".join(frame_of(n) for n, _ in VECTORS), [n for n, _ in VECTORS]),
    "the last of the table and the first behind it": (
        frame_of(TABLE_SIZE - 1) + frame_of(TABLE_SIZE),
        [TABLE_SIZE - 1, TABLE_SIZE],
    ),
    "300 frames": (b"".join(map(frame_of, range(300))), list(range(300))),
}

BAD = {
    "text": (b"c" * 16, [], "checksum"),
    "25 bytes of text": (b"c" * 25, [], "checksum"),
    "zeros": (bytes(16), [], "checksum"),
    "a wrong checksum alone": (change_byte(frame_of(1), 15), [], "checksum"),
    "a wrong amount alone": (change_byte(frame_of(1), 7), [], "checksum"),
    "the checksum in little-endian": (frame_of(1)[:8] + frame_of(1)[:7:-1], [], "checksum"),
    "the checksum of the eight bytes": (
        bytes(7) + b"\1" + xxh64_intdigest(bytes(7) + b"\1").to_bytes(8, "big"),
        [],
        "checksum",
    ),
    "a bad frame between good ones": (
        frame_of(1) + frame_of(5000) + b"c" * 16 + frame_of(2),
        [1, 5000],
        "checksum",
    ),
    "a bad frame behind good ones": (frame_of(1) + frame_of(2) + b"c" * 16, [1, 2], "checksum"),
    "two bad frames": (frame_of(1) + b"c" * 32, [1], "checksum"),
    "one byte too many in the middle": (
        frame_of(1) + b"\0" + frame_of(2) + frame_of(3),
        [1],
        "checksum",
    ),
}


@pytest.mark.parametrize(("data", "amounts"), GOOD.values(), ids=GOOD)
def test_good_frames_are_decoded_whole(data: bytes, amounts: list[int]) -> None:
    assert read_pieces(DECODER, [data]) == Reading(amounts)


@pytest.mark.parametrize(("data", "amounts"), GOOD.values(), ids=GOOD)
def test_good_frames_are_decoded_byte_by_byte(data: bytes, amounts: list[int]) -> None:
    assert read_pieces(DECODER, single_bytes(data)) == Reading(amounts)


@pytest.mark.parametrize("tail", [1, 7, 8, 9, 15])
@pytest.mark.parametrize(("data", "amounts"), GOOD.values(), ids=GOOD)
def test_a_tail_behind_good_frames_is_left_over(data: bytes, amounts: list[int], tail: int) -> None:
    begun = frame_of(7)[:tail]
    assert read_pieces(DECODER, [data + begun]) == Reading(amounts, begun)


@pytest.mark.parametrize(("data", "amounts", "reason"), BAD.values(), ids=BAD)
def test_a_bad_frame_is_refused_whole(data: bytes, amounts: list[int], reason: str) -> None:
    assert read_pieces(DECODER, [data]) == Reading(amounts, b"", reason)


@pytest.mark.parametrize(("data", "amounts", "reason"), BAD.values(), ids=BAD)
def test_a_bad_frame_is_refused_byte_by_byte(data: bytes, amounts: list[int], reason: str) -> None:
    assert read_pieces(DECODER, single_bytes(data)) == Reading(amounts, b"", reason)


@pytest.mark.parametrize("tail", [1, 7, 8, 9, 15, 16])
@pytest.mark.parametrize(("data", "amounts", "reason"), BAD.values(), ids=BAD)
def test_a_bad_frame_is_refused_with_a_tail_behind_it(
    data: bytes, amounts: list[int], reason: str, tail: int
) -> None:
    assert read_pieces(DECODER, [data + frame_of(7)[:tail]]) == Reading(amounts, b"", reason)


def test_a_split_frame_is_counted_once() -> None:
    frame = encode_frame(123)
    for cut in range(1, REQUEST_SIZE):
        assert read_pieces(DECODER, [frame[:cut], frame[cut:]]) == Reading([123])


@pytest.mark.parametrize("size", [5, 11, 15])
@pytest.mark.parametrize("byte", [b"\0", b"a", b"c"])
def test_less_than_a_frame_is_left_over_and_not_judged(size: int, byte: bytes) -> None:
    assert read_pieces(DECODER, [byte * size]) == Reading([], byte * size)


def test_25_bytes_of_c_are_refused() -> None:
    with pytest.raises(BadFrame) as caught:
        DECODER.decode(b"c" * 25)
    assert (caught.value.reason, len(caught.value.batch)) == ("checksum", 0)


def test_text_is_refused_unless_its_checksum_is_right() -> None:
    text = b"aaaaaaaa"
    for wrong in (text, bytes(8), xxh64_intdigest(text).to_bytes(8, "big")):
        assert read_pieces(DECODER, [text + wrong]) == Reading([], b"", "checksum")
    right = bytes.fromhex("588f55d90f147231")
    assert read_pieces(DECODER, [text + right]) == Reading([7016996765293437281])


def test_one_decoder_serves_several_streams_at_once() -> None:
    one, other = frame_of(1), frame_of(2)
    _, one_rest = DECODER.decode(one[:10])
    _, other_rest = DECODER.decode(other[:3])
    assert DECODER.decode(one_rest + one[10:])[0].amounts == [1]
    assert DECODER.decode(other_rest + other[3:])[0].amounts == [2]


def test_a_refusal_leaves_the_decoder_as_it_was() -> None:
    for _ in range(2):
        assert read_pieces(DECODER, [frame_of(9) + b"c" * 16]) == Reading([9], b"", "checksum")
        assert read_pieces(DECODER, [frame_of(9)]) == Reading([9])


# Random streams


@PROPERTY
@given(amounts=st.lists(amounts_of_all_sizes, max_size=40), data=st.data())
def test_a_stream_is_the_same_however_it_is_split(amounts: list[int], data: st.DataObject) -> None:
    stream = encode_frames(amounts)
    cuts = data.draw(st.lists(st.integers(0, len(stream))))
    assert read_pieces(DECODER, cut_at(stream, cuts)) == Reading(amounts)


@PROPERTY
@given(
    amounts=st.lists(amounts_of_all_sizes, min_size=1, max_size=40),
    changed_bits=st.integers(1, 255),
    data=st.data(),
)
def test_what_stands_before_a_corrupted_byte_is_given_and_nothing_behind_it(
    amounts: list[int], changed_bits: int, data: st.DataObject
) -> None:
    stream = encode_frames(amounts)
    place = data.draw(st.integers(0, len(stream) - 1))
    cuts = data.draw(st.lists(st.integers(0, len(stream))))
    pieces = cut_at(change_byte(stream, place, changed_bits), cuts)
    good = amounts[: place // REQUEST_SIZE]
    assert read_pieces(DECODER, pieces) == Reading(good, b"", "checksum")


@PROPERTY
@given(st.binary(max_size=200))
def test_any_bytes_are_amounts_or_left_over_or_refused(data: bytes) -> None:
    reading = read_pieces(DECODER, [data])
    if not reading.reason:
        assert encode_frames(reading.amounts) + reading.rest == data
        assert len(reading.rest) == len(data) % REQUEST_SIZE


# Many frames in one read


@pytest.mark.parametrize("count", [255, 256, 257, 511, 512, 513, 1000, MAX_UNREAD_FRAMES, 5000])
def test_a_large_batch_keeps_the_order_of_its_frames(count: int) -> None:
    draw = random.Random(count)
    amounts = [draw.choice([1, draw.randrange(5000), draw.randrange(2**64)]) for _ in range(count)]
    batch, rest = DECODER.decode(encode_frames(amounts) + b"abc")
    assert (list(batch.amounts), rest) == (amounts, b"abc")
    assert (len(batch), batch.sum()) == (count, sum(amounts))
    total, totals = 17, []
    for amount in amounts:
        total = (total + amount) % 2**64
        totals.append(total)
    assert batch.replies(17) == b"".join(map(encode_total, totals))


@pytest.mark.parametrize("place", [0, 1, 254, 255, 256, 257, 511, 512, 513, 767, 768, 998, 999])
def test_a_bad_frame_is_found_at_any_place_of_a_large_batch(place: int) -> None:
    amounts = list(range(4000, 5000))
    stream = change_byte(encode_frames(amounts), place * REQUEST_SIZE + 12)
    assert read_pieces(DECODER, [stream]) == Reading(amounts[:place], b"", "checksum")


# Replies


@pytest.mark.parametrize(
    ("before", "amounts", "totals"),
    [
        (0, [], []),
        (0, [1], [1]),
        (41, [0, 1, 0], [41, 42, 42]),
        (2**64 - 1, [0], [2**64 - 1]),
        (2**64 - 1, [1], [0]),
        (2**64 - 2, [1, 1, 1, 5], [2**64 - 1, 0, 1, 6]),
        (2**64 - 1, [2**64 - 1, 2**64 - 1], [2**64 - 2, 2**64 - 3]),
        (2**63, [2**63, 2**63, 2**63], [0, 2**63, 0]),
    ],
)
def test_each_frame_is_answered_with_the_total_after_it(
    before: int, amounts: list[int], totals: list[int]
) -> None:
    assert decode_totals(Batch(amounts).replies(before)) == (tuple(totals), b"")


@PROPERTY
@given(before=st.integers(0, 2**64 - 1), amounts=st.lists(st.integers(0, 2**64 - 1)))
def test_replies_are_plain_arithmetic_modulo_two_to_the_64(before: int, amounts: list[int]) -> None:
    batch = Batch(amounts)
    expected = [(before + sum(amounts[: end + 1])) % 2**64 for end in range(len(amounts))]
    assert batch.replies(before) == b"".join(map(encode_total, expected))
    assert len(batch.replies(before)) == REPLY_SIZE * len(batch)
    if amounts:
        assert expected[-1] == (before + batch.sum()) & TOTAL_MASK


@PROPERTY
@given(totals=st.lists(st.integers(0, 2**64 - 1), max_size=40), data=st.data())
def test_split_replies_are_put_together_again(totals: list[int], data: st.DataObject) -> None:
    stream = b"".join(map(encode_total, totals))
    read: list[int] = []
    rest = b""
    for piece in cut_at(stream, data.draw(st.lists(st.integers(0, len(stream))))):
        whole, rest = decode_totals(rest + piece)
        read += whole
    assert (read, rest) == (totals, b"")


@pytest.mark.parametrize("tail", range(8))
def test_a_begun_reply_is_left_over(tail: int) -> None:
    begun = bytes(range(tail))
    assert decode_totals(encode_total(5) * 2 + begun) == ((5, 5), begun)


# The largest amount allowed

BOUNDS = [0, 1, 1000, TABLE_SIZE - 2, TABLE_SIZE - 1, TABLE_SIZE, TABLE_SIZE + 1, 2**63, 2**64 - 2]


@pytest.mark.parametrize("bound", [*BOUNDS, MAX_AMOUNT])
def test_the_largest_amount_allowed_is_accepted(bound: int) -> None:
    assert read_pieces(Decoder(bound), [frame_of(0), frame_of(bound)]) == Reading([0, bound])


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("above", [1, 2, 5000])
def test_the_next_larger_amount_is_refused_by_limit(bound: int, above: int) -> None:
    amount = min(bound + above, MAX_AMOUNT)
    assert read_pieces(Decoder(bound), [frame_of(amount)]) == Reading([], b"", "limit")


def test_an_amount_above_the_limit_refuses_what_stands_behind_it() -> None:
    for amount in (1001, 5000, MAX_AMOUNT):
        stream = encode_frames([1, 1000, amount, 3])
        for pieces in ([stream], single_bytes(stream), [stream + b"abc"]):
            assert read_pieces(LIMITED, pieces) == Reading([1, 1000], b"", "limit")


def test_a_wrong_checksum_above_the_limit_is_a_wrong_checksum() -> None:
    frame = change_byte(frame_of(MAX_AMOUNT), 15)
    assert read_pieces(LIMITED, [frame]) == Reading([], b"", "checksum")


def test_a_refusal_names_what_was_refused() -> None:
    with pytest.raises(BadFrame, match="amount 1001 is above the limit of 1000"):
        LIMITED.decode(frame_of(1001))
    with pytest.raises(BadFrame, match=f"{(b'c' * 16).hex()}: the checksum is not that of"):
        LIMITED.decode(b"c" * 16)


# The table


def test_entries_of_the_table_are_what_hashing_gives() -> None:
    for amount in [*range(TABLE_SIZE + 50), 2**63, MAX_AMOUNT]:
        assert DECODER.verify(frame_of(amount)) == amount
        assert DECODER.table.get(frame_of(amount), amount) == amount


def test_a_wrong_checksum_is_refused_for_amounts_within_and_beyond_the_table() -> None:
    for amount in (0, 1, TABLE_SIZE - 1, TABLE_SIZE, MAX_AMOUNT):
        for place in range(REQUEST_SIZE):
            bad = change_byte(frame_of(amount), place, 1)
            assert read_pieces(DECODER, [bad]) == Reading([], b"", "checksum")
            with pytest.raises(BadFrame) as caught:
                DECODER.verify(bad)
            assert caught.value.reason == "checksum"


@pytest.mark.parametrize(("bound", "entries"), [(0, 1), (9, 10), (MAX_AMOUNT, TABLE_SIZE)])
def test_the_table_has_no_entry_above_the_limit(bound: int, entries: int) -> None:
    assert sorted(Decoder(bound).table.values()) == list(range(entries))


def test_nothing_that_a_peer_sends_changes_the_table() -> None:
    decoder = Decoder(max_amount=10**6)
    before = dict(decoder.table)
    for amount in (5, TABLE_SIZE, TABLE_SIZE + 1, 10**6, 10**6 + 1, MAX_AMOUNT):
        for frame in (frame_of(amount), change_byte(frame_of(amount), 0), b"c" * 16):
            read_pieces(decoder, [frame, frame])
    assert dict(decoder.table) == before
    assert len(decoder.table) == TABLE_SIZE


# Amounts that are none


@pytest.mark.parametrize("amount", [-1, -(2**63), 2**64, 2**64 + 1, 10**40])
def test_an_amount_that_no_frame_can_carry_is_refused(amount: int) -> None:
    with pytest.raises(AmountError, match=f"amount {amount} is outside"):
        encode_frame(amount)


@pytest.mark.parametrize("amount", ["1", b"1", 1.0, 0.5, float("nan"), None, [1]])
def test_what_is_no_whole_number_is_no_amount(amount: object) -> None:
    with pytest.raises(TypeError):
        encode_frame(amount)  # type: ignore[arg-type]


def test_true_and_false_are_one_and_nothing() -> None:
    assert (encode_frame(True), encode_frame(False)) == (frame_of(1), frame_of(0))


def test_whatever_is_an_index_is_an_amount() -> None:
    class Seven:
        def __index__(self) -> int:
            return 7

    assert encode_frame(Seven()) == frame_of(7)  # type: ignore[arg-type]


def test_all_errors_have_one_root() -> None:
    assert issubclass(BadFrame, CounterError)
    for error in (AmountError, AddressError):
        assert issubclass(error, CounterError)
        assert issubclass(error, ValueError)


# Addresses


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("localhost:1", "localhost", 1),
        ("counter.example.org:65535", "counter.example.org", 65535),
        (":8080", "127.0.0.1", 8080),
        ("8080", "127.0.0.1", 8080),
        ("host:0", "host", 0),
        ("[::1]:8080", "::1", 8080),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
        (" host:80\n", "host", 80),
    ],
)
def test_an_address_is_read(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)


def test_an_address_without_a_host_takes_the_default_one() -> None:
    assert parse_address(":80", default_host="::1") == ("::1", 80)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        "host:",
        "host:http",
        "host:-1",
        "host:+1",
        "host:65536",
        "host:8080x",
        "host:80 80",
        "host:\u0663",
        "host:" + "1" * 5000,
        "::1",
        "::1:8080",
        "fe80::1",
        "[::1]",
        "[::1]:",
        "[::1:8080",
        "1.2.3.4:80:90",
        "http://host:80",
    ],
)
def test_what_is_no_address_is_refused_and_named(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_address(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("::1:8080", "write IPv6 in brackets, as [::1]:8080"),
        ("[::1]", "the port is missing, as in [::1]:8080"),
        (" [fe80::1] ", "the port is missing"),
        ("http://host:80", "write HOST:PORT, without a scheme"),
        ("http://[::1]", "write HOST:PORT, without a scheme"),
        ("host:65536", "the port is not a number of 0 to 65535"),
        ("127.0.0.1", "the port is missing; write HOST:PORT"),
        ("host:", "the port is missing; write HOST:PORT"),
        ("", "the port is missing; write HOST:PORT"),
        ("65536", "the port is not a number of 0 to 65535"),
    ],
)
def test_a_refused_address_comes_with_advice(text: str, advice: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_address(text)
    assert advice in str(caught.value)


@PROPERTY
@given(
    host=st.ip_addresses().map(str)
    | st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True),
    port=st.integers(0, 65535),
)
def test_a_written_address_is_read_back(host: str, port: int) -> None:
    assert parse_address(format_address(host, port)) == (host, port)


def test_only_ipv6_is_written_in_brackets() -> None:
    assert format_address(str(ipaddress.IPv6Address(1)), 80) == "[::1]:80"
    assert format_address("127.0.0.1", 80) == "127.0.0.1:80"


def test_importing_the_wire_brings_in_no_socket_and_no_gevent() -> None:
    """A fresh interpreter, because this one has imported everything."""
    code = "import protocol, sys; print(sorted({'socket', 'gevent', 'ssl'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"
