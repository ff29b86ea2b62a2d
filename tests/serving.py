"""A stand-in for a vLLM server behind TRL's own `VLLMGeneration`: the weights that it is sent it keeps, its samples are drawn."""

import random
import threading

from trl.generation import vllm_generation


class Client:
    """Stands in for TRL's client of a server."""

    def __init__(self, base_url, **options):
        self.base_url, self.pushes, self.threads = base_url, [], []

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params):
        sent = [(name, weight.detach().clone()) for name, weight in named_params]
        # The server unpacks by what was announced.
        assert metadata == [(n, str(w.dtype).removeprefix("torch."), list(w.shape)) for n, w in sent]
        self.pushes.append(sent)

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, n, max_tokens, **options):
        """Completions of random length, a function of the prompt and its place."""
        self.threads.append(threading.current_thread())
        completions = []
        for place, prompt in enumerate(prompts):
            for copy in range(n):
                draw = random.Random(str((prompt, place, copy)))
                completions.append([draw.randrange(5, 60) for _ in range(draw.randint(2, max_tokens))])
        log_probs = [[[-3.0]] * len(ids) for ids in completions]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": log_probs}


OPTIONS = {"use_vllm": True, "vllm_mode": "server"}


def serve(setattr_=lambda owner, name, value, **_: setattr(owner, name, value)):
    """Let TRL find the stand-in; `setattr_` is `monkeypatch.setattr` where it has to end with a test."""
    setattr_(vllm_generation, "is_vllm_available", lambda: True)
    setattr_(vllm_generation, "VLLMClient", Client, raising=False)
