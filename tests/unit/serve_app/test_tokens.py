"""Feedback tokens carry what was predicted and cannot be forged; bearer tokens give roles."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import RequestError
from serve_app import tokens
from serve_app.feedback import LabelBook

KEY = b"k" * 32
DIGEST = "ab" * 32


@given(
    st.text(max_size=60).filter(lambda t: t.isprintable()),
    st.sampled_from(["base", DIGEST, "short"]),
    st.lists(st.integers(0, 65_535), max_size=40),
)
def test_token_says_what_was_signed(request_id: str, digest: str, predictions: list[int]) -> None:
    token = tokens.mint(KEY, request_id, digest, 12.5, predictions)
    assert tokens.read(KEY, token) == tokens.Feedback(request_id, digest, 12.5, tuple(predictions))


@given(st.integers(0, 60), st.integers(1, 255))
def test_token_with_one_byte_changed_is_unknown(place: int, change: int) -> None:
    import base64

    token = tokens.mint(KEY, "id", DIGEST, 1.0, [1, 2])
    raw = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    raw[place % len(raw)] ^= change
    assert tokens.read(KEY, base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=").decode()) is None


@given(st.text(max_size=100))
def test_no_text_raises(text: str) -> None:
    assert tokens.read(KEY, text) is None


def test_token_of_another_service_is_unknown_and_without_a_key_none_is_given() -> None:
    assert tokens.read(b"other" * 8, tokens.mint(KEY, "id", "base", 1.0, [0])) is None
    assert tokens.mint(b"", "id", "base", 1.0, [0]) == ""
    assert tokens.read(b"", tokens.mint(KEY, "id", "base", 1.0, [0])) is None


def test_token_of_one_row_is_short_enough_for_every_reply() -> None:
    assert len(tokens.mint(KEY, "0" * 32, DIGEST, 1e9, [3])) <= 140


def test_labels_are_counted_as_accepted_unknown_expired_and_conflicting() -> None:
    book = LabelBook(num_classes=4)
    now = 40 * 86400.0
    fresh, old = tokens.mint(KEY, "a", DIGEST, now - 5, [1, 2]), tokens.mint(KEY, "b", DIGEST, 0.0, [1])
    counts, new = book.check(
        KEY, [(fresh, 0, 3), (fresh, 0, 3), (fresh, 0, 2), (fresh, 9, 1), ("junk", 0, 1), (old, 0, 1)], now
    )
    assert counts == {"accepted": 2, "unknown": 2, "expired": 1, "conflicting": 1}
    assert [(n.instance_id, n.prediction, n.label, n.digest) for n in new] == [("a/0", 1, 3, DIGEST)]
    assert book.take() == tuple(new)
    assert book.take() == ()


def test_label_out_of_range_takes_none_of_the_request() -> None:
    book = LabelBook(num_classes=4)
    token = tokens.mint(KEY, "a", "base", 1.0, [1])
    with pytest.raises(RequestError, match="between 0 and 3"):
        book.check(KEY, [(token, 0, 1), (token, 0, 4)], 2.0)
    assert book.take() == ()


def roles() -> tokens.Roles:
    return tokens.Roles({hashlib.sha256(t.encode()).hexdigest(): t for t in ("viewer", "labeller", "operator")})


@pytest.mark.parametrize(
    ("token", "wanted", "status"),
    [
        ("operator", "viewer", None),
        ("labeller", "labeller", None),
        ("viewer", "labeller", 403),
        ("labeller", "operator", 403),
        ("wrong", "viewer", 401),
        ("", "viewer", 401),
    ],
)
def test_each_role_may_do_what_the_lesser_ones_may(token: str, wanted: str, status: int | None) -> None:
    if status is None:
        assert roles().require(f"Bearer {token}", wanted) == token
        return
    with pytest.raises(RequestError) as caught:
        roles().require(f"Bearer {token}", wanted)
    assert caught.value.status == status


def test_no_header_another_scheme_and_no_known_tokens_are_refused() -> None:
    for authorization in (None, "", "Basic operator", "operator"):
        assert roles().role_of(authorization) is None
    assert tokens.Roles({}).role_of("Bearer operator") is None
