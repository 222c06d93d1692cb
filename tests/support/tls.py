"""A certificate authority for a test, its certificates in files, and channels that use them."""

import os
from collections.abc import Sequence
from pathlib import Path

import grpc
import trustme

LOCAL = ("localhost", "127.0.0.1")


class Authority:
    """An authority whose files are in `folder`: its own certificate in `authority`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ca = trustme.CA()
        folder.mkdir()
        self.file = folder / "authority"
        self.file.write_bytes(self._ca.cert_pem.bytes())

    def issue(self, name: str, *identities: str) -> tuple[Path, Path]:
        """Write a new certificate and its key to files of this name, replacing existing ones."""
        issued = self._ca.issue_cert(*identities)
        paths = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        exchange(paths[0], b"".join(each.bytes() for each in issued.cert_chain_pems))
        exchange(paths[1], issued.private_key_pem.bytes())
        return paths


def exchange(path: Path, content: bytes) -> None:
    """Replace this file by another one, as tools that renew certificates do."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)


def channel(target: str, authority: Path, own: Sequence[Path] = ()) -> grpc.Channel:
    """Open a channel with its own connection, with the client's certificate and key if given."""
    certificate, key = (path.read_bytes() for path in own) if own else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.read_bytes(), key, certificate)
    return grpc.secure_channel(target, credentials, options=[("grpc.use_local_subchannel_pool", 1)])
