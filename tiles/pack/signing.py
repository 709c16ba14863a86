"""Signatures of packs, and the keys whose code may run.

Every user has an Ed25519 key pair (RFC 8032), made when it is first needed. In the keys folder, `$MHC_TUNE_KEYS` or
the platform's user configuration folder:

    signing-key.txt      the private key, readable by its owner alone: ed25519-private:<64 hexadecimal digits>
    trusted-keys.txt     public keys of others, one a line: ed25519:<64 hexadecimal digits>, then any note
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiles.cache.cache import write_atomically
from tiles.cache.record import shown
from tiles.errors import BadInput
from tiles.folders import keys_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNING_KEY_FILE, TRUSTED_KEYS_FILE = "signing-key.txt", "trusted-keys.txt"

_PRIVATE_PREFIX = "ed25519-private:"
_KEY = re.compile(r"ed25519:[0-9a-f]{64}")
_CONTEXT = b"mhc-tune pack manifest\n"
"""Prefix of the signed message, so that no signature made for another purpose is valid for a pack."""
_MAX_TRUSTED_KEYS_BYTES = 2**20


@dataclass(frozen=True)
class Signature:
    """An Ed25519 signature: the signer's public key as text, and 64 bytes."""

    key: str
    value: bytes

    def __post_init__(self) -> None:
        check_key(self.key)
        if len(self.value) != 64:
            raise BadInput(f"an Ed25519 signature has 64 bytes, got {len(self.value)}: export the pack again")


def check_key(text: str) -> str:
    """`text`, if it is a public key; raises `BadInput`."""
    if not _KEY.fullmatch(text):
        raise BadInput(f"a key is ed25519: and 64 hexadecimal digits, got {shown(text)}: see mhc-tune keys")
    return text


def own_key(*, create: bool) -> str | None:
    """This user's public key; None where there is none and `create` is not set. Raises `BadInput` with the remedy."""
    private = _private_key(create=create)
    return None if private is None else _public_text(private)


def sign(message: bytes) -> Signature:
    """Sign with this user's key, which is created if there is none. Raises `BadInput` with the remedy."""
    private = _private_key(create=True)
    assert private
    return Signature(_public_text(private), private.sign(_CONTEXT + message))


def why_untrusted(signature: Signature | None, message: bytes) -> str | None:
    """Why code with this signature of `message` may not run unasked, or None where the user's own or a trusted key made
    the signature.

    Raises `BadInput` for a signature that is not of this message: one of the two was damaged or forged.
    """
    if signature is None:
        return "it is not signed"
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        return "its signature cannot be checked, as the package cryptography is not installed"
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key.partition(":")[2]))
        public.verify(signature.value, _CONTEXT + message)
    except (InvalidSignature, ValueError):
        raise BadInput("its content must match its signature and does not: get the pack again from its maker") from None
    try:
        if signature.key in trusted_keys() or signature.key == own_key(create=False):
            return None
    except BadInput as error:
        return str(error)
    return f"it is signed by {signature.key}, which you have not listed (see mhc-tune keys)"


def trusted_keys() -> dict[str, str]:
    """The keys of others that the user trusts, each with its note. Raises `BadInput` for a damaged or writable list."""
    folder = keys_folder()
    if folder is None:
        return {}
    path = folder / TRUSTED_KEYS_FILE
    try:
        if why := _why_writable_by_others(path):
            raise BadInput(f"the list of trusted keys must be yours alone to change, got {path}: {why}")
        with path.open("rb") as file:
            text = file.read(_MAX_TRUSTED_KEYS_BYTES).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the list of trusted keys must be readable text, got {path} ({error}): mend it") from error
    words = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {check_key(key): note[0] if note else "" for key, *note in words}


def trust_key(line: str) -> str:
    """Trust a public key; `line` may go on with a note, as in `ed25519:0123... Alice's laptop`. Returns the key."""
    key, _, note = line.strip().partition(" ")
    check_key(key)
    if not note.isprintable():
        raise BadInput(f"a note must be printable and of one line, got {shown(note)}: leave out what is not")
    if key not in trusted_keys():
        _write(TRUSTED_KEYS_FILE, [*_lines(), f"{key} {note.strip()}".strip()])
    return key


def forget_key(key: str) -> None:
    """Remove a key from the trusted ones; raises `BadInput` if it is not one."""
    if check_key(key) not in trusted_keys():
        raise BadInput(f"a key to forget must be listed, got {key}: see mhc-tune keys")
    _write(TRUSTED_KEYS_FILE, [line for line in _lines() if line.split()[:1] != [key]])


def _private_key(*, create: bool) -> Ed25519PrivateKey | None:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise BadInput("signatures need the package cryptography, which is not installed: pip install it") from error
    folder = keys_folder() if not create else _writable_folder()
    if folder is None:
        return None
    path = folder / SIGNING_KEY_FILE
    try:
        if not path.exists():
            if not create:
                return None
            _write(
                SIGNING_KEY_FILE,
                [_PRIVATE_PREFIX + Ed25519PrivateKey.generate().private_bytes_raw().hex()],
                replace=False,
            )
        exposed = path.stat().st_mode & 0o077
        text = path.read_bytes()
    except OSError as error:
        raise BadInput(f"the signing key must be readable, got {path} ({error.strerror}): mend that") from error
    try:
        private = Ed25519PrivateKey.from_private_bytes(
            bytes.fromhex(text.decode().strip().removeprefix(_PRIVATE_PREFIX))
        )
    except ValueError:  # its text may quote the key
        raise BadInput(f"the signing key must be as it was written, got another text in {path}: move it") from None
    if exposed:
        raise BadInput(f"the signing key must be yours alone to read, got {path}: chmod 600 it")
    return private


def _public_text(private: Ed25519PrivateKey) -> str:
    return f"ed25519:{private.public_key().public_bytes_raw().hex()}"


def _lines() -> list[str]:
    path = _writable_folder() / TRUSTED_KEYS_FILE
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _writable_folder() -> Path:
    """The keys folder; raises `BadInput` for a user who has none."""
    folder = keys_folder()
    if folder is None:
        raise BadInput("keys need a home folder, and this user has none: set MHC_TUNE_KEYS, or leave packs --unsigned")
    return folder


def _write(name: str, lines: list[str], *, replace: bool = True) -> None:
    """Write a file of the keys folder for its owner alone. Without `replace` an older file stays: two processes that
    create a key at once both use the first one's."""
    folder = _writable_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = "".join(f"{line}\n" for line in lines).encode()
        write_atomically(folder / name, content, mode=0o600, replace=replace)
    except OSError as error:
        raise BadInput(
            f"the keys folder must be writable, got {folder} ({error.strerror}): mend it or set MHC_TUNE_KEYS"
        ) from error


def _why_writable_by_others(path: Path) -> str | None:
    """Why others can change a file, or replace it in its folder (unless the sticky bit forbids that), or None; ssh's
    rule."""
    if path.stat().st_mode & 0o022:
        return f"others may write to it, chmod go-w {path}"
    folder = path.parent.stat().st_mode
    if folder & 0o022 and not folder & stat.S_ISVTX:
        return f"others may write to its folder, chmod go-w {path.parent}"
    return None
