"""What scripts/bench_serve.py runs in the environments of the others: transformers, llama-cpp-python."""

import json
import statistics
import sys
import time
from pathlib import Path

PREFILL, SHORT, MEDIUM, ANSWER = 512, 32, 128, 64


def prompt(length, salt, vocabulary):
    return [(salt * 7919 + i * 104_729) % (vocabulary - 1000) + 500 for i in range(length)]


def transformers(folder, vocabulary):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2 if not torch.cuda.is_available() else 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)

    def run(count, length, answer, salt):
        ids = torch.tensor([prompt(length, salt + i, vocabulary) for i in range(count)], device=device)
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=answer,
                min_new_tokens=answer,
                pad_token_id=0,
            )
        return time.perf_counter() - started

    run(8, SHORT, 4, 0)
    found = {"prefill": PREFILL / statistics.median(run(1, PREFILL, 1, 100 * i) for i in range(1, 4))}
    for count in (1, 8):
        first = statistics.median(run(count, SHORT, 1, 3000 * count + i) for i in range(3))
        seconds = statistics.median(run(count, SHORT, ANSWER, 1000 * count + 100 * i) for i in range(3)) - first
        found[f"decode {count}"] = count * (ANSWER - 1) / seconds
    found["TTFT"] = statistics.median(run(1, MEDIUM, 1, 9000 + 100 * i) for i in range(3))
    for users in (8, 16):
        found[f"users {users}"] = (
            users * ANSWER / statistics.median(run(users, MEDIUM, ANSWER, 500 * i) for i in range(3))
        )
    return found


def llama(file, vocabulary):
    import llama_cpp

    model = llama_cpp.Llama(
        file, n_ctx=8192, n_batch=512, n_threads=2, n_threads_batch=2, verbose=False, logits_all=False
    )

    def one(length, answer, salt):
        """Seconds to the first token, and from there to the last."""
        model.reset()
        started, first = time.perf_counter(), 0.0
        for number, _ in enumerate(model.generate(prompt(length, salt, vocabulary), temp=0.0, reset=True)):
            first = first or time.perf_counter()
            if number + 1 == answer:
                break
        return first - started, time.perf_counter() - first

    one(SHORT, 8, 1)
    found = {"prefill": PREFILL / statistics.median(one(PREFILL, 1, 100 * i)[0] for i in range(1, 4))}
    found["decode 1"] = (ANSWER - 1) / statistics.median(one(SHORT, ANSWER, 1000 + 100 * i)[1] for i in range(3))
    found["TTFT"] = statistics.median(one(MEDIUM, 1, 9000 + 100 * i)[0] for i in range(3))
    del model
    found["decode 8"] = 8 * (ANSWER - 1) / batched(llama_cpp, file, vocabulary, 8)
    return found


def batched(llama_cpp, file, vocabulary, count):
    """Seconds that `count` sequences take for ANSWER - 1 tokens each, one batch a step, by the C interface."""
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 8192, 512, 512, count
    params.n_threads = params.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(512, 0, 1)

    def step(entries):
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        assert llama_cpp.llama_decode(context, batch) == 0
        llama_cpp.llama_synchronize(context)

    prompts = [prompt(SHORT, s, vocabulary) for s in range(count)]
    step([(token, i, s, i == SHORT - 1) for s in range(count) for i, token in enumerate(prompts[s])])
    started = time.perf_counter()
    for k in range(ANSWER - 1):
        step([((s * 31 + k * 17) % (vocabulary - 1000) + 500, SHORT + k, s, True) for s in range(count)])
    return time.perf_counter() - started


def quantize(source, folder):
    """F16, Q8_0 and Q4_0 of a GGUF, by llama.cpp's own quantizer."""
    import llama_cpp

    kinds = {
        "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
        "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    }
    for name, kind in kinds.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = kind, True, 2
        target = Path(folder) / f"{name}.gguf"
        assert llama_cpp.llama_model_quantize(source.encode(), str(target).encode(), params) == 0, name
    return {}


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    rest = [int(one) if one.isdigit() else one for one in rest]
    print(json.dumps({"transformers": transformers, "llama": llama, "quantize": quantize}[what](*rest)))
