"""A judge on a free port of this machine, for whole runs; the client that asks it is the real one.

`Judge` answers every call at once. tests/test_judges.py has the server that misbehaves.
"""

import json
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from plumbing.judges import FIRST


class Judge(ThreadingHTTPServer):
    """Its verdict is a function of the prompt, so that mistaken identities would show.

    With `answer` it says that every time; "refuse" is a 404, but for the first question, with which
    a run asks whether it is there. `calls` are the prompts of the others, `seen` all (path, header
    Authorization, body).
    """

    def __init__(self, answer=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.calls, self.seen, self.lock = answer, [], [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.server.lock:
            self.server.seen.append((self.path, self.headers["Authorization"], body))
            if not (first := body["messages"] == FIRST):
                self.server.calls.append(prompt)
        text = self.server.answer or ("yes" if zlib.crc32(prompt.encode()) % 2 else "no")
        text = "yes" if first and text == "refuse" else text
        status = 200 if text != "refuse" else 404
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "strict"}
        reply["choices"] = [choice]
        error = {"error": {"message": "no such model"}}
        data = json.dumps(reply if status == 200 else error).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
