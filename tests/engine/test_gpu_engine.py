"""The engine on a real GPU: against NumPy, against transformers, and against itself.

Run with `pytest -m gpu`. What needs torch or the demo model skips where it is missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nanocupy.bench.shapes import SHAPES
from nanocupy.checkpoint.open import open_checkpoint
from nanocupy.checkpoint.random import RandomCheckpoint
from nanocupy.engine.backend import device_model, make_runner
from nanocupy.engine.batch import build_batch
from nanocupy.engine.config import EngineConfig
from nanocupy.engine.device_plan import DeviceSettings
from nanocupy.engine.device_runner import DeviceRunner
from nanocupy.engine.engine import LLMEngine
from nanocupy.engine.numpy_runner import NumpyRunner
from nanocupy.engine.request import Request
from nanocupy.engine.runner import RunnerLimits
from nanocupy.engine.scheduler import ScheduledRequest
from nanocupy.model.load import load_numpy_weights
from nanocupy.sampling_params import SamplingParams
from tests.checkpoint.tiny import TinyCheckpoint, tiny_config
from tests.cuda.gpu_record import alone_on_the_device
from tests.kernels.backends import TOLERANCES

pytestmark = pytest.mark.gpu

FLOAT32 = DeviceSettings("float32", "float32", "float32")
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
PROMPTS = [
    "The capital of France is", "def fibonacci(n):", "Once upon a time", "1, 2, 3, 4,",
    "Water boils at", "La capitale de l'Italie est", "The opposite of hot is", "To be or not to",
    "import numpy as np\n", "Dear Sir or Madam,", "The mitochondria is", "In 1969,",
    "A haiku about rain:", "Q: What is 2 + 2?\nA:", "The quick brown fox", "SELECT * FROM",
    "Roses are red,", "E = mc", "Hello", "Es war einmal",
]  # fmt: skip


@pytest.fixture(scope="module")
def make_device():
    from nanocupy.cuda.device import CudaDevice

    return CudaDevice


def run(runner, prompts, params=GREEDY):
    engine = LLMEngine(runner.config, runner)
    for number, ids in enumerate(prompts):
        engine.add_request(str(number), ids, params)
    outputs = {str(number): [] for number in range(len(prompts))}
    while engine.has_unfinished:
        for output in engine.step():
            outputs[output.request_id].append(output.token_id)
    return [outputs[str(number)] for number in range(len(prompts))]


def device_runner(
    device, checkpoint, settings, *, max_context=1024, chunk=512, num_seqs=32, in_cache=20
):
    """in_cache: sequences of that context that the cache has room for."""
    blocks = 1 + min(num_seqs, in_cache) * -(-max_context // 16)
    limits = RunnerLimits(blocks, 16, max_context, chunk, num_seqs)
    runner = DeviceRunner(checkpoint.config, device, limits, settings)
    runner.upload_weights(checkpoint)
    return runner


def all_logits(runner, ids, chunk=None):
    """Logits of every position of one sequence, in chunks."""
    request = Request("a", list(ids), GREEDY, 0, len(ids) + 1)
    request.block_ids = list(range(2, 3 + len(ids) // 16))
    parts = []
    chunk = chunk or len(ids)
    for start in range(0, len(ids), chunk):
        num = min(chunk, len(ids) - start)
        request.num_computed_tokens = start
        batch = build_batch(
            [ScheduledRequest(request, num, True)], block_size=16,
            table_width=getattr(runner, "table_width", None),
        )  # fmt: skip
        batch = type(batch)(**vars(batch) | {"sample_rows": np.arange(num, dtype=np.int32)})
        parts.append(runner.logits(batch).copy())
    return np.concatenate(parts)


def worst(got, wanted):
    rms = np.sqrt(np.mean(wanted.astype(np.float64) ** 2, axis=-1, keepdims=True))
    return float((np.abs(got - wanted) / (np.abs(wanted) + rms)).max())


def test_smollm2_in_float32_says_what_numpy_says(make_device, demo_gguf: Path) -> None:
    checkpoint = open_checkpoint(demo_gguf)
    tokens = [checkpoint.tokenizer.encode(text) for text in PROMPTS]
    device = make_device()
    got = run(device_runner(device, checkpoint, FLOAT32), tokens)
    limits = RunnerLimits(1 + 20 * 64, 16, 1024, 512, 20)
    reference = NumpyRunner(checkpoint.config, load_numpy_weights(checkpoint), limits)
    wanted = run(reference, tokens)
    for text, ids, a, b in zip(PROMPTS, tokens, got, wanted, strict=True):
        if a == b:
            continue
        at = next(i for i in range(len(b)) if a[i] != b[i])
        logits = np.sort(all_logits(reference, ids + b[:at])[-1])
        assert logits[-1] - logits[-2] < 1e-4, f"{text!r}: token {at} is {a[at]}, not {b[at]}"
    assert device.graphs.counters.replayed > 50


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", ["smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_chunks_give_the_same_logits(make_device, record_error, shape, dtype) -> None:
    config = SHAPES[shape].with_(num_layers=4)
    checkpoint = RandomCheckpoint(config, dtype, seed=1)
    settings = DeviceSettings(dtype, dtype, dtype)
    runner = device_runner(
        make_device(), checkpoint, settings, num_seqs=600, max_context=640, in_cache=1
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 200)
    whole = all_logits(runner, ids)
    # A row of logits is as near as the type lets it be, and no single one of the 30 million is
    # further off than a normal error of that size gets.
    for chunk in (1, 7, 64, 512):
        error = all_logits(runner, ids, chunk).astype(np.float64) - whole
        of_row = np.sqrt(np.mean(error**2, -1) / np.mean(whole.astype(np.float64) ** 2, -1))
        record_error("logits in chunks", dtype, of_row.max())
        assert of_row.max() < TOLERANCES[dtype]
        assert worst(error + whole, whole) < 6 * TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("embed", "head"),
    [("float16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16"), ("auto", "float32")],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedding_and_head_of_types_of_their_own(
    make_device, record_error, dtype, embed, head
) -> None:
    """By each way of the head's product, from one row to all at once, beside NumPy."""
    model = tiny_config(
        vocab_size=5003, hidden_size=1024, intermediate_size=2048, head_size=64, num_heads=16,
        num_kv_heads=4, max_context=640, tied_lm_head=True,
    )  # fmt: skip
    checkpoint, device = TinyCheckpoint(model, seed=5), make_device()
    config = EngineConfig(dtype=dtype, embed_dtype=embed, lm_head_dtype=head)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, 200)
    on_cpu = {"dtype": "auto", "embed_dtype": dtype if embed == "auto" else embed}
    reference = make_runner(checkpoint, config.with_(device="cpu", max_num_seqs=600, **on_cpu))
    wanted = all_logits(reference, ids)
    checkpoint, settings, _ = device_model(checkpoint, config, device.traits)
    runner = device_runner(device, checkpoint, settings, num_seqs=600, max_context=640, in_cache=1)
    # Of layers in bfloat16 the weights are rounded too.
    limit = 0.05 if dtype == "bfloat16" else 2 * TOLERANCES[head]
    for chunk in (1, 2, 7, 20, 64, 200):
        error = all_logits(runner, ids, chunk).astype(np.float64) - wanted
        of_row = np.sqrt(np.mean(error**2, -1) / np.mean(wanted.astype(np.float64) ** 2, -1))
        record_error("logits of another head", dtype, of_row.max())
        assert of_row.max() < limit


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_bfloat16_is_as_near_the_truth_as_transformers(make_device, shape, record_property) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from benchmarks.transformers_peer import make_peer

    checkpoint = RandomCheckpoint(SHAPES[shape], "bfloat16", seed=2)
    ids = np.random.default_rng(3).integers(0, checkpoint.config.vocab_size, 512)
    settings = DeviceSettings()

    class OnHost(RandomCheckpoint):
        """The same weights, made on the host, so that both sides have them."""

    source = OnHost(checkpoint.config, "bfloat16", seed=2)
    runner = device_runner(make_device(), _plain(source), settings, num_seqs=512, in_cache=1)
    ours = all_logits(runner, ids).astype(np.float64)
    inputs = torch.tensor(ids[None], device="cuda")
    with torch.inference_mode():
        peer = make_peer(source, torch.float32).cuda()
        truth = peer(inputs).logits[0].double().cpu().numpy()
        theirs = peer.to(torch.bfloat16)(inputs).logits[0].double().cpu().numpy()
    rms = np.sqrt(np.mean(truth**2))
    error, peer_error = (np.sqrt(np.mean((x - truth) ** 2)) / rms for x in (ours, theirs))
    record_property("error", float(error))
    record_property("peer_error", float(peer_error))
    assert error <= 1.2 * peer_error


def _plain(checkpoint):
    """The same tensors without the type that would have them made on the device."""
    from tests.checkpoint.tiny import TinyCheckpoint

    plain = TinyCheckpoint.__new__(TinyCheckpoint)
    plain.path, plain.config, plain.tensors = checkpoint.path, checkpoint.config, checkpoint.tensors
    plain.read = checkpoint.read
    return plain


def test_graphs_give_what_eager_gives(make_device) -> None:
    checkpoint = RandomCheckpoint(SHAPES["smollm2-135m"], "bfloat16", seed=1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 49152, n).tolist() for n in (5, 17, 1, 40, 33)]
    results = []
    for use_graphs in (True, False):
        device = make_device(use_graphs=use_graphs)
        results.append(run(device_runner(device, checkpoint, DeviceSettings()), prompts))
    assert results[0] == results[1]


def run_many(runner, device, prompts, num_kept):
    """24 tokens of each prompt, and of each step that was a decode of all, the logits of the first
    ones, float32 [num_kept, V], with the number of tokens before."""
    engine = LLMEngine(runner.config, runner)
    for number, ids in enumerate(prompts):
        engine.add_request(str(number), ids, GREEDY.with_(max_tokens=24))
    outputs, logits = [[] for _ in prompts], []
    host = device.pinned(4 * len(prompts) * runner.config.vocab_size).view(np.float32)
    host = host.reshape(len(prompts), -1)
    while engine.has_unfinished:
        given = engine.step()
        for output in given:
            outputs[int(output.request_id)].append(output.token_id)
        places = runner._decoding.state.places[: len(prompts)]
        if len(given) == len(prompts) and None not in places:
            device.to_host(host, runner._main.logits(len(prompts)))
            device.synchronize("reading the logits")
            order = np.argsort([int(request.request_id) for request in places])
            logits.append((len(outputs[0]) - 1, host[order[:num_kept]]))
    return outputs, logits


def test_many_sequences_in_bfloat16(make_device, record_error) -> None:
    """In batches of 40 and of 200: by graphs as without, and the same logits in either."""
    config = SHAPES["qwen3-0.6b"].with_(num_layers=4, vocab_size=8192, eos_ids=())
    checkpoint = RandomCheckpoint(config, "bfloat16", seed=1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, 3 + n % 37).tolist() for n in range(200)]
    found = {}
    for use_graphs in (True, False):
        device = make_device(use_graphs=use_graphs)
        runner = device_runner(
            device, checkpoint, DeviceSettings(), num_seqs=200, max_context=128, in_cache=200,
            chunk=8192,  # all prompts in one step
        )  # fmt: skip
        for count in (40, 200):
            found[use_graphs, count] = run_many(runner, device, prompts[:count], 40)
        assert (device.graphs.counters.replayed > 20) == use_graphs
    for count in (40, 200):
        assert found[True, count][0] == found[False, count][0]
        assert {len(tokens) for tokens in found[True, count][0]} == {24}
    (few, few_logits), (many, many_logits) = found[True, 40], found[True, 200]
    assert len(few_logits) == len(many_logits) == 23
    num_compared = 0
    for (num_tokens, a), (same, b) in zip(few_logits, many_logits, strict=True):
        assert num_tokens == same
        # Those whose texts are the same so far: a near tie may fall either way.
        rows = [n for n in range(40) if few[n][:num_tokens] == many[n][:num_tokens]]
        num_compared += len(rows)
        error = a[rows].astype(np.float64) - b[rows]
        of_row = np.sqrt(np.mean(error**2, -1) / np.mean(b[rows].astype(np.float64) ** 2, -1))
        record_error("logits in batches", "bfloat16", of_row.max(initial=0))
        assert of_row.max(initial=0) < TOLERANCES["bfloat16"]
    assert num_compared > 100


def test_older_cards_paths_agree(make_device) -> None:
    checkpoint = RandomCheckpoint(SHAPES["qwen2.5-0.5b"].with_(num_layers=4), "float32", seed=1)
    ids = np.random.default_rng(0).integers(0, 1000, 100)
    logits = [
        all_logits(
            device_runner(
                make_device(force_plain=plain), checkpoint, FLOAT32, num_seqs=128, in_cache=1
            ),
            ids,
        )
        for plain in (True, False)
    ]
    assert worst(*logits) < 2e-5


@alone_on_the_device
def test_a_step_allocates_nothing(make_device) -> None:
    from nanocupy.cuda.arena import device_allocations

    checkpoint = RandomCheckpoint(SHAPES["smollm2-135m"], "bfloat16", seed=1)
    runner = device_runner(make_device(), checkpoint, DeviceSettings())
    prompts = [list(range(1, 40)), list(range(1, 700))]
    run(runner, prompts)  # loads every kernel, captures every graph
    with device_allocations() as count:
        run(runner, prompts)
    assert count.nothing, count


def test_a_context_of_128k_decodes(make_device) -> None:
    config = SHAPES["llama-3.2-1b"].with_(num_layers=2)
    checkpoint = RandomCheckpoint(config, "bfloat16", seed=1)
    length = 131072
    runner = device_runner(
        make_device(), checkpoint, DeviceSettings(), max_context=length, chunk=8192, num_seqs=1
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, length - 20).tolist()
    (tokens,) = run(runner, [ids], GREEDY.with_(max_tokens=16))
    assert len(tokens) == 16
