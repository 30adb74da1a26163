"""`lm_eval` with `local-completions` on two tasks of our own: multiple choice, and generation until a line ends.

Arguments: URL KEY MODEL TOKENIZER FOLDER. Writes FOLDER/samples.json: for each choice its context, its continuation and
the log-likelihood that the harness reckoned from the server's answers.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from telling import MODEL, URL, tell

TOKENIZER, FOLDER = sys.argv[4], Path(sys.argv[5])
QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "Madrid"], "answer": 0},
    {"question": "Water freezes to", "choices": ["sand", "ice", "wood"], "answer": 1},
    {"question": "The opposite of hot is", "choices": ["cold", "warm", "seven"], "answer": 0},
]
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = "task: llmos_choice\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\n"
CHOICE += "target_delimiter: ' '\nmetric_list:\n  - metric: acc\n"
UNTIL = "task: llmos_until\noutput_type: generate_until\ndoc_to_target: '{{choices[answer]}}'\n"
UNTIL += "generation_kwargs:\n  until: ['.', '\\n']\n  max_gen_toks: 16\n  temperature: 0\n"
UNTIL += "metric_list:\n  - metric: exact_match\n"


def local_completions() -> str:
    data = FOLDER / "questions.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, text in (("choice", CHOICE), ("until", UNTIL)):
        (FOLDER / f"{name}.yaml").write_text(text + COMMON.format(data=data))
    arguments = {"model": MODEL, "base_url": f"{URL}/completions", "tokenizer": TOKENIZER, "num_concurrent": 2}
    arguments |= {"tokenizer_backend": "huggingface", "max_length": 1024, "max_retries": 1}
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=["llmos_choice", "llmos_until"],
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = [
        {"context": argument[0], "continuation": argument[1], "logprob": response[0]}
        for sample in found["samples"]["llmos_choice"]
        for argument, response in zip(sample["arguments"], sample["filtered_resps"], strict=True)
    ]
    assert len(samples) == 9 and all(sample["logprob"] < 0 for sample in samples)
    for sample in found["samples"]["llmos_until"]:
        text = sample["resps"][0][0]
        assert text and "." not in text and "\n" not in text, text
    (FOLDER / "samples.json").write_text(json.dumps(samples))
    return f"accuracy {found['results']['llmos_choice']['acc,none']:.2f} of 3 questions"


sys.exit(tell(f"lm_eval {version('lm_eval')}", [local_completions]))
