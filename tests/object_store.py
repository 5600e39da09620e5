"""A real S3 server (moto's) in a thread of the test, whose answers can be spoiled.

store = ObjectStore(); store.start(); os.environ.update(store.environment); store.make_bucket("b")
store.spoil("PUT", "manifest", 503)     # the next answers to such requests
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

CODES = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}
BODY = '<?xml version="1.0"?><Error><Code>{}</Code><Message>spoiled by the test</Message></Error>'


@dataclass
class Spoiled:
    """An answer that goes wrong: with a status, after some seconds ("slow"), in the middle ("cut"), or after a call."""

    method: str
    pattern: str
    how: int | str | Callable[[], None]
    times: float
    seconds: float
    skip: int


@dataclass
class ObjectStore:
    """
    Attributes:
        requests: (method, path with query) of all requests.
    """

    requests: list[tuple[str, str]] = field(default_factory=list)
    uri: str = ""

    def start(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_: Any) -> None:
                pass

        self._application = DomainDispatcherApplication(create_backend_app)
        self._spoiled: list[Spoiled] = []
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> str:
        import boto3

        boto3.client("s3").create_bucket(Bucket=name)
        self.uri = f"s3://{name}"
        return self.uri

    def keys(self) -> list[str]:
        """Of the bucket made last."""
        import boto3

        pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=self.uri.removeprefix("s3://"))
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def spoil(
        self,
        method: str,
        pattern: str,
        how: int | str | Callable[[], None],
        times: float = 1,
        seconds: float = 0.0,
        skip: int = 0,
    ) -> None:
        """The next `times` answers, after `skip` of them, to requests of this method whose path with query matches."""
        self._spoiled.append(Spoiled(method, pattern, how, times, seconds, skip))

    def heal(self) -> None:
        self._spoiled.clear()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        self.requests.append((method, path))
        for rule in self._spoiled:
            if rule.times > 0 and rule.method in (method, "*") and re.search(rule.pattern, path):
                if rule.skip:
                    rule.skip -= 1
                    continue
                rule.times -= 1
                return self._spoil(rule, environ, start_response)
        return self._application(environ, start_response)

    def _spoil(self, rule: Spoiled, environ: dict[str, Any], start_response: Any) -> Any:
        if callable(rule.how):  # before the request is carried out
            rule.how()
            rule.how = 503
        if isinstance(rule.how, int):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = b"" if environ["REQUEST_METHOD"] == "HEAD" else BODY.format(CODES[rule.how]).encode()
            start_response(f"{rule.how} Spoiled", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
            return [body]
        time.sleep(rule.seconds)
        whole = self._application(environ, start_response)
        return whole if rule.how == "slow" else _cut(whole)


def _cut(whole: Any) -> Iterator[bytes]:
    body = b"".join(whole)
    yield body[: len(body) // 2]
    raise ConnectionAbortedError("cut by the test")
