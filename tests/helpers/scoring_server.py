"""A stand-in for a vLLM server: the two routes that TRL's client asks when it scores, answered by a model on the CPU."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch


@contextlib.contextmanager
def vllm_server(model, name="the-teacher", keeps_sampled_token=True, most=20, granted=None, first_id=0, deaf=False):
    """
    Serve a model. Yields the address and the list of requests for scores.

    `most` is vLLM's `--max-logprobs`; a broken server names `granted` tokens whatever is asked, or counts its tokens from
    `first_id`; a `deaf` one scores at temperature 1 (vLLM's `raw_logprobs`).
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.answer({"data": [{"id": name}]} if self.path == "/v1/models" else {})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            asked = request["prompt_logprobs"]
            if asked > most:
                message = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {most}"
                self.answer({"error": {"message": message}}, 400)
                return
            self.answer({"choices": [scored(ids, request) for ids in request["prompt"]]})

        def answer(self, value, code=200):
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def scored(ids, request):
        with torch.no_grad():
            temperature = 1.0 if deaf else request["temperature"]
            table = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
        places = [None]
        for place, token in enumerate(ids[1:]):
            wanted = table[place].topk(granted or request["prompt_logprobs"]).indices.tolist()
            wanted += [token] if keeps_sampled_token and token not in wanted else []
            rank = table[place].argsort(descending=True).tolist().index
            known = {t: {"logprob": float(table[place, t]), "rank": rank(t) + 1} for t in wanted}
            # What was sampled keeps its id.
            names = {t: str(t if t == token else t + first_id) for t in wanted}
            places.append({names[t]: value for t, value in known.items()})
        return {"prompt_logprobs": places}

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
