"""The engine's answers are those of one sequence alone, whatever else happens around them."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from llmos_jax.config import UserError
from llmos_jax.models.generate import Generator
from llmos_jax.serve.adapters import Adapter
from llmos_jax.serve.draft import DraftModel
from llmos_jax.serve.resident import Residents
from llmos_jax.serve.weights import joined, served_params
from tests import tiny
from tests.serve import engines
from tests.serve.engines import MODEL, SERVE, drive, request, tokens

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, MODEL.vocab_size, n).tolist() for n in (3, 17, 40, 9, 26, 5)]


@pytest.fixture(scope="module")
def runner():
    return engines.runner()


@pytest.fixture(scope="module")
def alone():
    """Greedy answers by the generator, one sequence at a time over a dense cache."""
    mesh = tiny.mesh()
    generator = Generator(MODEL, tiny.params(MODEL), mesh)
    return {(str(i), 0): list(generator(prompt, 12)) for i, prompt in enumerate(PROMPTS)}


def requests(**fields):
    return [request(str(i), prompt, **fields) for i, prompt in enumerate(PROMPTS)]


def test_mixed_batches(runner, alone):
    assert tokens(drive(engines.engine(runner), requests())) == alone


@pytest.mark.parametrize("chunk", [1, 3, 8, 31])
def test_chunks_of_every_size(runner, alone, chunk):
    assert tokens(drive(engines.engine(runner, chunk=chunk), requests())) == alone


@pytest.mark.parametrize("every", [1, 2, 5])
def test_arrivals_between_steps(runner, alone, every):
    assert tokens(drive(engines.engine(runner), requests(), every)) == alone


@pytest.mark.parametrize("host_pages", [0, 64])
def test_a_pool_so_small_that_sequences_are_preempted(runner, alone, host_pages):
    engine = engines.engine(runner, num_pages=14, host_pages=host_pages)
    assert tokens(drive(engine, requests())) == alone
    stats = engine.stats()
    assert stats["preemptions"] > 0 and (stats["swaps"] > 0) == bool(host_pages)
    assert stats["used"] == 0


def test_prefix_hits(runner, alone):
    engine = engines.engine(runner)
    drive(engine, requests())
    again = drive(engine, requests())
    assert tokens(again) == alone
    assert again["2", 0][0].cached_tokens >= 36


def test_several_answers_share_their_prompt(runner):
    seeds = {
        i: tokens(drive(engines.engine(runner), [request("x", PROMPTS[1], temperature=1.0, seed=7 + i)]))["x", 0]
        for i in range(3)
    }
    engine = engines.engine(runner)
    assert tokens(drive(engine, [request("x", PROMPTS[1], temperature=1.0, seed=7, n=3)])) == {
        ("x", i): seeds[i] for i in seeds
    }


def test_seeds_decide_whatever_else_runs(runner):
    drawn = [request(str(i), p, temperature=0.9, top_p=0.9, top_k=20, seed=i) for i, p in enumerate(PROMPTS)]
    one_by_one = {}
    for r in drawn:
        one_by_one |= tokens(drive(engines.engine(runner), [r]))
    assert tokens(drive(engines.engine(runner), drawn)) == one_by_one
    assert tokens(drive(engines.engine(runner, num_pages=26, chunk=7), drawn, every=2)) == one_by_one


def test_replay_goes_on_where_it_stopped(runner, alone):
    for count in (1, 5, 11):
        replayed = [dataclasses.replace(r, outputs=(tuple(alone[r.id, 0][:count]),)) for r in requests()]
        rest = tokens(drive(engines.engine(runner), replayed))
        assert {key: alone[key][:count] + rest[key] for key in alone} == alone


def test_penalties_and_bias(runner, alone):
    told = tokens(drive(engines.engine(runner), requests(repetition_penalty=1e6)))
    for i, prompt in enumerate(PROMPTS):
        assert not set(told[str(i), 0][1:]) & set(prompt) or len(set(prompt)) > 40
        assert len(set(told[str(i), 0])) == 12
    biased = tokens(drive(engines.engine(runner), requests(logit_bias=((5, 1e4),))))
    assert all(set(answer) == {5} for answer in biased.values())


def test_logprobs_of_answer_and_prompt(runner):
    model = MODEL
    generator = Generator(model, tiny.params(model), tiny.mesh())
    told = drive(engines.engine(runner), requests(logprobs=3, prompt_logprobs=2), every=1)
    for i, prompt in enumerate(PROMPTS):
        outputs = told[str(i), 0]
        answer = [t for o in outputs for t in o.tokens]
        logits = np.asarray(generator.logits(prompt + answer), np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        got = [entry for o in outputs for entry in o.logprobs]
        assert [entry.token for entry in got] == answer
        for k, entry in enumerate(got):
            row = expected[len(prompt) + k - 1]
            assert abs(entry.logprob - row[entry.token]) < 1e-4
            assert [t for t, _ in entry.top] == np.argsort(-row, kind="stable")[:3].tolist()
        of_prompt = outputs[0].prompt_logprobs
        assert of_prompt[0] is None and len(of_prompt) == len(prompt)
        for k, entry in enumerate(of_prompt[1:]):
            assert entry.token == prompt[k + 1] and abs(entry.logprob - expected[k, prompt[k + 1]]) < 1e-4


def test_speculation_changes_nothing():
    serve = dataclasses.replace(SERVE, num_drafts=3, max_sequences=2)
    built = engines.runner(serve=serve)
    wanted = [request(str(i), (p[:4] * 5)[:20], 30) for i, p in enumerate(PROMPTS)]
    wanted += [
        dataclasses.replace(r, id=f"t{r.id}", sampling=dataclasses.replace(r.sampling, temperature=0.3, seed=3))
        for r in wanted
    ]
    plain = tokens(drive(engines.engine(engines.runner(serve=dataclasses.replace(serve, num_drafts=0))), wanted))
    engine = engines.engine(built)
    assert tokens(drive(engine, wanted)) == plain
    assert engine.stats()["accepted_tokens"] > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_a_draft_model_changes_nothing(alone, seed):
    """seed 0 is the model itself, whose guesses are right as long as the answer is greedy; 1 is another one."""
    built = engines.runner(serve=dataclasses.replace(SERVE, num_drafts=3, max_sequences=2))
    small = engines.runner(serve=dataclasses.replace(SERVE, max_sequences=2), seed=seed)
    for num_pages in (96, 26):
        engine = engines.engine(built, num_pages=num_pages, chunk=7, draft=DraftModel(small, 3))
        assert tokens(drive(engine, requests(), every=2)) == alone
        stats = engine.stats()
        if seed == 0:
            assert stats["accepted_tokens"] > 0.9 * stats["draft_tokens"]
        else:
            assert 0 < stats["draft_tokens"] > stats["accepted_tokens"]


def test_adapters_are_mixed_in_one_batch():
    serve = dataclasses.replace(SERVE, max_adapters=2, adapter_rank=4)
    built = engines.runner(serve=serve)
    rng = np.random.default_rng(1)
    sizes = {"q": (16, 32), "v": (16, 16), "o": (32, 16), "gate": (16, 32), "down": (32, 16)}

    def adapter(name, rank):
        layers = [
            {key: (rng.normal(size=(i, rank)), rng.normal(size=(rank, o)) * 0.3) for key, (i, o) in sizes.items()}
            for _ in range(MODEL.num_layers)
        ]
        return Adapter(name, rank, tuple(layers))

    def merged(one):
        params = {path: np.array(value) for path, value in tiny.params(MODEL).items()}
        for layer, pairs in enumerate(one.layers):
            for key, (a, b) in pairs.items():
                part = "mlp" if key in ("gate", "up", "down") else "attention"
                weight = params[f"segments.0.0.{part}.{key}"]
                weight[layer] += (a @ b).reshape(weight[layer].shape)
        return {path: jax.numpy.asarray(value) for path, value in params.items()}

    adapters = {"a": adapter("a", 4), "b": adapter("b", 2)}
    engine = engines.engine(built)
    for one in adapters.values():
        engine.load_adapter(one)
    wanted = [
        request(f"{name}{i}", prompt, adapter=name) for i, prompt in enumerate(PROMPTS) for name in ("", "a", "b")
    ]
    told = tokens(drive(engine, wanted))
    for name in ("", "a", "b"):
        params = merged(adapters[name]) if name else tiny.params(MODEL)
        generator = Generator(MODEL, params, tiny.mesh())
        for i, prompt in enumerate(PROMPTS):
            assert told[f"{name}{i}", 0] == list(generator(prompt, 12)), (name, i)
    engine.unload_adapter("a")
    with pytest.raises(ValueError, match="not loaded"):
        engine.add(request("x", [1, 2], adapter="a"))
    with pytest.raises(UserError, match="rank 8"):
        engine.load_adapter(adapter("c", 8))


def test_models_take_turns_in_memory_for_one():
    one, other = engines.runner(), engines.runner(seed=5)
    alone = {}
    for name, built in (("one", one), ("other", other)):
        alone |= {f"{name}{key[0]}": told for key, told in tokens(drive(engines.engine(built), requests())).items()}
    residents = Residents(capacity=one.bytes * 1.5)
    residents.put("one", engines.engine(one))
    residents.put("other", engines.engine(other))
    assert residents.models["one"].asleep and not residents.models["other"].asleep
    told = {}
    for i in range(len(PROMPTS)):
        for name in ("one", "other"):
            residents.add(dataclasses.replace(requests()[i], id=f"{name}{i}", model=name))
        for _ in range(3):
            for output in residents.step():
                told.setdefault(output.id, []).extend(output.tokens)
    while residents.has_work:
        for output in residents.step():
            told.setdefault(output.id, []).extend(output.tokens)
        assert sum(not model.asleep for model in residents.models.values()) <= 1
    assert told == alone


def test_a_rebuilt_engine_answers_as_before(runner, alone):
    engine = engines.engine(runner, poison=(5, 5, 5))
    engine.add(request("bad", [1, 5, 5, 5, 2]))
    with pytest.raises(RuntimeError, match="poisoned"):
        engine.step()
    assert engine.in_step == {"bad"}
    assert tokens(drive(engine.rebuilt(), requests())) == alone


def test_aborted_pages_are_free_at_once(runner):
    engine = engines.engine(runner)
    for r in requests():
        engine.add(r)
    engine.step()
    engine.step()
    for r in requests():
        engine.abort(r.id)
    assert engine.stats()["used"] == 0
    assert engine.step() == []


def test_the_time_before_the_first_step_is_told_once_a_request(runner):
    engine = engines.engine(runner)
    first, second = (request(str(i), PROMPTS[i], n=2, max_tokens=4) for i in range(2))
    engine.add(first)
    time.sleep(0.05)
    told = [output for output in engine.step() if output.queued is not None]
    engine.add(second)
    while engine.has_work:
        told += [output for output in engine.step() if output.queued is not None]
    assert sorted((output.id, output.index) for output in told) == [("0", 0), ("1", 0)]
    waited = {output.id: output.queued for output in told}
    assert waited["0"] >= 0.05 and 0 < waited["1"] < 5


def test_embeddings_do_not_depend_on_the_batch(runner):
    together = drive(engines.engine(runner), requests(embed=True, max_tokens=1))
    for r in requests(embed=True, max_tokens=1):
        (output,) = drive(engines.engine(runner), [r])[r.id, 0]
        np.testing.assert_allclose(output.embedding, together[r.id, 0][0].embedding, atol=1e-5)
        assert abs(np.linalg.norm(output.embedding) - 1) < 1e-5


def test_nothing_is_compiled_after_ready(runner):
    engine = engines.engine(runner)
    engine.start()
    wanted = [*requests(), *(dataclasses.replace(r, id=f"p{r.id}") for r in requests(logprobs=2, presence_penalty=1.0))]
    drive(engine, wanted)
    assert engine.stats()["compilations"] == 0
    engine.close()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights(quantize):
    model = tiny.model(max_seq_len=128, embed_dim=128, mlp_dim=256, head_dim=16, num_kv_heads=4)
    full = engines.runner(model)
    built = engines.runner(dataclasses.replace(model, quantize=quantize))
    exact, told = (drive(engines.engine(b), requests(logprobs=0)) for b in (full, built))
    for key in exact:
        first, other = exact[key][0].logprobs[0], told[key][0].logprobs[0]
        assert abs(first.logprob - other.logprob) < 0.6


@pytest.mark.parametrize("dtype", ["int8"])
def test_quantized_pages(runner, dtype):
    built = engines.runner(serve=dataclasses.replace(SERVE, kv_dtype=dtype))
    exact, told = (drive(engines.engine(b), requests(logprobs=0)) for b in (runner, built))
    for key in exact:
        assert abs(exact[key][0].logprobs[0].logprob - told[key][0].logprobs[0].logprob) < 0.1


@pytest.mark.parametrize("axes", [{"tensor": 4}, {"tensor": 2, "data": 1}])
def test_tensor_parallel(alone, axes):
    built = engines.runner(mesh=tiny.mesh(**axes))
    assert tokens(drive(engines.engine(built), requests())) == alone


def test_experts_over_a_mesh():
    model = dataclasses.replace(tiny.MOE, max_seq_len=128)
    one = tokens(drive(engines.engine(engines.runner(model)), requests()))
    built = engines.runner(model, mesh=tiny.mesh(expert=4, tensor=2))
    assert tokens(drive(engines.engine(built), requests())) == one


def test_served_params_are_the_same_layer_by_layer():
    params = tiny.params(MODEL)
    served = served_params(MODEL, dict(params), tiny.mesh())
    for path in params:
        sources = joined(tiny.mesh(), path, params)
        if not sources:  # its outputs lie beside another's
            assert all(part.size == 0 for part in served[path])
            continue
        parts = served[path] if isinstance(served[path], tuple) else (served[path],)
        stacks = [np.asarray(params[source]) for source in sources]
        for i, part in enumerate(parts):
            layers = [stack[i] if isinstance(served[path], tuple) else stack for stack in stacks]
            together = np.concatenate([layer.reshape(*part.shape[:-1], -1) for layer in layers], axis=-1)
            assert np.array_equal(np.asarray(part), together)
