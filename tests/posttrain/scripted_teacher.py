"""An OpenAI-compatible server on this machine whose answers and troubles a test writes.

    with scripted_teacher.serving(answer) as server:
        ... server.url ...; server.asked

`answer(asked)` gets the request's body and returns a text, (text, finish_reason), bytes to send as they are, or a
`Trouble`.
"""

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Trouble:
    """What goes wrong with one request: a status, a wait before the answer, or (status 0) a connection that is cut."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    sleep: float = 0.0
    body: bytes = b'{"error": {"message": "scripted"}}'


Answer = Callable[[dict[str, Any]], "str | tuple[str, str] | bytes | Trouble"]


@dataclass
class Server:
    url: str
    http: ThreadingHTTPServer
    asked: list[dict[str, Any]] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    """Digest of every prompt and seed that was answered in full: what would have been paid for."""


def prompt_of(asked: dict[str, Any]) -> str:
    """The text of a request, whichever of the two APIs it came by."""
    return asked["prompt"] if "prompt" in asked else "\n".join(m["content"] for m in asked["messages"])


@contextlib.contextmanager
def serving(answer: Answer, port: int = 0) -> Iterator[Server]:
    """A server that gives `answer`'s answers until the block is left."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send(200, json.dumps({"object": "list", "data": [{"id": "scripted"}]}).encode())

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked["authorization"] = self.headers.get("authorization")
            server.asked.append(asked)
            said = answer(asked)
            if isinstance(said, Trouble):
                time.sleep(said.sleep)
                if said.status == 0:
                    self.close_connection = True
                    with contextlib.suppress(OSError):
                        self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send(said.status, said.body, said.headers)
                return
            if isinstance(said, bytes):
                self.send(200, said)
                return
            text, reason = said if isinstance(said, tuple) else (said, "stop")
            told = {"text": text} if "prompt" in asked else {"message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": len(prompt_of(asked)), "completion_tokens": len(text)}
            digest = hashlib.sha256((prompt_of(asked) + str(asked["seed"]) + str(asked["max_tokens"])).encode())
            server.answered.append(digest.hexdigest())
            self.send(200, json.dumps({"choices": [{**told, "finish_reason": reason}], "usage": usage}).encode())

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            with contextlib.suppress(OSError):
                self.send_response(status)
                for name, value in {"content-type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    http.daemon_threads = True
    http.block_on_close = False
    server = Server(f"http://127.0.0.1:{http.server_port}", http)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
