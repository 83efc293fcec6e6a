"""An OpenAI-compatible server for the tests: models, chat completions under a JSON schema, misbehaviour on purpose.

It does what a constrained model does: it fills in the keys that the schema requires, one sub-goal for three actions.
The faults are chosen by a function of the trajectory (its task's text), so that a restarted client meets the same.
"""

import json
import re
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "teacher-1"
BEFORE_THE_ANSWER = ["rate limit", "server error", "dropped", "stall"]  # nothing is paid, the client asks again itself
REFUSALS = {
    "too long": (400, "context_length_exceeded", "This model's maximum context length is 4096 tokens."),
    "rate limit": (429, "rate_limit_exceeded", "Slow down."),
    "server error": (500, "server_error", "The server had an error."),
    "no quota": (429, "insufficient_quota", "You exceeded your current quota."),
    "echo": (400, "bad_request", "Cannot work for {key}"),
}
UNREADABLE = {  # paid, and of no use
    "truncated": '{"1. go to kitchen": "navigate_to(kit',
    "ignored": "Certainly! 1- navigate_to(kitchen): {'go to kitchen'}",
    "nothing": None,
    "tell the key": "Your key is {key}.",
}


class Server(ThreadingHTTPServer):
    """`faults` maps a trajectory's task to the fault of its first answer; `seconds` is how long an answer takes."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, faults=lambda task: None, seconds: float = 0.0, key: str = "",
                 tokens: tuple[int, int] | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.seconds, self.key, self.tokens = faults, seconds, key, tokens
        self.always = None  # a fault of every answer
        self.lock = threading.Lock()
        self.paid = Counter()  # completions that were sent, by task
        self.times = []  # (task, when) of each question
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self):
        self.shutdown()
        self.server_close()

    def completion(self, body: dict, fault: str | None) -> dict:
        """The completion for a request, and with a fault one that no sub-goals can be read from."""
        if fault == "no completion":
            return {"detail": "I am a teapot"}
        names = body["response_format"]["json_schema"]["schema"]["required"]
        text = json.dumps({name: f"step_of_three({i // 3 + 1})" for i, name in enumerate(names)})
        if fault:
            text = UNREADABLE[fault] and UNREADABLE[fault].replace("{key}", self.key)
        read, written = self.tokens or (len(json.dumps(body["messages"])) // 4, len(text or "") // 4)
        return {"id": "chatcmpl-1", "object": "chat.completion", "created": int(time.time()), "model": body["model"],
                "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, body: dict, status: int = 200, **headers):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        with suppress(OSError):  # a client that was killed does not listen any more
            self.end_headers()
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str):
        wait = {"Retry-After": "1"} if code == "rate_limit_exceeded" else {"Retry-After-Ms": "10"}
        error = {"message": message.replace("{key}", self.server.key), "type": code, "param": None, "code": code}
        self.reply({"error": error}, status, **wait)

    def allowed(self) -> bool:
        given = self.headers.get("Authorization", "")
        if self.server.key not in given:
            self.refuse(401, "invalid_api_key", f"Incorrect API key provided: {given}.")
        return self.server.key in given

    def do_GET(self):
        if self.allowed():
            model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "tests"}
            self.reply({"object": "list", "data": [model]})

    def do_POST(self):
        server, raw = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if not raw or not self.allowed():  # a client that was killed sends headers and no body
            return
        body = json.loads(raw)
        task = re.search("^Task: (.*)$", body["messages"][-1]["content"], re.M)[1]
        with server.lock:
            first = task not in [asked for asked, _ in server.times]
            server.times.append((task, time.monotonic()))
        fault = server.always or (server.faults(task) if first else None)
        if fault in REFUSALS:
            self.refuse(*REFUSALS[fault])
        elif fault in ("dropped", "stall"):
            time.sleep(5 if fault == "stall" else 0)
            self.close_connection = True  # without a word
        else:
            time.sleep(server.seconds)
            with server.lock:
                server.paid[task] += 1
            self.reply(server.completion(body, fault))
