"""A judge on a free port that does to its client what servers do, and keeps what it saw.

`serve` in a test module is a fixture made of `servers()`.
"""

import http.server
import json
import select
import threading
import time
from collections import Counter
from hashlib import sha256


def truth(prompt: str) -> str:
    """What the server says to a prompt: its own, so that an answer to another prompt shows."""
    digest = sha256(prompt.encode()).hexdigest()
    return f"{'yes' if int(digest, 16) % 2 else 'no'}\n{digest}"


def good(prompt: str, text: str | None = None) -> tuple[int, dict, bytes]:
    message = {"role": "assistant", "content": text or truth(prompt)}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    body["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
    return 200, {}, json.dumps(body).encode()


SOON = {"retry-after-ms": "10"}  # the client starts at 0.5 s otherwise
NO_ANSWER = {  # the client repeats these by itself
    "429": (429, {"Retry-After": "0.01"}, b'{"error": {"message": "slow down"}}'),
    "429, ms": (429, SOON, b""),
    "500": (500, SOON, b"<html>oops</html>"),
    "503": (503, SOON, b""),
    "slow": "slow",
    "dropped": "dropped",
    "body cut": (200, {"Content-Length": "500"}, b'{"choices": ['),
}
OTHER_SHAPES = (
    "null",
    "[]",
    '"yes"',
    "7",
    "{}",
    '{"error": {"message": "no"}}',
    '{"choices": []}',
    '{"choices": null}',
    '{"choices": "yes"}',
    '{"choices": {"0": "yes"}}',
    '{"choices": ["yes"]}',
    '{"choices": [{"text": "yes"}]}',
    '{"choices": [{"message": null}]}',
    '{"choices": [{"message": {"content": null}}]}',
    '{"choices": [{"message": {"content": ["yes"]}}]}',
    '{"choices": [{"message": {"content": {"text": "yes"}}}]}',
    '{"choices": [{"message": {"content": true}}]}',
)
UNREADABLE = {  # these arrive, and are no verdict
    "broken JSON": (200, {}, b'{"choices": [{"message": {"content": "y'),
    "nothing": (200, {}, b""),
    "page": (200, {"Content-Type": "text/html"}, b"<html>yes</html>"),
    "not UTF-8": (200, {}, b'{"choices": "\xff\xfe"}'),
    **{body: (200, {}, body.encode()) for body in OTHER_SHAPES},
    "deep JSON": (200, {}, b"[" * 100_000 + b"]" * 100_000),
}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as by real servers
    wbufsize = -1  # one packet for header and body

    def do_POST(self):
        server, arrived = self.server, time.monotonic()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with server.lock:
            attempt = server.attempts[prompt]
            server.attempts[prompt] += 1
            server.seen.append((arrived, self.path, self.headers["Authorization"], body))
            server.now += 1
            server.most = max(server.most, server.now)
        reply = server.behave(prompt, attempt)
        # Of unequal length, so that answers come back in another order than the calls went out.
        time.sleep(int(sha256(prompt.encode()).hexdigest(), 16) % 10 / 1000)
        # Slow is: until the client hangs up.
        if reply == "slow" and not select.select([self.connection], [], [], 10)[0]:
            reply = good("too late")  # it should have
        with server.lock:  # before the answer leaves: the client's next request may come at once
            server.now -= 1
        if reply in ("slow", "dropped"):
            self.close_connection = True
            return
        if reply == "drip":  # a byte at a time, for as long as the client lets it
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
        status, headers, content = reply
        usual = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        self.send_response(status)
        for name, value in (usual | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = len(content) != int(headers.get("Content-Length", len(content)))

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """`behave(prompt, attempt)` is what it does."""

    request_queue_size = 256  # 5 by default: the kernel would make the rest wait a second

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.behave, self.lock = behave, threading.Lock()
        self.attempts, self.seen, self.now, self.most = Counter(), [], 0, 0
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self):
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, *_):  # a client that hung up
        pass


def servers(monkeypatch):
    """For a fixture: yields what starts a server; stops them all."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    started = []

    def start(behave=lambda prompt, attempt: good(prompt)) -> Server:
        started.append(Server(behave))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def calls_of(*prompts: str) -> list:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def numbered(n: int) -> list[str]:
    return [f"Is {i} met? </response> & \u2028 💊" for i in range(n)]
