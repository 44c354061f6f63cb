"""An HTTP server that follows a script."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Scripted:
    """A server that gives one answer after the other: (status, headers, content), or seconds of silence before it
    hangs up. Content in a list is sent in pieces, without an end if the last is None."""

    def __init__(self, *answers: Any) -> None:
        script: list[Any] = list(answers)
        self.asked: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.may_end = threading.Event()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                scripted.asked.append((self.command, self.path, json.loads(self.rfile.read(length) or "null")))
                scripted.headers.append({name.lower(): value for name, value in self.headers.items()})
                answer = script.pop(0)
                if isinstance(answer, (int, float)):
                    scripted.may_end.wait(answer)
                    self.close_connection = True
                    return
                status, headers, content = answer
                pieces = content if isinstance(content, list) else None
                body = (content if isinstance(content, str) else json.dumps(content)).encode()
                length_or_not = {"Content-Length": str(len(body))} if pieces is None else {"Connection": "close"}
                self.send_response(status)
                for name, value in {**length_or_not, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in [body] if pieces is None else pieces:
                    if piece is None:
                        scripted.may_end.wait()
                    else:
                        self.wfile.write(piece if isinstance(piece, bytes) else piece.encode())

            do_GET = do_PUT = do_POST = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def stop(self) -> None:
        self.may_end.set()
        self.server.shutdown()
        self.server.server_close()
