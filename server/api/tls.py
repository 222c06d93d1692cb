"""TLS: the certificates of the settings as gRPC's credentials, exchanged without a restart."""

import ssl
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import grpc

from server.api.watched_files import WatchedFiles
from server.errors import CredentialsError
from server.settings import Settings

Certificates = WatchedFiles[grpc.ServerCertificateConfiguration]


def load_certificates(settings: Settings) -> Certificates | None:
    """Read the TLS files of the settings, None without TLS. Raises CredentialsError."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    paths = [settings.tls_certificate, settings.tls_key]
    if settings.tls_client_ca is not None:
        paths.append(settings.tls_client_ca)
    return WatchedFiles("certificates", partial(_parse, paths), *paths)


def server_credentials(
    certificates: Certificates | None, require_client_certificate: bool
) -> grpc.ServerCredentials | None:
    """Return gRPC's credentials, None without TLS. Each new connection gets the current certificate.

    `require_client_certificate`: only clients with a certificate of the files' CA may connect.
    """
    if certificates is None:
        return None
    latest = first = certificates.content()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal latest
        before, latest = latest, certificates.content()
        return None if latest is before else latest  # gRPC parses each that it gets

    return grpc.dynamic_ssl_server_credentials(
        first,
        changed,  # type: ignore[arg-type]  # the stubs do not know None, for no change
        require_client_authentication=require_client_certificate,
    )


def _parse(
    paths: Sequence[Path], certificate: bytes, key: bytes, client_ca: bytes | None = None
) -> grpc.ServerCertificateConfiguration:
    """Return gRPC's configuration, after a check by OpenSSL: gRPC would report bad files only in a handshake."""
    trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        trial.load_cert_chain(paths[0], paths[1], password="")  # without a password, OpenSSL would ask the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CredentialsError(f"{paths[1]} is not the key of {paths[0]}") from error
        pair = f"{paths[0]} and {paths[1]} must be a certificate and its unencrypted key, in PEM"
        raise CredentialsError(pair) from error
    if client_ca is not None:
        try:
            trial.load_verify_locations(paths[2])
        except ssl.SSLError as error:
            raise CredentialsError(f"{paths[2]} must be certificates of authorities, in PEM") from error
    return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)
