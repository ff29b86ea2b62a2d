#!/usr/bin/env bash
# huggingface_hub 2.4.0: with HF_HUB_OFFLINE=1 its client does not ask a server on the same machine either.
#
# Expected: "offline" keeps the hub from being asked; `InferenceClient(base_url="http://127.0.0.1:...")` names a server of one's own
#           (vLLM, TGI, llama.cpp), which is no hub and needs no network.
# Seen:     OfflineModeIsEnabled, before anything is sent. Without the variable the same call has its answer.
# Hurts:    whoever sets the variable on a cluster node, as most guides say, and has a served model, judge or teacher beside the training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "huggingface_hub==2.4.0"
cat > "$folder/ask.py" <<'PY'
import http.server
import json
import sys
import threading

from huggingface_hub import InferenceClient


class Server(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_POST(self):
        Server.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "7"}
        body = {
            "id": "0", "object": "chat.completion", "created": 0, "model": "m", "system_fingerprint": "",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = InferenceClient(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
try:
    said = client.chat_completion([{"role": "user", "content": "3+4="}], model="m").choices[0].message.content
except Exception as error:
    said = type(error).__name__
print(f"{said}, asked {Server.asked} times")
sys.exit(0 if (said, Server.asked) == {"online": ("7", 1), "offline": ("OfflineModeIsEnabled", 0)}[sys.argv[1]] else 1)
PY
echo -n "without the variable: "; "$folder/venv/bin/python" "$folder/ask.py" online
echo -n "HF_HUB_OFFLINE=1:     "; HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/ask.py" offline \
  || { echo "changed: this finding is out of date"; exit 1; }
