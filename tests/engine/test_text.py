import random

import pytest

from mii_hpc.config import GenerateParamsConfig
from mii_hpc.engine.answer import Answer, answer_limit
from mii_hpc.engine.text import ByteDetokenizer, Detokenizer, StopStrings
from mii_hpc.errors import InvalidRequestError


def byte_decode(token_ids):
    return bytes(token_ids).decode("utf-8", errors="replace")


def sent_by(strings, pieces):
    stop = StopStrings(strings)
    sent = ""
    for piece in pieces:
        text, stopped = stop.push(piece)
        sent += text
        if stopped:
            return sent, True
    return sent + stop.flush(), False


@pytest.mark.parametrize(
    "make",
    [lambda: Detokenizer(byte_decode), lambda: ByteDetokenizer(lambda byte: bytes([byte]))],
    ids=["runs", "bytes"],
)
def test_bytes_of_any_kind_join_to_the_decoding_of_all(make):
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choice("aé€🙂👩‍🚀 ") for _ in range(12)).encode()
        noise = bytes(draw.randrange(256) for _ in range(draw.randrange(6)))
        data = text[: draw.randrange(len(text))] + noise + text[draw.randrange(len(text)) :]
        detokenizer = make()
        assert "".join(map(detokenizer.push, data)) + detokenizer.flush() == byte_decode(data)


def test_tokens_of_several_bytes_join_to_the_decoding_of_all():
    draw = random.Random(2)
    cuts = [bytes(draw.choices("aé🙂".encode(), k=draw.randint(0, 3))) for _ in range(60)]
    words = [*cuts, *(text.encode() for text in ("word", " é", "🙂", " 👩‍🚀 "))]

    def decode(token_ids):
        return b"".join(words[number] for number in token_ids).decode("utf-8", errors="replace")

    for _ in range(300):
        token_ids = draw.choices(range(len(words)), k=30)
        for detokenizer in (Detokenizer(decode), ByteDetokenizer(words.__getitem__)):
            assert "".join(map(detokenizer.push, token_ids)) + detokenizer.flush() == decode(token_ids)


def test_an_emoji_cut_by_tokens_is_held_back_until_it_is_whole():
    for detokenizer in (Detokenizer(byte_decode), ByteDetokenizer(lambda byte: bytes([byte]))):
        assert [detokenizer.push(byte) for byte in "x🙂y".encode()] == ["x", "", "", "", "🙂", "y"]


def test_an_emoji_cut_by_the_end_of_the_answer_is_a_replacement_character():
    for detokenizer in (Detokenizer(byte_decode), ByteDetokenizer(lambda byte: bytes([byte]))):
        assert "".join(map(detokenizer.push, "x🙂".encode()[:-1])) + detokenizer.flush() == "x\ufffd"


def test_a_decoder_that_drops_the_first_space_joins_too():
    words = [" Hello", "", " big", " ", "world", "", "", " !"]
    decode = lambda ids: "".join(words[i] for i in ids).removeprefix(" ")  # noqa: E731
    detokenizer = Detokenizer(decode)
    ids = range(len(words))
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == decode(ids)


def test_byte_fallback_is_held_until_its_run_ends():
    def decode(ids):
        run = bytes(i for i in ids if i < 256)
        try:
            text = run.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(run)
        return text + "x" * sum(i == 256 for i in ids)

    detokenizer = Detokenizer(decode, byte_tokens=frozenset(range(256)))
    tokens = [*"é".encode(), 0xF0, 256]
    assert [detokenizer.push(token) for token in tokens] == ["", "", "", decode(tokens)]


@pytest.mark.parametrize("pieces", [["one S", "TO", "P two"], list("one STOP two"), ["one STOP two"]])
def test_a_stop_string_across_pieces_never_shows(pieces):
    assert sent_by(["STOP"], pieces) == ("one ", True)


def test_what_only_looked_like_a_stop_string_is_sent():
    assert sent_by(["STOP"], ["a ST", "O", "!", " STO"]) == ("a STO! STO", False)


def test_stop_strings_agree_with_a_plain_search():
    draw = random.Random(2)
    for _ in range(500):
        strings = ["".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        text = "".join(draw.choices("abc", k=20))
        ends = [text.find(s) + len(s) for s in strings if s in text]
        before = text[: min(ends)] if ends else text
        expected = before[: min(before.find(s) for s in strings if s in before)] if ends else text
        assert sent_by(strings, text) == (expected, bool(ends))


def test_a_stop_string_before_the_minimum_is_plain_text():
    stop = StopStrings(["ab", "xabc"])
    assert stop.push("xab", may_stop=False) == ("", False)
    assert stop.push("z") == ("xabz", False)


def test_an_answer_stops_across_three_tokens_with_and_without_a_stream():
    for stream in (False, True):
        params = GenerateParamsConfig(stop="STOP", stream=stream, return_full_text=True)
        answer = Answer(params, Detokenizer(byte_decode), prompt="Say: ", prompt_length=2, limit=50)
        pieces = [answer.add(byte) for byte in b"hi STOP"]
        assert "".join(piece.generated_text for piece in pieces if piece) == "Say: hi "
        assert sum(len(piece.token_ids) for piece in pieces if piece) == 7
        assert pieces[-1].finish_reason == "stop"
        assert pieces[-1].generated_length == 7
        assert len([piece for piece in pieces if piece]) == (7 if stream else 1)


def test_what_is_no_stream_but_reports_tells_what_there_is_once_in_each_period():
    """The first token at once, which tells that the request does no harm; then what there is, and the end at once."""
    for reports in (True, False):
        params = GenerateParamsConfig(stop="STOP")
        answer = Answer(params, Detokenizer(byte_decode), prompt="", prompt_length=1, limit=9, reports=reports)
        periods = (7, 7, 8, 8, 8, 10, 10, 10, 10)
        pieces = [answer.add(byte, period=period) for byte, period in zip(b"abcdSTe8!", periods, strict=True)]
        told = [(place, piece.generated_text, len(piece.token_ids)) for place, piece in enumerate(pieces) if piece]
        reported = [(0, "a", 1), (2, "bc", 2), (5, "d", 3), (8, "STe8!", 3)]
        assert told == (reported if reports else [(8, "abcdSTe8!", 9)])
        assert pieces[-1].finish_reason == "length"


def test_lengths_are_bounded_by_request_and_context():
    def limit(prompt_length, context, **options):
        return answer_limit(GenerateParamsConfig(**options), prompt_length, context)

    assert limit(10, 4096) == 4086
    assert limit(2000, 4096) == 2096
    assert limit(10, 100) == 90
    assert limit(10, 4096, max_length=30) == 20
    assert limit(10, 4096, max_length=30, max_new_tokens=5) == 5
    assert limit(10, 4096, max_new_tokens=2000) == 2000
    assert limit(10, 100, max_new_tokens=2000) == 90
    assert limit(10, 100, max_length=2000) == 90
    with pytest.raises(InvalidRequestError, match=r"30 tokens.* is 20"):
        limit(30, 4096, max_length=20)
    with pytest.raises(InvalidRequestError, match=r"100 tokens, the bound on prompt plus answer is 100"):
        limit(100, 100, max_length=200)
