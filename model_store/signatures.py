"""Signatures of versions: Ed25519 (RFC 8032) over the bytes of the manifest, which hashes everything else."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from model_store.files import StoreError, VerificationFailed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_VARIABLE: Final = "CANDLECAST_STORE_PUBLIC_KEY"


def trusted_key(path: Path | None) -> "Ed25519PublicKey | None":
    """The key that versions must be signed by, of a PEM file; by default of the one that the environment names."""
    if not (chosen := path or os.environ.get(_VARIABLE)):
        return None
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        key = load_pem_public_key(Path(chosen).read_bytes())
    except (ImportError, OSError, ValueError) as error:
        raise _unusable(f"{_VARIABLE}={chosen}", error) from error
    if not isinstance(key, Ed25519PublicKey):
        raise _unusable(f"{_VARIABLE}={chosen}", "it is no Ed25519 key")
    return key


def signature_of(manifest: bytes, key: Path) -> bytes:
    """The signature that the private key in a PEM file, which has no password, gives."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        found = load_pem_private_key(key.read_bytes(), password=None)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise _unusable(str(key), error) from error
    if not isinstance(found, Ed25519PrivateKey):
        raise _unusable(str(key), "it is no Ed25519 key")
    return found.sign(manifest)


def check_signature(key: "Ed25519PublicKey", manifest: bytes, signature: bytes | None, what: str) -> None:
    """VerificationFailed, beginning with `what`, unless the signature is that of these bytes by `key`."""
    from cryptography.exceptions import InvalidSignature

    if signature is None:
        raise VerificationFailed(f"{what} is not signed: candlecast store sign {what} --key KEY.pem")
    try:
        key.verify(signature, manifest)
    except InvalidSignature as error:
        raise VerificationFailed(f"{what} is not signed by the trusted key") from error


def _unusable(where: str, reason: object) -> StoreError:
    advice = "; signatures need pip install 'candlecast[signing]'" if isinstance(reason, ImportError) else ""
    return StoreError(f"{where} cannot be used: {reason}{advice}")
