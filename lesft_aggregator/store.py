"""What the aggregator keeps: a SQLite database and safetensors files, both under --state.

A file is on disk for good before its row is committed, and the row before anything is
acknowledged; so a row without a file cannot be, and a file without a row is the rest of a crash
and is removed when the store is opened.
"""

import errno
import hashlib
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.numpy import load, load_file
from sqlalchemy import create_engine, event, func, select
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session

from lesft.adapter_codec import FloatArray, Layout, checksum
from lesft.errors import InvalidInput
from lesft.files import lock_folder, write_atomically
from lesft.spec import AdapterEncoding
from lesft_aggregator.tables import Adapter, Client, Run, Submission, Table

DATABASE_FILE = "aggregator.sqlite"


class Store:
    """Rows are returned detached: plain values, never changed afterwards.

    Reading is safe from any thread; the caller sees to it that one thread writes at a time.
    """

    def __init__(self, state: Path, run_id: str, fresh: bool = False) -> None:
        """Open the folder, or make it, and clear away what a crash left half done.

        `fresh` drops what an earlier run left there.

        Raises InvalidInput when the folder is in use, belongs to another run or has lost files.
        """
        self._submissions = state / "submissions"
        self._adapters = state / "adapters"
        self._lock = lock_folder(state, "aggregator")
        for folder in (self._submissions, self._adapters):
            folder.mkdir(exist_ok=True)
        if fresh:
            _drop(state, self._submissions, self._adapters)
        self._database = state / DATABASE_FILE
        self._engine = create_engine(f"sqlite:///{self._database}")
        event.listen(self._engine, "connect", _set_pragmas)
        try:
            Table.metadata.create_all(self._engine)
            self._claim(state, run_id)
            self._tidy()
        except DatabaseError as error:
            self.close()
            raise InvalidInput(
                f"{state / DATABASE_FILE} cannot be used: {error.orig}; it is damaged, or of "
                "another version of LESFT: restore the --state folder, or start a new run with an "
                "empty one"
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the files; nothing is written."""
        self._engine.dispose()
        os.close(self._lock)

    def version(self) -> int:
        """The newest published version; 0 where nothing has been averaged yet."""
        with self._session() as session:
            return session.scalar(select(func.max(Adapter.version))) or 0

    def layout(self) -> Layout | None:
        """Names and shapes that every adapter must have, once a first one was accepted."""
        with self._session() as session:
            layout = session.scalars(select(Run)).one().layout
        return layout and {name: tuple(shape) for name, shape in layout.items()}

    def run_instance(self) -> str:
        """Of the server's run that the submissions so far are of; empty while none says."""
        with self._session() as session:
            return session.scalars(select(Run)).one().instance

    def clients(self) -> Sequence[Client]:
        """All clients, by name."""
        with self._session() as session:
            return session.scalars(select(Client).order_by(Client.client_id)).all()

    def submission(self, base_version: int, client_id: str) -> Submission | None:
        """One client's submission for one version, averaged or not."""
        with self._session() as session:
            return session.get(Submission, (base_version, client_id))

    def submissions(self, base_version: int) -> Sequence[Submission]:
        """All submissions for one version, in client-id order."""
        query = select(Submission).filter_by(base_version=base_version)
        with self._session() as session:
            return session.scalars(query.order_by(Submission.client_id)).all()

    def last_submissions(self) -> dict[str, int]:
        """The newest base version that each client has submitted for."""
        newest = func.max(Submission.base_version).label("newest")
        query = select(Submission.client_id, newest).group_by(Submission.client_id)
        with self._session() as session:
            return {row.client_id: row.newest for row in session.execute(query)}

    def adapter(self, version: int) -> Adapter | None:
        """A published version."""
        with self._session() as session:
            return session.get(Adapter, version)

    def adapters(self) -> Sequence[Adapter]:
        """All published versions, oldest first."""
        with self._session() as session:
            return session.scalars(select(Adapter).order_by(Adapter.version)).all()

    def newest_adapters(self, most: int) -> Sequence[Adapter]:
        """The newest published versions, newest first."""
        query = select(Adapter).order_by(Adapter.version.desc()).limit(most)
        with self._session() as session:
            return session.scalars(query).all()

    def encoded_path(self, version: int) -> Path:
        """Where the bundle lies for those who hold the version before, if there is one."""
        return self._adapters / f"{version:05}.encoded"

    def tensors(self, version: int) -> dict[str, FloatArray]:
        """A published version's; none of version 0."""
        return load_file(self.adapter_path(version)) if version else {}

    def adapter_bytes(self) -> int:
        """Size of all published versions."""
        size = func.sum(Adapter.num_bytes + Adapter.encoded_bytes)
        with self._session() as session:
            return session.scalar(select(size)) or 0

    def database_bytes(self) -> int:
        """Size of the database's files."""
        files = self._database.parent.glob(f"{self._database.name}*")
        return sum(file.stat().st_size for file in files)

    def submission_path(self, base_version: int, client_id: str) -> Path:
        """Where a submission lies until it has been averaged."""
        return self._submissions / f"{base_version:05}-{client_id}.safetensors"

    def adapter_path(self, version: int) -> Path:
        """Where a published version lies."""
        return self._adapters / f"{version:05}.safetensors"

    def join(self, client_id: str, num_samples: int) -> None:
        """Remember a client. Raises OSError when the disk does not take it."""
        with _full_disk_as_oserror(), self._session() as session, session.begin():
            _remember(session, client_id, num_samples)

    def add_submission(
        self,
        base_version: int,
        client_id: str,
        num_samples: int,
        data: bytes,
        layout: Layout,
        sha256: str = "",
        encoding: AdapterEncoding = "raw",
        run_instance: str = "",
    ) -> None:
        """Keep a submission; it would survive a power cut when this returns.

        `sha256` is of what the client sent, in `encoding`, where `data` was made from that. The
        first of the run fixes the layout and the `run_instance`. Raises OSError when the disk does
        not take it; nothing has changed then.
        """
        write_atomically(self.submission_path(base_version, client_id), data)
        with _full_disk_as_oserror(), self._session() as session, session.begin():
            _remember(session, client_id, num_samples)
            run = session.scalars(select(Run)).one()
            run.layout = run.layout or dict(layout)
            run.instance = run.instance or run_instance
            session.add(
                Submission(
                    base_version=base_version,
                    client_id=client_id,
                    num_samples=num_samples,
                    sha256=sha256 or hashlib.sha256(data).hexdigest(),
                    num_bytes=len(data),
                    encoding=encoding,
                    received=time.time(),
                )
            )

    def publish(
        self,
        version: int,
        averaged: Sequence[Submission],
        data: bytes,
        encoding: AdapterEncoding = "raw",
        encoded: bytes = b"",
    ) -> Adapter:
        """Keep a new version; the submissions that it averages lose their files afterwards.

        `encoded` is the bundle for those who hold the version before it. Raises OSError when the
        disk does not take it; nothing has changed then.
        """
        adapter = Adapter(
            version=version,
            client_ids=[part.client_id for part in averaged],
            num_samples=sum(part.num_samples for part in averaged),
            sha256=hashlib.sha256(data).hexdigest(),
            crc32=zlib.crc32(data),
            num_bytes=len(data),
            encoding=encoding,
            encoded_bytes=len(encoded),
            encoded_crc32=zlib.crc32(encoded),
            values_crc32=checksum(load(data)),
            created=time.time(),
        )
        if encoding != "raw":
            write_atomically(self.encoded_path(version), encoded)
        write_atomically(self.adapter_path(version), data)
        with _full_disk_as_oserror(), self._session() as session, session.begin():
            session.add(adapter)
        for part in averaged:
            self.submission_path(part.base_version, part.client_id).unlink(missing_ok=True)
        return adapter

    def _session(self) -> Session:
        return Session(self._engine, expire_on_commit=False)

    def _claim(self, state: Path, run_id: str) -> None:
        with self._session() as session, session.begin():
            known = session.scalar(select(Run.run_id))
            if known is None:
                session.add(Run(run_id=run_id))
            elif known != run_id:
                raise InvalidInput(
                    f"--state {state} belongs to run {known!r}, not to {run_id!r}: use another "
                    f"folder, or --run-id {known}"
                )

    def _tidy(self) -> None:
        version = self.version()
        open_round = self.submissions(version)
        keep = {
            self.submission_path(version, part.client_id): part.num_bytes for part in open_round
        }
        published = self.adapters()
        keep |= {self.adapter_path(adapter.version): adapter.num_bytes for adapter in published}
        keep |= {
            self.encoded_path(adapter.version): adapter.encoded_bytes
            for adapter in published
            if adapter.encoding != "raw"
        }
        for path, num_bytes in keep.items():
            if not path.is_file() or path.stat().st_size != num_bytes:
                raise InvalidInput(
                    f"{path} must have {num_bytes} bytes but is missing or was changed: restore "
                    "the --state folder, or start a new run with an empty one"
                )
        for folder in (self._submissions, self._adapters):
            for path in set(folder.iterdir()) - keep.keys():
                path.unlink()


def _drop(state: Path, *folders: Path) -> None:
    for path in [*state.glob(f"{DATABASE_FILE}*"), *(p for f in folders for p in f.iterdir())]:
        path.unlink()


def _remember(session: Session, client_id: str, num_samples: int) -> None:
    client = session.get(Client, client_id)
    if client is None:
        session.add(Client(client_id=client_id, num_samples=num_samples, joined=time.time()))
    else:
        client.num_samples = num_samples


@contextmanager
def _full_disk_as_oserror() -> Iterator[None]:
    """SQLite's word for it in the operating system's."""
    try:
        yield
    except OperationalError as error:
        if "disk is full" not in str(error.orig):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def _set_pragmas(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
