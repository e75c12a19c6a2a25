"""The aggregator's database: the run, its clients, their submissions, the averaged adapters.

Times are seconds since 1970. Tensors lie in files beside the database; see `store`.
"""

from typing import Any

from sqlalchemy import JSON, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from lesft.spec import AdapterEncoding


class Table(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's)
        dict[str, Any]: JSON,
        list[str]: JSON,
        AdapterEncoding: String,
    }


class Run(Table):
    """The one run that this state belongs to."""

    __tablename__ = "run"

    run_id: Mapped[str] = mapped_column(primary_key=True)
    layout: Mapped[dict[str, Any] | None]
    """Shape of each tensor by name; null until the first submission."""
    instance: Mapped[str] = mapped_column(default="")
    """Of the server's run, by the receipt of the first submission; empty without receipts."""


class Client(Table):
    """A client that has joined or submitted."""

    __tablename__ = "clients"

    client_id: Mapped[str] = mapped_column(primary_key=True)
    num_samples: Mapped[int]
    """Size of its data set in samples, as it said last."""
    joined: Mapped[float]


class Submission(Table):
    """One client's adapter for one version. The row stays when the file has been averaged."""

    __tablename__ = "submissions"

    base_version: Mapped[int] = mapped_column(primary_key=True)
    client_id: Mapped[str] = mapped_column(primary_key=True)
    num_samples: Mapped[int]
    sha256: Mapped[str]
    """Of what was sent."""
    num_bytes: Mapped[int]
    """Of the file: float32."""
    encoding: Mapped[AdapterEncoding]
    """How it was sent."""
    received: Mapped[float]


class Adapter(Table):
    """A published version."""

    __tablename__ = "adapters"

    version: Mapped[int] = mapped_column(primary_key=True)
    client_ids: Mapped[list[str]]
    """In the order of the sum."""
    num_samples: Mapped[int]
    sha256: Mapped[str]
    crc32: Mapped[int]
    num_bytes: Mapped[int]
    encoding: Mapped[AdapterEncoding]
    """Of the bundle for those who hold the version before; raw where there is none."""
    encoded_bytes: Mapped[int]
    encoded_crc32: Mapped[int]
    values_crc32: Mapped[int]
    """Of the tensors, by which a client tells that it has the same."""
    created: Mapped[float]
