"""Stand-ins for vLLM: a server behind TRL's own `VLLMGeneration`, which keeps the weights that it is sent, and an engine in its place."""

import random
import threading

import torch
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


class Engine:
    """Stands in for vLLM: samples from the trainer's model, and reports slightly different log-probabilities."""

    def __init__(self, model, **kwargs):
        self.model, self.options, self.syncs = model, kwargs, 0

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler):
        completions, log_probs = [], []
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=True, top_k=0
                )[0]
                log_p = self.model(out.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
            tokens = out[len(prompt) :]
            chosen = log_p[len(prompt) - 1 :].gather(1, tokens.unsqueeze(1)).squeeze(1)
            completions.append(tokens.tolist())
            log_probs.append([[value - 0.4 + 0.1 * (row % 8)] for value in chosen.tolist()])
        return prompts, completions, log_probs, None


OPTIONS = {"use_vllm": True, "vllm_mode": "server"}


def serve(setattr_=lambda owner, name, value, **_: setattr(owner, name, value)):
    """Let TRL find the stand-in; `setattr_` is `monkeypatch.setattr` where it has to end with a test."""
    setattr_(vllm_generation, "is_vllm_available", lambda: True)
    setattr_(vllm_generation, "VLLMClient", Client, raising=False)
