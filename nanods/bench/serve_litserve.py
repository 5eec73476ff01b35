"""A run behind LitServe 0.2, as nanods/bench/serve_http.py starts it: RUN PORT.

It is written as LitServe's documentation says: the model is loaded in `setup`, and LitServe
collects up to 32 requests, for at most 50 ms, into a batch, for which `predict` generates. Prompts
may differ in length, which `GPT.generate` allows, and so may answers: the batch ends with its
longest. The reply has those fields of OpenAI's completions that the bench's client reads.
"""

import sys

import litserve
import torch

from nanods.training.finished_run import load_run


class Completions(litserve.LitAPI):
    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        run = load_run(sys.argv[1], device)
        self.model, self.tokenizer = run.model, run.tokenizer

    @torch.no_grad()
    def predict(self, requests: list[dict]) -> list[list[int]]:
        """Return the new tokens of each request."""
        prompts = [torch.from_numpy(self.tokenizer.encode(r["prompt"])).long() for r in requests]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        counts = [request["max_tokens"] for request in requests]
        seed = requests[0]["seed"]
        new = self.model.generate(tokens, max(counts), lengths, seed=seed)
        rows = torch.stack(list(new), dim=1).tolist()
        return [row[:count] for row, count in zip(rows, counts, strict=True)]

    def encode_response(self, output: list[int]) -> dict:
        text = self.tokenizer.decode(output)
        return {"choices": [{"text": text}], "usage": {"completion_tokens": len(output)}}


if __name__ == "__main__":
    api = Completions(max_batch_size=32, batch_timeout=0.05, api_path="/v1/completions")
    server = litserve.LitServer(api, accelerator="cpu", timeout=300)
    quiet = {"log_level": "warning", "generate_client_file": False}
    server.run(host="127.0.0.1", port=int(sys.argv[2]), **quiet)
