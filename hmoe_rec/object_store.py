"""What every store of objects needs, for `hmoe_rec.io`: errors in the user's words, retries that end, whole files.

A store behind fsspec has no directories and no rename; a file appears when it is closed. What goes wrong there carries
the provider's words only; here it gets the bucket, the action that was refused, and what to check.
"""

import errno
import io as bytes_io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

R = TypeVar("R")
log = logging.getLogger(__name__)

WAITS = (1.0, 4.0)  # seconds between tries; below them the provider's own client has tried several times already
SLOW_SECONDS = 30.0  # after which a request that hangs is told
PASSING = {408, 429, 500, 502, 503, 504}
AS_THEY_ARE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
# S3's operations -> the action that a policy must allow, where the name is another one.
ACTIONS = {
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListObjects": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "DeleteObjects": "s3:DeleteObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "CopyObject": "s3:GetObject and s3:PutObject",
}
UNREACHABLE = (
    "EndpointConnectionError ConnectTimeoutError ReadTimeoutError ConnectionClosedError FSTimeoutError HTTPClientError "
    "ResponseParserError ClientPayloadError ClientConnectorError ServerDisconnectedError TimeoutError"
).split()


class StorageError(OSError):
    """A store refused or did not answer.

    Attributes:
        passing: it may work a moment later.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Around calls of fsspec: what they raise becomes a StorageError; a file that is missing stays what it is."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # every provider has classes of its own
        found = _in_words(str(uri), error)
        if found is None:
            raise
        raise found from error


def tried(uri: str, call: Callable[[], R]) -> R:
    """The result of a call that may be made again; what passes is tried again after WAITS, and each time told.

    Raises:
        StorageError: it was refused, or failed each time.
    """
    for wait in (*WAITS, None):
        try:
            with explained(uri), _told_where_slow(uri):
                return call()
        except StorageError as error:
            if not error.passing:
                raise
            if wait is None:
                raise StorageError(f"{error}; given up after {len(WAITS) + 1} tries", passing=True) from error
            log.warning("%s; trying again in %g s", error, wait)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


@contextmanager
def _told_where_slow(uri: str) -> Iterator[None]:
    timer = threading.Timer(SLOW_SECONDS, log.warning, ("%s: still waiting after %g s", uri, SLOW_SECONDS))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _in_words(uri: str, error: Exception) -> StorageError | None:
    """None: it says enough as it is."""
    answer = next((e for e in _causes(error) if isinstance(getattr(e, "response", None), dict)), None)
    if answer is not None:
        return _of_answer(uri, error, answer)
    name = type(error).__name__
    if isinstance(error, AS_THEY_ARE):
        return None
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageError(
            f"{uri}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give "
            "this machine a role"
        )
    if name in UNREACHABLE:
        return StorageError(
            f"{uri}: the store cannot be reached ({_words_of(error)}); check the network, and AWS_ENDPOINT_URL where "
            "the store is not Amazon's",
            passing=True,
        )
    status = getattr(error, "code", None) or getattr(error, "status", None) or getattr(error, "status_code", None)
    if isinstance(error, PermissionError) or status in (401, 403):
        bucket = _bucket(uri)
        return StorageError(
            f"{uri}: access to {bucket} was refused ({_words_of(error)}); check the credentials and what they may do"
        )
    passing = status in PASSING or getattr(error, "errno", None) in (errno.EBUSY, getattr(errno, "EREMOTEIO", None))
    return StorageError(f"{uri}: {_words_of(error)}", passing=passing)


def _of_answer(uri: str, error: Exception, answer: Any) -> StorageError | None:
    """Of an answer of S3, or of a store that speaks as it does."""
    content, bucket = answer.response.get("Error", {}), _bucket(uri)
    code, status = content.get("Code", ""), answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    operation = getattr(answer, "operation_name", "") or "the request"
    action = ACTIONS.get(operation, f"s3:{operation}")
    said = f"{status} {code}: {content.get('Message', '')}".rstrip(": ")
    if code == "NoSuchBucket" or (status == 404 and operation == "HeadBucket"):
        return StorageError(
            f"{uri}: there is no bucket {bucket!r} (404); make it first, or check its name, AWS_ENDPOINT_URL and the "
            "region (AWS_DEFAULT_REGION)"
        )
    if isinstance(error, AS_THEY_ARE):
        return None
    if status in (401, 403):
        return StorageError(
            f"{uri}: bucket {bucket!r} refused {operation} ({said}); check the credentials (AWS_ACCESS_KEY_ID, "
            f"AWS_PROFILE or the machine's role), that their policy allows {action} on this bucket and prefix, and "
            "AWS_ENDPOINT_URL and the region (AWS_DEFAULT_REGION)"
        )
    return StorageError(f"{uri}: bucket {bucket!r} answered {operation} with {said}", passing=status in PASSING)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _words_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _bucket(uri: str) -> str:
    return uri.partition("://")[2].partition("/")[0]


class RemoteFile(bytes_io.RawIOBase):
    """A binary file of a store. One that is written appears when it is closed, and not where its `with` block fails."""

    def __init__(self, uri: str, files: Any, path: str, mode: str) -> None:
        self.uri, self._files, self._path = uri, files, path
        self._writes = "r" not in mode
        self._inner = tried(uri, lambda: files.open(path, mode))

    def read(self, size: int | None = -1) -> bytes:
        with explained(self.uri):
            return self._inner.read(-1 if size is None else size)

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer).cast("B") as view:
            data = self.read(len(view))
            view[: len(data)] = data
            return len(data)

    def write(self, data: Any) -> int:
        with memoryview(data) as view, explained(self.uri):
            self._inner.write(view.cast("B") if view.nbytes else b"")
            return view.nbytes

    def seek(self, offset: int, whence: int = 0) -> int:
        with explained(self.uri):
            return self._inner.seek(offset, whence)

    def tell(self) -> int:
        return self._inner.tell()

    def readable(self) -> bool:
        return not self._writes

    def writable(self) -> bool:
        return self._writes

    def seekable(self) -> bool:
        return not self._writes

    def close(self) -> None:
        if not self.closed:
            try:
                with explained(self.uri), _told_where_slow(self.uri):
                    self._inner.close()
            finally:
                super().close()

    def discard(self) -> None:
        """Closes a file that shall not appear."""
        super().close()
        with explained(self.uri):
            self._inner.discard()
            try:
                self._inner.closed = True  # otherwise its destructor would commit it
            except AttributeError:  # a file that is there as soon as it is opened
                self._inner.close()
                self._files.rm_file(self._path)

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None and self._writes and not self.closed:
            self.discard()
        self.close()

    def __del__(self) -> None:
        """A file that nobody closed was not finished."""
        if getattr(self, "_inner", None) is not None and self._writes and not self.closed:
            with suppress(Exception):
                self.discard()


class TextToPut(bytes_io.StringIO):
    """A text file of a store, put as a whole when it is closed, and not where its `with` block fails."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        super().__init__(newline="")
        self._put: Callable[[bytes], None] | None = put

    def close(self) -> None:
        put, self._put = self._put, None
        if put is not None:
            put(self.getvalue().encode())
        super().close()

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            self._put = None
        self.close()

    def __del__(self) -> None:
        self._put = None
