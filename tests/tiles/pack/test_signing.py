"""Signatures and keys: the user's own and listed keys are trusted, others are not, and forgeries are refused."""

import multiprocessing
import stat
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import tiles
from tiles.errors import BadInput
from tiles.pack import signing as trust
from tiles.pack.signing import Signature

MESSAGE = b"a manifest"
STRANGER = "ed25519:" + "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def keys(tmp_path, monkeypatch):
    """A keys folder that does not exist yet."""
    monkeypatch.setenv("MHC_TUNE_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """Somebody else's signature of the message."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MHC_TUNE_KEYS", str(tmp_path / "elsewhere"))
        return trust.sign(MESSAGE)


def test_the_own_signature_is_trusted():
    assert trust.own_key(create=False) is None
    signature = trust.sign(MESSAGE)
    assert signature.key == trust.own_key(create=False)
    assert trust.sign(MESSAGE) == signature
    assert trust.why_untrusted(signature, MESSAGE) is None


def test_a_missing_signature_is_no_trust():
    assert trust.why_untrusted(None, MESSAGE) == "it is not signed"


def test_a_strangers_key_is_named_and_trusted_once_listed(theirs):
    assert theirs.key in trust.why_untrusted(theirs, MESSAGE)
    trust.trust_key(f"{theirs.key} Alice's laptop")
    assert trust.trusted_keys() == {theirs.key: "Alice's laptop"}
    assert trust.why_untrusted(theirs, MESSAGE) is None
    trust.forget_key(theirs.key)
    assert trust.trusted_keys() == {}
    assert "not listed" in trust.why_untrusted(theirs, MESSAGE)


def test_a_signature_of_something_else_is_refused_whoever_made_it(theirs):
    own = trust.sign(MESSAGE)
    for forged in (
        Signature(own.key, theirs.value),
        Signature(own.key, bytes(64)),
        Signature(own.key, own.value[:-1] + bytes([own.value[-1] ^ 1])),
        Signature(theirs.key, own.value),
        Signature(STRANGER, own.value),
        Signature("ed25519:" + "f" * 64, own.value),
    ):
        with pytest.raises(BadInput, match="must match its signature and does not"):
            trust.why_untrusted(forged, MESSAGE)
    with pytest.raises(BadInput, match="must match its signature"):
        trust.why_untrusted(own, MESSAGE + b" ")


def test_what_is_signed_is_said_to_be_a_packs_manifest():
    """A bare Ed25519 signature of the same bytes, made for another purpose, is not one of a pack."""
    private = trust._private_key(create=True)
    with pytest.raises(BadInput, match="must match its signature"):
        trust.why_untrusted(Signature(trust.own_key(create=False), private.sign(MESSAGE)), MESSAGE)


@pytest.mark.parametrize(
    "key", ["", "ed25519:", STRANGER[:-1], STRANGER.upper(), STRANGER + "0", f"rsa{STRANGER}", "\x1b"]
)
def test_odd_keys_are_refused(key):
    for call in (trust.trust_key, trust.forget_key, lambda key: Signature(key, bytes(64))):
        with pytest.raises(BadInput, match="a key is ed25519: and 64 hexadecimal digits") as caught:
            call(key)
        assert str(caught.value).isprintable()
    with pytest.raises(BadInput, match="has 64 bytes, got 63"):
        Signature(STRANGER, bytes(63))


def test_a_note_cannot_smuggle_in_a_line():
    with pytest.raises(BadInput, match="printable"):
        trust.trust_key(f"{STRANGER} a note\n{STRANGER.replace('0', '1')}")
    assert trust.trusted_keys() == {}


def test_the_private_key_is_its_owners_alone(keys):
    trust.sign(MESSAGE)
    trust.trust_key(STRANGER)
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in keys.iterdir()} == {
        "signing-key.txt": 0o600,
        "trusted-keys.txt": 0o600,
    }
    (keys / "signing-key.txt").chmod(0o640)
    with pytest.raises(BadInput, match=r"must be yours alone to read, got .*: chmod 600 it"):
        trust.sign(MESSAGE)


def test_a_list_that_others_can_change_is_not_believed(keys, theirs):
    trust.trust_key(theirs.key)
    listed = keys / "trusted-keys.txt"
    for path, mode, why in ((listed, 0o620, "write to it"), (listed, 0o602, "write to it"), (keys, 0o777, "folder")):
        before = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode)
        assert why in trust.why_untrusted(theirs, MESSAGE)
        path.chmod(before)
    assert trust.why_untrusted(theirs, MESSAGE) is None


def test_the_list_is_a_plain_file_to_edit(keys):
    keys.mkdir(mode=0o700)
    (keys / "trusted-keys.txt").write_text(f"# colleagues\n\n  {STRANGER}\tthe build machine\n")
    (keys / "trusted-keys.txt").chmod(0o644)
    assert trust.trusted_keys() == {STRANGER: "the build machine"}
    other = trust.trust_key(STRANGER.replace("0", "1"))
    trust.trust_key(other)
    trust.forget_key(STRANGER)
    assert (keys / "trusted-keys.txt").read_text() == f"# colleagues\n\n{other}\n"


@pytest.mark.parametrize("content", ["ssh-ed25519 AAAA", "\x00", STRANGER[:-1]])
def test_a_damaged_list_or_key_is_said_in_one_line(keys, theirs, content):
    trust.trust_key(STRANGER)
    (keys / "trusted-keys.txt").write_text(content)
    assert "a key is ed25519:" in trust.why_untrusted(theirs, MESSAGE)
    (keys / "trusted-keys.txt").write_bytes(b"\xff")
    assert "must be readable text" in trust.why_untrusted(theirs, MESSAGE)
    (keys / "signing-key.txt").write_text(content)
    (keys / "signing-key.txt").chmod(0o600)
    with pytest.raises(BadInput, match="must be as it was written"):
        trust.sign(MESSAGE)


def test_a_damaged_private_key_is_refused_and_not_quoted(keys):
    trust.sign(MESSAGE)
    whole = (keys / "signing-key.txt").read_text()
    for text in ("", whole[:-2], whole.strip() + "0", whole.replace("-private", ""), f"{whole}{whole}"):
        (keys / "signing-key.txt").write_text(text)
        with pytest.raises(BadInput, match="must be as it was written") as caught:
            trust.sign(MESSAGE)
        assert whole[30:40] not in str(caught.value)
        assert (keys / "signing-key.txt").read_text() == text


def test_keys_that_cannot_be_read_are_said_and_stop_no_pack(keys, theirs):
    trust.sign(MESSAGE)
    (keys / "signing-key.txt").unlink()
    (keys / "signing-key.txt").mkdir()  # root reads everything else
    with pytest.raises(BadInput, match="the signing key must be readable"):
        trust.sign(MESSAGE)
    assert "the signing key must be readable" in trust.why_untrusted(theirs, MESSAGE)


def test_a_folder_that_cannot_be_written_is_said(keys):
    keys.write_text("a file")
    assert trust.trusted_keys() == {}
    with pytest.raises(BadInput, match=r"the keys folder must be writable, got .*set MHC_TUNE_KEYS"):
        trust.sign(MESSAGE)


def test_processes_that_make_a_key_at_once_agree_on_one(keys):
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = set(pool.map(_own_key, range(16)))
    assert made == {trust.own_key(create=False)}
    assert [path.name for path in keys.iterdir()] == ["signing-key.txt"]


def _own_key(_):
    return trust.own_key(create=True)


def test_the_signature_is_plain_ed25519_of_a_prefix_and_the_message():
    """Other tools can check a pack by this rule."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signature = trust.sign(MESSAGE)
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key.removeprefix("ed25519:")))
    public.verify(signature.value, b"mhc-tune pack manifest\n" + MESSAGE)


def test_without_cryptography_signatures_count_for_nothing(theirs):
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from tiles.pack import signing as trust; from tiles.errors import BadInput\n"
        f"print(trust.why_untrusted(trust.Signature({theirs.key!r}, {theirs.value!r}), {MESSAGE!r}))\n"
        "try: trust.sign(b'')\n"
        "except BadInput as error: print(error)\n"
    )
    root = Path(tiles.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    checked, signed = done.stdout.splitlines()
    assert checked == "its signature cannot be checked, as the package cryptography is not installed"
    assert "pip install it" in signed
