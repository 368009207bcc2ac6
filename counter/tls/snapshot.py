"""Certificate files as they were at one moment, and the error that says why they cannot be used.

Plain data: who reads the files is certificates.py, what is made of them contexts.py.
"""

from __future__ import annotations

from dataclasses import dataclass


class CertificateError(Exception):
    """Certificate files that cannot be used: which one, why, and what to do."""


@dataclass(frozen=True)
class Snapshot:
    """Certificate, private key and authorities of clients, in PEM form, and their files' names.

    Without mutual TLS `ca` and `ca_file` are empty.
    """

    cert: str
    key: str
    ca: str
    cert_file: str
    key_file: str
    ca_file: str
